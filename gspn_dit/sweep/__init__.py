"""Choosing how a checkpoint is sampled, by a small fixed set of images: `python -m gspn_dit.sweep`, docs/sweep.md."""

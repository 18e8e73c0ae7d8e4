"""A page to draw with trained models by hand: `python -m gspn_dit.playground`."""

"""Evaluation of generated images: features, metrics and a report; sees files and images, never models."""

"""Images of many megapixels from a diffusers pipeline: generated at its native size, then refined upwards in stages."""

from gspn_dit.highres.request import Stage
from gspn_dit.highres.stages import generate_highres

__all__ = ["Stage", "generate_highres"]

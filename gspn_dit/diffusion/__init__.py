"""Objectives, guidance and sampling; a model is any callable `model(latents, timesteps, class_labels)`."""

from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.objective import Objective, create_objective
from gspn_dit.diffusion.sampling import CHUNK, SAMPLERS, STEP_NOISE, draw_noise, sample_latents

__all__ = [
    "CHUNK",
    "SAMPLERS",
    "STEP_NOISE",
    "Guidance",
    "Objective",
    "create_objective",
    "draw_noise",
    "sample_latents",
]

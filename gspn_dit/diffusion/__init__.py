"""Objectives, guidance and sampling; a model is any callable `model(latents, timesteps, class_labels)`."""

from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.objective import Objective, create_objective
from gspn_dit.diffusion.sampling import CHUNK, SAMPLERS, draw_noise, sample_latents

__all__ = ["CHUNK", "SAMPLERS", "Guidance", "Objective", "create_objective", "draw_noise", "sample_latents"]

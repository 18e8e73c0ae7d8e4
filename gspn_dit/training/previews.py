"""Grids of samples drawn from the EMA weights while training, always from the same noise."""

from __future__ import annotations

from pathlib import Path

import torch

from gspn_dit.config import SamplingConfig
from gspn_dit.data.latents import Latent
from gspn_dit.diffusion import Guidance, Objective, draw_noise, sample_latents
from gspn_dit.grid import class_grid, save_png
from gspn_dit.models import DiffusionModel


def save_preview(
    path: Path,
    model: DiffusionModel,
    objective: Objective,
    latent: Latent,
    class_names: list[str],
    config: SamplingConfig,
    seed: int,
) -> None:
    """Sample `per_class` images of the first classes and write them as a grid."""
    labels = torch.arange(min(config.max_classes, len(class_names))).repeat_interleave(config.per_class)
    weight = next(model.parameters())
    noise = draw_noise(seed, range(len(labels)), (latent.channels, latent.size, latent.size)).to(weight)
    latents = sample_latents(
        model,
        objective,
        noise,
        labels.to(weight.device),
        model.null_label,
        config.steps,
        Guidance(config.guidance_scale, config.guidance_interval, config.guidance_channels),
        config.sampler,
        seed=seed,
        indices=range(len(labels)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(class_grid(latent.decode(latents), labels.tolist(), class_names), path)

"""Flow matching with the straight path x_t = (1-t)·x₀ + t·ε and the velocity ε - x₀ as target (SiT, 2401.08740)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion.objective import Model, Objective

TIMESTEP_SCALE = 1000
"""The model receives 1000·t."""


class VelocityObjective(Objective):
    """Mean squared error of the velocity; t is 0 for data and 1 for noise."""

    samplers = ("euler", "heun")

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def out_channels(self, latent_channels: int) -> int:
        return latent_channels

    def timesteps(self, uniforms: Tensor) -> Tensor:
        """Map uniforms to 1000·t by the inverse distribution function; t is uniform or logit-normal, then shifted."""
        t = uniforms
        if self.config.timestep_sampling == "logit_normal":
            t = torch.sigmoid(self.config.logit_normal_mean + self.config.logit_normal_std * torch.special.ndtri(t))
        shift = self.config.timestep_shift
        return TIMESTEP_SCALE * (shift * t / (1 + (shift - 1) * t))

    def loss(
        self,
        model: Model,
        latents: Tensor,
        class_labels: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        keep_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mean over channels and pixels of (model(x_t) - (ε - x₀))², [B]."""
        t = (timesteps / TIMESTEP_SCALE).to(latents.dtype)[:, None, None, None]
        noisy = (1 - t) * latents + t * noise
        velocity = model(noisy, timesteps.to(latents.dtype), class_labels, keep_mask)
        error = velocity.to(latents.dtype) - (noise - latents)
        return error.square().flatten(1).mean(dim=1)

    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return diffusers' flow-matching scheduler, "euler" or "heun" (2·steps - 1 model calls)."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

        if sampler == "heun":
            heun: Any = FlowMatchHeunDiscreteScheduler(num_train_timesteps=TIMESTEP_SCALE)
            heun.set_timesteps(num_inference_steps)
            return heun
        euler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEP_SCALE)
        # The scheduler's own grid is not uniform and ends at .001; this one is 1, …, 1/steps, and then 0.
        euler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist())
        return euler

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        return output, None

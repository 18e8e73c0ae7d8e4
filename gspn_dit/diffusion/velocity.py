"""Flow matching with the straight path x_t = (1-t)·x₀ + t·ε and the velocity ε - x₀ as target (SiT, 2401.08740)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from gspn_dit.diffusion.objective import Denoiser, Objective

TIMESTEP_SCALE = 1000
"""The model receives 1000·t."""


def uniform_times(count: int) -> list[float]:
    """Return the times 1, 1 - 1/count, …, 1/count of flow matching's steps."""
    return np.linspace(1.0, 0.0, count + 1)[:-1].tolist()


class VelocityObjective(Objective):
    """Mean squared error of the velocity; t is 0 for data and 1 for noise."""

    prediction_type = "flow_prediction"
    samplers: tuple[str, ...] = ("euler", "heun")

    def out_channels(self, latent_channels: int) -> int:
        return latent_channels

    def timesteps(self, uniforms: Tensor) -> Tensor:
        """Map uniforms to 1000·t."""
        return TIMESTEP_SCALE * self.times(uniforms)

    def loss(self, denoise: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the mean over channels and pixels of (denoise(x_t) - (ε - x₀))², [B]."""
        t = (timesteps / TIMESTEP_SCALE).to(latents.dtype)[:, None, None, None]
        noisy = (1 - t) * latents + t * noise
        velocity = denoise(noisy, timesteps.to(latents.dtype))
        error = velocity.to(latents.dtype) - (noise - latents)
        return error.square().flatten(1).mean(dim=1)

    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return diffusers' flow-matching scheduler, "euler" or "heun", on the times 1, 1 - 1/steps, …, 1/steps, 0.

        Heun's last step is one of Euler's, since the velocity is not asked for at t = 0: 2·steps - 1 model calls.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

        # The schedulers' own grids are not uniform: they go down to .001 in steps - 1 parts, and then to 0.
        if sampler == "heun":
            heun: Any = FlowMatchHeunDiscreteScheduler(num_train_timesteps=TIMESTEP_SCALE)
            heun.sigma_min = 1 / num_inference_steps
            heun.set_timesteps(num_inference_steps)
            return heun
        euler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEP_SCALE)
        euler.set_timesteps(sigmas=uniform_times(num_inference_steps))
        return euler

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        return output, None

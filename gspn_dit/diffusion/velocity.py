"""Flow matching with the straight path x_t = (1-t)·x₀ + t·ε and the velocity ε - x₀ as target (SiT, 2401.08740)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gspn_dit.diffusion.objective import TIMESTEP_SCALE, Denoiser, Objective


class VelocityObjective(Objective):
    """Mean squared error of the velocity; t is 0 for data and 1 for noise."""

    prediction_type = "flow_prediction"
    samplers: tuple[str, ...] = ("euler", "heun", "dpm++", "sde")
    stochastic_samplers: tuple[str, ...] = ("sde",)
    flows = True
    shifts_by_size = True

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
        """Return a flow-matching scheduler of diffusers, see `gspn_dit.diffusion.flow_schedulers`.

        All samplers visit the times 1, 1 - 1/steps, …, 1/steps, shifted by `sampling_shift`, and end at 0.
        """
        from gspn_dit.diffusion.flow_schedulers import make_flow_scheduler

        return make_flow_scheduler(sampler, num_inference_steps, self.sampling_shift)

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        return output, None

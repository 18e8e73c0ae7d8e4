"""Flow matching with the straight path x_t = (1-t)·x₀ + t·ε and the velocity ε - x₀ as target (SiT, 2401.08740)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gspn_dit.diffusion.objective import TIMESTEP_SCALE, Denoiser, Model, Objective

LEAST_TIME = 0.05
"""Of t, where the loss divides an error of predicted data by it, so that errors near the data do not drown the rest."""


class VelocityObjective(Objective):
    """Mean squared error of the velocity; t is 0 for data and 1 for noise.

    With `objective.prediction: data` the model predicts x₀ and the loss stays that of the velocity, (x_t - x̂₀)/t
    (x-prediction of "Back to Basics", arXiv 2511.13720): data lie near a manifold of few dimensions, which a narrow
    model finds easier to tell than noise or a velocity.
    """

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
        """Return the mean over channels and pixels of (v - (ε - x₀))², [B].

        v is denoise(x_t), or (x_t - denoise(x_t)) / max(t, 0.05) of a model that predicts data, whose target is divided
        alike: (denoise(x_t) - x₀)² / max(t, 0.05)².
        """
        t = (timesteps / TIMESTEP_SCALE).to(latents.dtype)[:, None, None, None]
        noisy = (1 - t) * latents + t * noise
        predicted = denoise(noisy, timesteps.to(latents.dtype)).to(latents.dtype)
        if self.predicts_data:
            error = (predicted - latents) / t.clamp(min=LEAST_TIME)
        else:
            error = predicted - (noise - latents)
        return error.square().flatten(1).mean(dim=1)

    @property
    def predicts_data(self) -> bool:
        """Whether the model predicts x₀ and not the velocity."""
        return self.config.prediction == "data"

    def sampled(self, model: Model) -> Model:
        """Return a model of velocities. Where data are predicted, they are (x - x̂₀)/t: Euler's last step ends at x̂₀."""
        if not self.predicts_data:
            return model

        def velocity(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
            t = (timesteps / TIMESTEP_SCALE).to(latents.dtype)[:, None, None, None]
            return (latents - model(latents, timesteps, class_labels).to(latents.dtype)) / t

        return velocity

    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return a flow-matching scheduler of diffusers, see `gspn_dit.diffusion.flow_schedulers`.

        All samplers visit the times 1, 1 - 1/steps, …, 1/steps, shifted by `sampling_shift`, and end at 0.
        """
        from gspn_dit.diffusion.flow_schedulers import make_flow_scheduler

        return make_flow_scheduler(sampler, num_inference_steps, self.sampling_shift)

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        return output, None

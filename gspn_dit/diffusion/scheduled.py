"""The noise schedule and target of a diffusers pipeline, for models that are trained as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion.objective import Denoiser, Objective
from gspn_dit.errors import UserError

SCHEDULE_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)


class ScheduledObjective(Objective):
    """Mean squared error of epsilon or v at a discrete timestep of a schedule of betas (DDPM, arXiv 2006.11239).

    Args:
        config: times; timestep_sampling and timestep_shift apply to t = (timestep + 1/2) / num_train_timesteps.
        schedule: the config of a diffusers scheduler.

    Raises:
        UserError: a schedule that predicts neither epsilon nor v.
    """

    samplers = ("ddim", "dpm++", "unipc")

    def __init__(self, config: ObjectiveConfig, schedule: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        super().__init__(config)
        self.schedule = {key: schedule[key] for key in SCHEDULE_KEYS if schedule.get(key) is not None}
        self.prediction_type = self.schedule.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"a schedule that predicts '{self.prediction_type}' cannot be trained; epsilon and v can")
        self._noise: Any = DDPMScheduler(**self.schedule)
        self._count = int(self.schedule.get("num_train_timesteps", 1000))

    def out_channels(self, latent_channels: int) -> int:
        return latent_channels

    def timesteps(self, uniforms: Tensor) -> Tensor:
        """Map uniforms to 0 … num_train_timesteps - 1, int64."""
        return (self.times(uniforms) * self._count).long().clamp(0, self._count - 1)

    def loss(self, denoise: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the mean over channels and pixels of (denoise(x_t) - target)², [B]."""
        noisy = self._noise.add_noise(latents, noise, timesteps)
        target = noise if self.prediction_type == "epsilon" else self._noise.get_velocity(latents, noise, timesteps)
        return (denoise(noisy, timesteps).to(latents.dtype) - target).square().flatten(1).mean(dim=1)

    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return diffusers' DDIM, DPM-Solver++ or UniPC on evenly spaced timesteps."""
        import diffusers

        names = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
        clip = {"clip_sample": False} if sampler == "ddim" else {}
        scheduler = getattr(diffusers, names[sampler])(**self.schedule, timestep_spacing="trailing", **clip)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        return output, None

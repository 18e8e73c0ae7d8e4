"""diffusers' DDPM sampler, with its noise handed in and none in its last step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor


class AncestralScheduler(DDPMScheduler):
    """`DDPMScheduler` of a learned range of variances, whose steps take their noise as an argument.

    The base class draws it from torch's generators, whose seeds keep 32 bits on a CPU, and adds it wherever the
    timestep is above 0: a single step, from timestep 999, would end in noise.
    """

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, noise: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return x at the next timestep: the base class's mean, and but for the last step `noise` times the deviation.

        Args:
            model_output: epsilon and the variance values, [B, 2C, H, W].
            timestep: one of `timesteps`.
            sample: [B, C, H, W].
            noise: standard normal, [B, C, H, W].
            return_dict: False, the one answer there is.
        """
        now = int(timestep)
        mean = super().step(model_output, now, sample, generator=torch.Generator(), return_dict=False)[0]
        if int(self.previous_timestep(now)) < 0:
            return (mean,)
        values = model_output.chunk(2, dim=1)[1]
        log_variance = super()._get_variance(now, predicted_variance=values)
        return (mean + torch.exp(log_variance / 2) * noise,)

    def _get_variance(self, *_: Any, **__: Any) -> Tensor:
        """Return the logarithm of 0, so that the base class adds nothing of the noise that it draws itself."""
        return torch.tensor(-torch.inf)

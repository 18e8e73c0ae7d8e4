"""Mean flows (arXiv 2505.13447): one- and few-step generation by the derivative of the model along the path."""

from __future__ import annotations

import torch
from torch import Tensor

from gspn_dit.diffusion.few_step import (
    WEIGHT_FLOOR,
    FewStepObjective,
    logit_normal,
    mean_velocity,
    pair_rows,
)
from gspn_dit.diffusion.objective import TIMESTEP_SCALE, Conditioned

HALF_WIDTH = 0.005
"""Of the interval of times over which a central difference is taken."""


class MeanFlowObjective(FewStepObjective):
    """F(x_t, t, s) learns g - (t - s)·dF/dt, the derivative along the guided velocity g with s held fixed."""

    guidance_scale = 2.0
    guidance_mix = 0.5

    def velocity_time(self, first: Tensor, second: Tensor) -> Tensor:
        return self.published_pair(first, second)[0]

    def published_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The larger and the smaller of two draws."""
        draws = logit_normal(torch.stack([first, second]), -0.4, 1.0)
        return draws.amax(dim=0), draws.amin(dim=0)

    def training_loss(
        self, denoise: Conditioned, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> dict[str, Tensor]:
        """Return "loss" S / (S + 0.01), the divisor without gradient, and "error", S over the number of values; [B].

        S is the sum of the squares of F - target.
        """
        rows = pair_rows(timesteps, latents.device)
        t, s = (timesteps.to(latents) / TIMESTEP_SCALE)[:, :, None, None, None].unbind(dim=1)
        noisy, predicted, target = self.predict(denoise, latents, noise, t, s, rows)
        with torch.no_grad():
            derive = exact_derivative if self.config.derivative == "jvp" else central_difference
            change = derive(denoise[rows], noisy[rows], target[rows], t[rows], s[rows])
            target[rows] -= (t[rows] - s[rows]) * change
        squares = (predicted - target).square().flatten(1)
        total = squares.sum(dim=1)
        return {"loss": total / (total.detach() + WEIGHT_FLOOR), "error": squares.detach().mean(dim=1)}


def central_difference(denoise: Conditioned, noisy: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return dF(x_t, t, s)/dt along `velocity`, [B, C, H, W], by a difference that is one-sided where s or 1 is near.

    noisy and velocity are [B, C, H, W], t and s [B, 1, 1, 1] with s < t.
    """
    later, earlier = (t + HALF_WIDTH).clamp(max=1), torch.maximum(t - HALF_WIDTH, s)
    ahead, behind = (mean_velocity(denoise, noisy + (time - t) * velocity, time, s) for time in (later, earlier))
    return (ahead - behind) / (later - earlier)


def exact_derivative(denoise: Conditioned, noisy: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return dF(x_t, t, s)/dt along `velocity`, [B, C, H, W], in forward mode through the whole model.

    noisy and velocity are [B, C, H, W], t and s [B, 1, 1, 1]. Raises NotImplementedError where the scan has no
    forward mode: on other devices than CPUs, and under torch.compile.
    """

    def along(latents: Tensor, time: Tensor) -> Tensor:
        return mean_velocity(denoise, latents, time, s)

    return torch.func.jvp(along, (noisy, t), (velocity, torch.ones_like(t)))[1]

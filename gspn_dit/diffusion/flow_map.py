"""Solution flow maps (SoFlow, arXiv 2512.15657): one- and few-step generation without derivatives of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from gspn_dit.diffusion.few_step import (
    LEAST_SPAN,
    WEIGHT_FLOOR,
    FewStepObjective,
    logit_normal,
    mean_velocity,
    pair_rows,
)
from gspn_dit.diffusion.objective import TIMESTEP_SCALE, Conditioned

FIRST_STEP = 0.1
"""How far l lies from t towards s, relative to their distance, at the start of a training."""
GUIDED_BELOW = 0.8
"""Guidance fades out above this time, where v says little of the class."""


class FlowMapObjective(FewStepObjective):
    """Three quarters learn the guided velocity; the others that a small step towards s does not change where s lies.

    Of the latter, f(x_t, t, s) = f(x_l, l, s) with x_l = x_t + (l - t)·g and l between s and t.
    """

    guidance_scale = 3.0
    guidance_mix = 0.25

    def velocity_time(self, first: Tensor, second: Tensor) -> Tensor:
        return logit_normal(first, -0.2, 1.0)

    def published_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return logit_normal(first, 0.2, 0.8), logit_normal(second, -1.0, 0.8)

    def learnt_times(self, t: Tensor, s: Tensor, progress: Tensor) -> Tensor:
        """Return t, s and l, [B, 3]; l falls from t towards s by less and less as training goes on."""
        step = FIRST_STEP * (self.config.final_step / FIRST_STEP) ** progress
        return torch.stack([t, s, torch.minimum(t + step * (s - t), t - LEAST_SPAN)], dim=1)

    def guidance_strength(self, t: Tensor) -> Tensor:
        """Return 1 up to t = 0.8, then 1 - exp(-0.025·a / (1 - a)) with a = (1 - t) / 0.2, which is 0 for noise."""
        a = ((1 - t) / (1 - GUIDED_BELOW)).clamp(0, 1)
        return torch.where(a >= 1, 1.0, -torch.expm1(-0.025 * a / (1 - a).clamp(min=1e-12)))

    def training_loss(
        self, denoise: Conditioned, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> dict[str, Tensor]:
        """Return "loss" and "error", [B]: of a velocity δ / (δ + 0.01) and δ, of a pair -mean(F·D) / (δ + 0.01) and δ.

        δ is the mean square of what is to vanish: of F - g, or of D = (f(x_t, t, s) - f(x_l, l, s)) / (t - l).
        Targets, D and divisors are without gradient; that of -F·D is that of the difference squared, over |s - t|.
        """
        rows = pair_rows(timesteps, latents.device)
        t, s, middle = (timesteps.to(latents) / TIMESTEP_SCALE)[:, :, None, None, None].unbind(dim=1)
        noisy, predicted, target = self.predict(denoise, latents, noise, t, s, rows)
        with torch.no_grad():
            drift = map_drift(
                denoise[rows], noisy[rows], target[rows], t[rows], s[rows], middle[rows], predicted.detach()[rows]
            )
        of_velocities = (predicted - target).square().flatten(1).mean(dim=1)
        error = of_velocities.detach().index_put((rows,), drift.square().flatten(1).mean(dim=1))
        minimised = of_velocities.index_put((rows,), -(predicted[rows] * drift).flatten(1).mean(dim=1))
        return {"loss": minimised / (error + WEIGHT_FLOOR), "error": error}


def map_drift(
    denoise: Conditioned, noisy: Tensor, velocity: Tensor, t: Tensor, s: Tensor, middle: Tensor, predicted: Tensor
) -> Tensor:
    """Return D = (f(x_t, t, s) - f(x_l, l, s)) / (t - l), which is 0 for the flow map as l nears t, [B, C, H, W].

    Args:
        denoise: asked for F(x_l, l, s).
        noisy: x_t, [B, C, H, W].
        velocity: of the step from x_t to x_l, [B, C, H, W].
        t, s, middle: t, s and l, [B, 1, 1, 1], s ≤ l < t.
        predicted: F(x_t, t, s).
    """
    moved = noisy + (middle - t) * velocity
    behind = moved + (s - middle) * mean_velocity(denoise, moved, middle, s)
    return (noisy + (s - t) * predicted - behind) / (t - middle)

"""What the objectives of few-step generation share: two times, a guided target, and steps of mean velocities.

A model F(x, t, s) says the mean velocity of the path from time t to s, so that f(x, t, s) = x + (s - t)·F(x, t, s) is
the flow map: one call leads from t to s, and from noise to data for t = 1, s = 0. F(x, t, t) is the velocity.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion.objective import TIMESTEP_SCALE, Conditioned
from gspn_dit.diffusion.velocity import VelocityObjective
from gspn_dit.errors import UserError

LEAST_SPAN = 1e-4
"""The shortest step that is learnt."""
WEIGHT_FLOOR = 0.01
"""Added to the square by which a loss is divided (adaptive weights)."""

_OWN_TIMES = {"timestep_sampling": ("uniform",), "timestep_shift": (None, 1.0)}


class FewStepObjective(VelocityObjective):
    """Learns mean velocities; `loss`, by which it is validated, is the velocity objective's, of F(x, t, t).

    Raises UserError for distributions of times other than the published ones.
    """

    samplers = ("euler",)
    stochastic_samplers: tuple[str, ...] = ()
    second_time = True
    shifts_by_size = False
    uniforms = 3
    guidance_scale: float
    """As published; the config can say another."""
    guidance_mix: float

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        for key, allowed in _OWN_TIMES.items():
            if getattr(config, key) not in allowed:
                raise UserError(
                    f"objective.{key} is {getattr(config, key)}, but {config.name} draws its times as published; "
                    "leave it out"
                )
        if config.guidance_scale is not None:
            self.guidance_scale = config.guidance_scale
        if config.guidance_mix is not None:
            self.guidance_mix = config.guidance_mix

    def training_timesteps(self, uniforms: Tensor, progress: Tensor) -> Tensor:
        """Return 1000·(t, s, …), float64 [B, n]; a share of the samples learns a step, the others, s = t, the velocity.

        Steps are of `LEAST_SPAN` at least.
        """
        which, first, second = uniforms.double().unbind(dim=1)
        draw_pair = self.published_pair if self.config.pair_times == "published" else uniform_pair
        t, s = draw_pair(first, second)
        t = t.clamp(min=LEAST_SPAN)
        pairs = self.learnt_times(t, torch.minimum(s, t - LEAST_SPAN), progress.double())
        alone = self.velocity_time(first, second)[:, None].expand_as(pairs)
        return TIMESTEP_SCALE * torch.where(which[:, None] < self.config.pair_share, pairs, alone)

    @abstractmethod
    def velocity_time(self, first: Tensor, second: Tensor) -> Tensor:
        """Map two uniform draws [B] to the time of a velocity, [B]."""

    @abstractmethod
    def published_pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Map two uniform draws [B] to t and s, [B], of a step."""

    def learnt_times(self, t: Tensor, s: Tensor, progress: Tensor) -> Tensor:
        """Return the times that a step is learnt by, [B, n]: t, s, and perhaps more."""
        return torch.stack([t, s], dim=1)

    def guidance_strength(self, t: Tensor) -> Tensor:
        """Return by how much of it guidance acts at times t, in [0, 1]."""
        return torch.ones_like(t)

    def predict(
        self, denoise: Conditioned, latents: Tensor, noise: Tensor, t: Tensor, s: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, F(x_t, t, s) and, without gradient, the guided velocity at t, each [B, C, H, W].

        t and s are [B, 1, 1, 1]; rows are those with s < t, of which the model is asked for F(x_t, t, t), too.
        """
        noisy = (1 - t) * latents + t * noise
        predicted = mean_velocity(denoise, noisy, t, s)
        with torch.no_grad():
            own = predicted.detach().clone()
            own[rows] = mean_velocity(denoise[rows], noisy[rows], t[rows], t[rows])
            return noisy, predicted, self.guided_target(denoise, noisy, t, noise - latents, own)

    def guided_target(self, denoise: Conditioned, noisy: Tensor, t: Tensor, velocity: Tensor, own: Tensor) -> Tensor:
        """Return g = m·(v + (w - 1)·d(t)·(v - F_∅)) + (1 - m)·F_c; v for samples without a class.

        At its fixed point F_c is v guided by the scale w. In the terms of MeanFlow (arXiv 2505.13447, eq. 21) m·w is
        its ω, and 1 - m its κ.

        Args:
            denoise: asked for F_∅ = F(x_t, t, t) without a class.
            noisy: x_t, [B, C, H, W].
            t: [B, 1, 1, 1].
            velocity: v = ε - x₀.
            own: F_c = F(x_t, t, t), without gradient.
        """
        scale, mix = self.guidance_scale, self.guidance_mix
        target = mix * velocity + (1 - mix) * own
        if scale != 1:
            away = velocity - mean_velocity(denoise.without_class(), noisy, t, t)
            target = target + mix * (scale - 1) * self.guidance_strength(t) * away
        return torch.where(denoise.has_class[:, None, None, None], target, velocity)


def mean_velocity(denoise: Conditioned, latents: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return F(x, t, s) in the latents' dtype; latents [B, C, H, W], t and s [B, 1, 1, 1] in [0, 1]."""
    timesteps, spans = (TIMESTEP_SCALE * times.flatten() for times in (t, t - s))
    return denoise(latents, timesteps, spans).to(latents.dtype)


def pair_rows(timesteps: Tensor, device: torch.device) -> Tensor:
    """Return which rows have s < t, int64 [n]; found on the CPU, so that no device is waited for."""
    return torch.nonzero(timesteps[:, 0] > timesteps[:, 1]).flatten().to(device)


def uniform_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Map uniform draws [B] to t, uniform in [0, 1), and s, uniform in [0, t)."""
    return first, second * first


def logit_normal(uniforms: Tensor, mean: float, std: float) -> Tensor:
    """Map uniform draws in [0, 1) to sigmoid(mean + std·n), n standard normal."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniforms))

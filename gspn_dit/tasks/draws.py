"""Everything random in a training step, drawn by sample number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.diffusion import Objective

QUARTILES = 4
"""Of t, by which the validation loss is told apart; the first is nearly clean."""


@dataclass(frozen=True)
class Draws:
    """Noise [B, C, H, W], timesteps [B] in [0, 1000], labels [B] after dropout, keep_mask [layers, B] or None.

    Timesteps of training are what the objective makes of them: [B, n] where it has several times.
    """

    noise: Tensor
    timesteps: Tensor
    class_labels: Tensor
    keep_mask: Tensor | None


def training_draws(
    seed: int,
    numbers: Sequence[int],
    latents: Tensor,
    class_labels: Tensor,
    objective: Objective,
    class_dropout: float,
    null_label: int,
    drop_path_rates: Sequence[float],
    samples: int = 1,
) -> Draws:
    """Draw for sample numbers of a run of so many samples; row i is a function of (seed, numbers[i]) and the rest."""
    uniforms = rng.uniform(seed, rng.Stream.TIMESTEP, numbers, (objective.uniforms,))
    progress = torch.tensor(list(numbers), dtype=torch.float64) / samples
    dropped = rng.uniform(seed, rng.Stream.LABEL_DROPOUT, numbers) < class_dropout
    rates = torch.tensor(drop_path_rates)
    keep_mask = None
    if rates.any():
        keep_mask = (rng.uniform(seed, rng.Stream.STOCHASTIC_DEPTH, numbers, rates.shape) >= rates).T
    return Draws(
        noise=rng.normal(seed, rng.Stream.NOISE, numbers, latents.shape[1:]),
        timesteps=objective.training_timesteps(uniforms, progress),
        class_labels=torch.where(dropped, null_label, class_labels),
        keep_mask=keep_mask,
    )


def validation_draws(
    seed: int, indices: Sequence[int], count: int, latents: Tensor, class_labels: Tensor, objective: Objective
) -> Draws:
    """Draw for validation images by index: fixed noise, and times stratified over the `count` images."""
    jitter = rng.uniform(seed, rng.Stream.VALIDATION_TIMESTEP, indices)
    # A stride that is coprime to the count spreads neighbouring images, often of one class, over all times.
    stride = next(
        s for s in range(int(0.618 * count) + 1, 2 * count + 2) if torch.tensor(s).gcd(torch.tensor(count)) == 1
    )
    strata = (torch.tensor(list(indices), dtype=torch.int64) * stride) % count
    return Draws(
        noise=rng.normal(seed, rng.Stream.VALIDATION_NOISE, indices, latents.shape[1:]),
        timesteps=objective.timesteps((strata + jitter) / count),
        class_labels=class_labels,
        keep_mask=None,
    )


def by_quartile(losses: Tensor, timesteps: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sum and count of the losses [B] as "val_loss", and by quartile of t (timesteps [B] in [0, 1000])."""
    losses = losses.double().cpu()
    quartiles = (timesteps * QUARTILES / 1000).long().clamp(0, QUARTILES - 1)
    members = {"val_loss": torch.ones_like(quartiles)}
    members |= {f"val_loss_q{number + 1}": (quartiles == number).long() for number in range(QUARTILES)}
    return {name: ((losses * chosen).sum(), chosen.sum()) for name, chosen in members.items()}

"""Moving averages of the weights: the exponential one, and power-function profiles that can be recombined afterwards.

    python -m gspn_dit.training.ema --sigma-rel 0.1 RUN

writes the weights that an average of this relative length would have had (arXiv 2312.02696, section 3.2).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

MAX_SIGMA_REL = 0.28
"""Relative lengths stay below 12^-1/2, that of the plain mean of all steps."""


def _local_weights(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of each parameter, without gradient; views, so they can be written."""
    detached = (parameter.detach() for parameter in parameters)
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in detached]


class EMA(Generic[Model]):
    """Keeps a copy of a model whose weights follow it: ema += (1 - d) · (weights - ema).

    The decay d is min(decay, (1 + updates) / (10 + updates)), so that an average of a short run forgets its start.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        """Optimiser steps seen, skipped ones included."""

    @torch.no_grad()
    def update(self, model: nn.Module, took_step: Tensor) -> None:
        """Follow `model`; `took_step` is a 0-d float tensor, 0 where the optimiser step was skipped."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, weights = (_local_weights(module.parameters()) for module in (self.model, model))
        difference = list(torch._foreach_sub(weights, averages))
        torch._foreach_mul_(difference, (1 - decay) * took_step)
        torch._foreach_add_(averages, difference)


class PowerEMA:
    """An average whose profile is a power of time: weights of step τ count as τ^γ (arXiv 2312.02696, section 3.1).

    After update t: ema ← β·ema + (1-β)·weights with β = (1 - 1/t)^(γ+1). The first update replaces the start.
    A skipped step counts with the weights it left as they were.

    Args:
        named_parameters: what to follow; its names are those of `tensors`.
        sigma_rel: standard deviation of the profile, relative to the length of the run.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], sigma_rel: float) -> None:
        self.sigma_rel = sigma_rel
        self.exponent = power_exponent(sigma_rel)
        self.tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in named_parameters}
        """The average, sharded as the weights are."""

    @property
    def name(self) -> str:
        """Stem of its file: "ema-0.050"."""
        return ema_file_stem(self.sigma_rel)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Follow `model`; `updates` counts this update, so it is 1 at the first."""
        weight = 1 - (1 - 1 / updates) ** (self.exponent + 1)
        torch._foreach_lerp_(_local_weights(self.tensors.values()), _local_weights(model.parameters()), weight)


def ema_file_stem(sigma_rel: float) -> str:
    """Return the name of the file of an average of this relative length, without suffix."""
    return f"ema-{sigma_rel:.3f}"


def power_exponent(sigma_rel: float) -> float:
    """Return the exponent γ of the profile with this relative standard deviation (arXiv 2312.02696, appendix C).

    σ_rel = (γ+1)^½ (γ+2)^-1 (γ+3)^-½, which is the largest real root of a cubic in γ.
    """
    inverse_square = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def profile_products(times: Sequence[float], exponents: Sequence[float], time: float, exponent: float) -> np.ndarray:
    """Return the inner products of profiles with one other: ∫ p_i(τ) p(τ) dτ, where p(τ) = (γ+1) τ^γ / t^(γ+1)."""
    t, g = np.asarray(times, dtype=np.float64), np.asarray(exponents, dtype=np.float64)
    shorter = np.minimum(t, time)
    ratio = (shorter / t) ** g * (shorter / time) ** exponent * shorter / (t * time)
    return (g + 1) * (exponent + 1) / (g + exponent + 1) * ratio


def reconstruction_weights(
    times: Sequence[float], exponents: Sequence[float], time: float, exponent: float
) -> tuple[np.ndarray, float]:
    """Return how to add up snapshots to come closest to another profile, in the least squares of profiles.

    The weights sum to 1, so that what did not change in training does not change here.

    Args:
        times: updates at which each snapshot was taken.
        exponents: γ of each snapshot.
        time, exponent: the profile that is wanted.

    Returns:
        Float64 weights, one per snapshot, and the relative error ‖fit - wanted‖ / ‖wanted‖ of the profile.
    """
    pairs = list(zip(times, exponents, strict=True))
    gram = np.stack([profile_products(times, exponents, t, g) for t, g in pairs])
    wanted = profile_products(times, exponents, time, exponent)
    # Snapshots that lie close together make the system stiff: scaled to unit profiles it is solved to full precision.
    scale = np.sqrt(np.diag(gram))
    sides = np.stack([wanted, np.ones_like(wanted)], axis=1) / scale[:, None]
    fit, ones = np.linalg.lstsq(gram / np.outer(scale, scale), sides, rcond=None)[0].T / scale
    weights = fit + ones * (1 - fit.sum()) / ones.sum()  # the nearest fit that leaves constant weights as they are
    norm = float(profile_products([time], [exponent], time, exponent)[0])
    residual = norm - 2 * weights @ wanted + weights @ gram @ weights
    return weights, float(np.sqrt(max(residual, 0.0) / norm))


def combine(snapshots: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return Σ weight · tensors by name, added up in float64 and rounded to float32; one snapshot is held at a time."""
    total: dict[str, Tensor] = {}
    for weight, tensors in snapshots:
        for name, tensor in tensors.items():
            total.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64)).add_(tensor.double(), alpha=weight)
    return {name: tensor.float() for name, tensor in total.items()}


if __name__ == "__main__":
    from gspn_dit.errors import run_cli
    from gspn_dit.training.post_hoc_ema import main

    run_cli(main)

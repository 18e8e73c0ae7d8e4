"""Averages of the weights that training keeps: the exponential one, and power-function profiles (post-hoc EMA).

    python -m gspn_dit.training.ema --sigma-rel 0.1 RUN

writes the average of another length that the snapshots of a run add up to, see `post_hoc_ema`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from gspn_dit.errors import run_cli
from gspn_dit.training.post_hoc_ema import ema_file_stem, main, power_exponent

Model = TypeVar("Model", bound=nn.Module)


def _local_weights(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of each parameter, without gradient; views, so they can be written."""
    detached = (parameter.detach() for parameter in parameters)
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in detached]


class EMA(Generic[Model]):
    """Keeps a copy of a model whose weights follow it: ema += (1 - d) · (weights - ema); buffers are the model's own.

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
        for buffer, value in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)  # such as running statistics, which are averages already


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


if __name__ == "__main__":
    run_cli(main)

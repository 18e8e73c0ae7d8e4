"""The exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


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
        averages, weights = ([p.detach() for p in module.parameters()] for module in (self.model, model))
        difference = list(torch._foreach_sub(weights, averages))
        torch._foreach_mul_(difference, (1 - decay) * took_step)
        torch._foreach_add_(averages, difference)

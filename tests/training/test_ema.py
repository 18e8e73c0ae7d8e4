"""The moving average, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gspn_dit.training.ema import EMA


def model_at(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_average_follows_by_the_warmed_up_decay() -> None:
    model = model_at(0.0)
    ema = EMA(model, decay=0.15)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model, torch.tensor(1.0))  # decay (1 + 0) / (10 + 0) = 0.1
    assert ema.model.weight.item() == pytest.approx(0.9)
    ema.update(model, torch.tensor(1.0))  # (1 + 1) / (10 + 1) = 0.18 is above 0.15
    assert ema.model.weight.item() == pytest.approx(0.9 + 0.85 * 0.1)
    assert ema.updates == 2


def test_skipped_step_does_not_move_it() -> None:
    model = model_at(0.0)
    ema = EMA(model, decay=0.9)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model, torch.tensor(0.0))
    assert ema.model.weight.item() == 0.0


def test_it_is_a_copy_without_gradients_in_eval_mode() -> None:
    model = model_at(0.0)
    ema = EMA(model, decay=0.9)
    assert not ema.model.training and not ema.model.weight.requires_grad
    assert ema.model.weight.data_ptr() != model.weight.data_ptr()
    assert model.training and model.weight.requires_grad

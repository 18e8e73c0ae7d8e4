"""Learning rate by step, clipping, and steps that are skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gspn_dit.config import TrainingConfig
from gspn_dit.training.optimizer import (
    create_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_step,
    optimizer_tensors,
)


def test_learning_rate_warms_up_then_stays_or_falls_to_zero() -> None:
    constant = TrainingConfig(max_steps=12, learning_rate=0.8, warmup_steps=4)
    assert [learning_rate(constant, step) for step in (0, 1, 3, 4, 11)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])
    cosine = TrainingConfig(max_steps=12, learning_rate=0.8, warmup_steps=4, learning_rate_schedule="cosine")
    assert [learning_rate(cosine, step) for step in (0, 4, 8, 12)] == pytest.approx([0.2, 0.8, 0.4, 0.0])
    assert learning_rate(TrainingConfig(learning_rate=0.3), 0) == 0.3


def test_first_step_of_adamw_by_hand_and_norm_before_clipping() -> None:
    """With bias correction Adam's first step is lr · sign(gradient), whatever clipping made of it."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = create_optimizer(model, TrainingConfig(weight_decay=0.5))
    model.weight.grad = torch.tensor([[3.0, -4.0]])
    norm, took_step = optimizer_step(optimizer, model, rate=0.1, max_grad_norm=1.0)
    assert norm.item() == pytest.approx(5.0) and took_step.item() == 1.0
    torch.testing.assert_close(model.weight.data, torch.tensor([[0.95 - 0.1, 0.95 + 0.1]]))
    state = optimizer_tensors(optimizer, model)
    torch.testing.assert_close(state["weight.exp_avg"], 0.1 * torch.tensor([[0.6, -0.8]]), atol=1e-6, rtol=1e-5)
    assert model.weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_leaves_weights_and_state_as_they_are(bad: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = create_optimizer(model, TrainingConfig())
    model.weight.grad = torch.ones(1, 2)
    optimizer_step(optimizer, model, 0.1, 1.0)
    weight, state = (
        model.weight.detach().clone(),
        {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()},
    )
    model.weight.grad = torch.tensor([[1.0, bad]])
    _, took_step = optimizer_step(optimizer, model, 0.1, 1.0)
    assert took_step.item() == 0.0
    assert torch.equal(model.weight, weight)
    after = optimizer_tensors(optimizer, model)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_state_round_trip_continues_bit_for_bit() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    settings = TrainingConfig(weight_decay=0.1)
    one, two = create_optimizer(first, settings), create_optimizer(second, settings)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer_step(optimizer, model, 0.1, 1.0)

    for seed in range(3):
        step(first, one, seed)
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(two, second, {name: t.clone() for name, t in optimizer_tensors(one, first).items()})
    step(first, one, 9)
    step(second, two, 9)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert optimizer_tensors(two, second)["weight.step"].item() == 4

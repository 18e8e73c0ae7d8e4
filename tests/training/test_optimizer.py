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
    parameter_groups,
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


class Stacked(nn.Module):
    """A stem, three blocks with something between two of them, and a head; all parameters have a norm's two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.first = nn.Linear(2, 2)
        self.between = nn.Linear(2, 2)
        self.others = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.head = nn.Linear(2, 2)

    def no_weight_decay(self) -> set[str]:
        return {"stem.weight"}

    def blocks(self) -> list[nn.Module]:
        return [self.first, *self.others]


def test_the_schedule_starts_and_ends_where_it_is_told() -> None:
    settings = TrainingConfig(
        max_steps=14, learning_rate=1.0, warmup_steps=4, initial_learning_rate=0.2, final_learning_rate=0.1,
        learning_rate_schedule="cosine",
    )  # fmt: skip
    assert [learning_rate(settings, step) for step in (0, 3, 4, 9, 14)] == pytest.approx([0.4, 1.0, 1.0, 0.55, 0.1])


def test_layers_learn_slower_towards_the_input_and_vectors_are_not_decayed() -> None:
    """Three blocks: the head is layer 4 at the full rate, the stem is layer 0 at half of that four times over."""
    model = Stacked()
    settings = TrainingConfig(weight_decay=0.5, decay_vectors=False, layer_decay=0.5)
    groups = parameter_groups(model, settings, model.blocks())
    found = {id(p): (group["rate_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    scales = {"stem": 1 / 16, "first": 1 / 8, "between": 1 / 8, "others.0": 1 / 4, "others.1": 1 / 2, "head": 1.0}
    for name, parameter in model.named_parameters():
        part, _, kind = name.rpartition(".")
        decay = 0.5 if kind == "weight" and part != "stem" else 0.0
        assert found[id(parameter)] == (scales[part], decay), name
    assert len(parameter_groups(model, TrainingConfig(weight_decay=0.5))) == 1


def test_groups_step_by_their_own_rate_and_decay_and_survive_a_round_trip() -> None:
    model, settings = Stacked(), TrainingConfig(weight_decay=0.5, decay_vectors=False, layer_decay=0.5)
    optimizer = create_optimizer(model, settings, model.blocks())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer_step(optimizer, model, 0.1, None)
    moved = dict(model.named_parameters())
    # Adam's first step is the rate, after the decay by rate · 0.5.
    torch.testing.assert_close(moved["head.weight"], before["head.weight"] * (1 - 0.05) - 0.1)
    torch.testing.assert_close(moved["head.bias"], before["head.bias"] - 0.1)
    torch.testing.assert_close(moved["stem.weight"], before["stem.weight"] - 0.1 / 16)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    assert set(saved) == {f"{name}.{key}" for name in before for key in ("step", "exp_avg", "exp_avg_sq")}
    saved["first.weight.exp_avg"] = torch.full((2, 2), 7.0)
    load_optimizer_tensors(optimizer, model, saved)
    assert torch.equal(optimizer.state[model.first.weight]["exp_avg"], torch.full((2, 2), 7.0))
    assert torch.equal(optimizer.state[model.head.bias]["exp_avg"], saved["head.bias.exp_avg"])

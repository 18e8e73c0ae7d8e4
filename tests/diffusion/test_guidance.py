"""Guidance by hand: the combination, where it acts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspn_dit.diffusion import Guidance


def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    """A conditional and an unconditional prediction of four channels and one pixel."""
    return torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1), torch.tensor([0.0, 4.0, 3.0, 8.0]).reshape(
        1, 4, 1, 1
    )


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(0.0, [0, 4, 3, 8]), (1.0, [1, 2, 3, 4]), (2.0, [2, 0, 3, 0]), (1.5, [1.5, 1, 3, 2])],
)
def test_combination_by_hand(scale: float, expected: list[float]) -> None:
    assert Guidance(scale).combine(*predictions()).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, [2, 2, 3, 4]), (3, [2, 0, 3, 4]), (4, [2, 0, 3, 0]), (None, [2, 0, 3, 0])]
)
def test_first_channels_alone(channels: int | None, expected: list[float]) -> None:
    """The channels that are not guided are those of the conditional prediction."""
    conditional, unconditional = predictions()
    assert Guidance(2.0, channels=channels).combine(conditional, unconditional).flatten().tolist() == expected
    assert torch.equal(conditional, predictions()[0])
    assert torch.equal(unconditional, predictions()[1])


@pytest.mark.parametrize(
    ("t", "acts"), [(0.0, False), (0.2999, False), (0.3, True), (0.5, True), (0.7, True), (0.7001, False), (1.0, False)]
)
def test_acts_inside_its_interval_ends_included(t: float, acts: bool) -> None:
    assert Guidance(2.0, (0.3, 0.7)).acts(t) == acts


def test_acts_everywhere_by_default() -> None:
    assert Guidance(2.0).acts(0.0) and Guidance(2.0).acts(1.0)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_scale_1_never_acts(t: float) -> None:
    assert not Guidance(1.0).acts(t)
    assert Guidance(0.0).acts(t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.7, 0.3)}, r"guidance interval is \[0.7, 0.3\], but must be within 0 ≤ low ≤ high ≤ 1"),
        ({"interval": (-0.1, 0.3)}, "guidance interval"),
        ({"interval": (0.0, 1.1)}, "guidance interval"),
        ({"interval": (float("nan"), 1.0)}, "guidance interval"),
        ({"scale": -0.5}, "guidance scale is -0.5, but must be at least 0 and finite"),
        ({"scale": float("inf")}, "guidance scale"),
        ({"scale": float("nan")}, "guidance scale"),
        ({"channels": 0}, "guidance channels is 0, but must be at least 1, or none for all"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**options)

"""Whole models in forward mode: the derivative along a path of images and times, as few-step objectives need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.models import DiffusionModel, create_model

MODELS: dict[str, dict[str, Any]] = {
    "GSPN": {"name": "GSPN-S/2", "hidden_size": 32, "depth": 2},
    "GSPN, shared weights, windows": {"name": "GSPN-N/2", "hidden_size": 32, "depth": 2, "weight_groups": 2},
    "DiT with scans": {"name": "DiT-S/2", "hidden_size": 32, "depth": 2, "num_heads": 2, "mixer": "gspn"},
}


def build(arguments: dict[str, Any]) -> DiffusionModel:
    model = create_model(num_classes=3, latent_channels=2, latent_size=6, **arguments).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def path(model: DiffusionModel) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The model as a function of latents and times, a point, and a direction."""
    generator = torch.Generator().manual_seed(1)
    latents, velocity = torch.randn(2, 2, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2])
    point = latents, torch.tensor([200.0, 700.0], dtype=torch.float64)
    return lambda x, t: model(x, t, labels), point, (velocity, torch.full((2,), 50.0, dtype=torch.float64))


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_equals_central_differences(arguments: dict[str, Any]) -> None:
    function, point, direction = path(build(arguments))
    y, dy = torch.func.jvp(function, point, direction)
    assert y.requires_grad  # the weights do
    with torch.no_grad():
        assert torch.allclose(y, function(*point), rtol=1e-10, atol=1e-10)
        step = 1e-6
        ahead, behind = (function(*(p + s * step * d for p, d in zip(point, direction))) for s in (1, -1))
    expected = (ahead - behind) / (2 * step)
    assert expected.abs().max() > 1e-2
    assert (dy - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_a_target_without_gradient_beside_a_loss_with_one(arguments: dict[str, Any]) -> None:
    """The use of mean flow: the tangent makes the target, gradients reach the weights through the values alone."""
    model = build(arguments)
    function, point, direction = path(model)
    with torch.no_grad():
        _, dy = torch.func.jvp(function, point, direction)
    (function(*point) - dy).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    y, dy = torch.func.jvp(function, point, direction)
    (y - dy.detach()).square().mean().backward()
    actual = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(expected) > 10
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

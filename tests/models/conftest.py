"""Small models whose output depends on everything they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gspn_dit.models import GSPNTransformer, create_model


def lively(model: torch.nn.Module, seed: int = 0) -> None:
    """Replace every parameter by draws large enough that each one shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)


@pytest.fixture
def build() -> Callable[..., GSPNTransformer]:
    """Build a GSPN-N/2 of width 16 and depth 4 over 2-channel latents with 3 classes, in float64, none of it zero."""

    def make(**options: Any) -> GSPNTransformer:
        arguments: dict[str, Any] = {"num_classes": 3, "latent_channels": 2, "latent_size": 8}
        arguments |= {"hidden_size": 16, "depth": 4, **options}
        model = create_model(arguments.pop("name", "GSPN-N/2"), **arguments).double()
        lively(model)
        return model

    return make

"""Activations keep one scale whatever the number of lines: branches at one, two and four times the training grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.pipeline import GSPNPipeline
from tests.training.conftest import changed, run_training, tiny_config

SIDES = (8, 16, 32)
"""Of the latents: 4, 8 and 16 tokens."""
BOUND = 1.5
SCAN = {"mixer": "gspn", "scan_norm": "layer", "channel_skip": True}
HOLDS: list[dict[str, Any]] = [
    {"name": "DiT-N/2", **SCAN},
    {"name": "GSPN2-N/2"},
    {"name": "DiT-N/2", **SCAN, "scan_norm": "rms"},
    {"name": "DiT-N/2", **SCAN, "scan_norm": "rms", "scan_norm_place": "directions"},
    {"name": "GSPN-N/2", **SCAN, "gate_norm": True, "mlp_ratio": 2.0, "lpu": True},
]


def branch_ratios(model: DiffusionModel, grain: int = 0) -> list[float]:
    """The largest over the smallest rms of each block's branch at the three sizes.

    The input is noise, or the same smooth picture at every size where a grain is given: so many values each way.
    """
    found: list[list[float]] = []
    for side in SIDES:
        scales: list[float] = []

        def note(block: nn.Module, given: tuple[Any, ...], output: Tensor, scales: list[float] = scales) -> None:
            scales.append(float((output - given[0]).square().mean().sqrt()))

        hooks = [block.register_forward_hook(note) for block in model.blocks]
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(4, model.in_channels, grain or side, grain or side, generator=generator)
        latents = nn.functional.interpolate(latents, (side, side), mode="bilinear")
        with torch.no_grad():
            model(latents, torch.full((4,), 500.0), torch.arange(4))
        for hook in hooks:
            hook.remove()
        found.append(scales)
    return [max(scales) / min(scales) for scales in zip(*found, strict=True)]


def created(options: dict[str, Any], seed: int) -> DiffusionModel:
    """A model as it starts, its gates of adaLN-Zero opened."""
    torch.manual_seed(seed)
    model = create_model(options["name"], 4, 2, 8, **{key: v for key, v in options.items() if key != "name"})
    if not options["name"].startswith("GSPN-"):
        for block in model.blocks:
            nn.init.normal_(block.modulation.bias, std=0.5)
    return model


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", HOLDS, ids=lambda options: " ".join(map(str, options.values())))
def test_branches_keep_their_scale(options: dict[str, Any], seed: int) -> None:
    assert max(branch_ratios(created(options, seed))) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("options", [HOLDS[0], HOLDS[1], HOLDS[-1]], ids=["DiT's block", "GSPN2", "U-shaped block"])
def test_trained_branches_keep_their_scale(options: dict[str, Any], tmp_path: Path) -> None:
    """On digits of 4×4 tokens, to a loss of about a third of the first one."""
    scan = {name: value for name, value in options.items() if name in SCAN and name != "mixer"}
    others = {name: value for name, value in options.items() if name not in scan}
    model = {**others, "lpu": True, "hidden_size": 32, "depth": 4, "mixer_options": scan}
    training = {"learning_rate": 0.008, "batch_size": 32, "checkpoint_every": 150}
    run_training(changed(tiny_config(tmp_path / "run", max_steps=150), model=model, training=training))
    trained = GSPNPipeline.from_checkpoint(tmp_path / "run").model
    assert max(branch_ratios(trained)) < BOUND
    assert max(branch_ratios(trained, grain=4)) < BOUND


@pytest.mark.parametrize(("name", "least"), [("DiT-N/2", 2.0), ("GSPN-N/2", 50.0)])
def test_without_a_norm_they_grow_with_the_lines(name: str, least: float) -> None:
    """The published block squares what the scan has summed; what the norms are for."""
    assert max(branch_ratios(created({"name": name, "mixer": "gspn"}, seed=0))) > least

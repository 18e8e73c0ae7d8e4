"""GSPN2 presets: DiT's blocks with scans, of the sizes of GSPN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gspn_dit.config import parse_train_arguments
from gspn_dit.models import GSPN2_PRESETS, DiT, create_model
from gspn_dit.models.mixers import ConvMixer
from gspn_dit.models.presets import GSPN2_BLOCK
from gspn_dit.models.scans import GSPNMixer, ScanMixer
from tests.models.conftest import lively


def on_meta(name: str, **options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(name, 1000, 4, 32, 8, **options)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", GSPN2_PRESETS)
def test_sizes_are_those_of_gspn(size: str) -> None:
    ours, published = (count(on_meta(f"{family}-{size}/2")) for family in ("GSPN2", "GSPN"))
    assert ours / published == pytest.approx(1, abs=0.02)


def test_blocks_are_what_was_chosen() -> None:
    model = on_meta("GSPN2-N/2")
    assert isinstance(model, DiT) and model.has_positions
    assert all(block.lpu is not None and block.gated for block in model.blocks)
    scans = [module for module in model.modules() if isinstance(module, GSPNMixer)]
    assert [scan.directions for scan in scans] == [("right", "down"), ("left", "up"), ("right", "down")]
    assert [type(block.mixer) for block in model.blocks] == 3 * [ScanMixer, ConvMixer]
    assert {scan.to_proxy.out_features for scan in scans} == {16}
    spelled = on_meta("DiT-N/2", **GSPN2_BLOCK, proxy_channels=16)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in spelled.named_parameters()}


def test_options_go_before_the_block() -> None:
    model = on_meta("GSPN2-N/2", lpu=False, scan_norm="rms", depth=2)
    assert len(model.blocks) == 2 and model.blocks[0].lpu is None
    assert {type(norm) for m in model.modules() if isinstance(m, GSPNMixer) for norm in m.norms} == {torch.nn.RMSNorm}


def test_proxy_follows_a_ratio_that_is_given() -> None:
    model = on_meta("GSPN2-N/2", proxy_ratio=8)
    assert {m.to_proxy.out_features for m in model.modules() if isinstance(m, GSPNMixer)} == {64 // 8}


def test_any_grid_is_drawn_and_its_gradients_are_finite() -> None:
    model = create_model("GSPN2-N/2", 4, 2, 8)
    lively(model)
    out = model(torch.randn(2, 2, 12, 6), torch.full((2,), 10.0), torch.tensor([0, 4]))
    assert out.shape == (2, 2, 12, 6)
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_config_may_name_it() -> None:
    model = parse_train_arguments(["--model.name", "GSPN2-T/2", "--model.mlp", "swiglu"]).config.model
    assert model.overrides() == {"mlp": "swiglu"}
    with pytest.raises(ValueError, match="long_skips is an option of GSPN models, but the model is GSPN2-T/2"):
        on_meta("GSPN2-T/2", long_skips=False)

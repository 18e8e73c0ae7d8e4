"""Multiply-adds: the published figure, the count of torch, the scan's formula, growth with the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.models.flops import attention_multiply_adds, forward_multiply_adds, scan_multiply_adds


def on_meta(name: str, **options: Any) -> DiffusionModel:
    with torch.device("meta"):
        return create_model(name, 1000, 4, 32, 8, **options)


def test_dit_xl_has_the_published_figure() -> None:
    assert forward_multiply_adds(on_meta("DiT-XL/2"), 32, 32) == pytest.approx(118.6e9, rel=0.002)


@pytest.mark.parametrize(("name", "published"), [("DiT-S/2", 6.06e9), ("DiT-B/2", 23.01e9), ("DiT-L/2", 80.71e9)])
def test_the_other_dits_have_the_published_figures(name: str, published: float) -> None:
    """Table 4 of arXiv 2212.09748."""
    assert forward_multiply_adds(on_meta(name), 32, 32) == pytest.approx(published, rel=0.01)


def scans(model: DiffusionModel, tokens: int) -> int:
    """The multiply-adds of the model's scans, which torch's counter does not know."""
    mixers = [module for module in model.modules() if hasattr(module, "merge_weight")]
    costs = (scan_multiply_adds(tokens, m.to_proxy.in_features, m.merge_weight.numel()) for m in mixers)
    skips = (tokens * m.to_skip.out_features for m in mixers if m.to_skip is not None)
    return sum(costs) + sum(skips)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiT-N/2", {"depth": 2}),
        ("DiT-N/2", {"depth": 2, "mixer": "gspn"}),
        ("DiT-N/2", {"depth": 1, "mixer": "gspn", "weight_groups": 4, "scan_skip": True}),
        ("DiT-N/2", {"depth": 1, "mixer": "conv", "lpu": True}),
        ("DiT-N/2", {"depth": 1, "mixer": "linear"}),
        ("GSPN-N/2", {"depth": 2, "hidden_size": 32}),
        ("GSPN-N/2", {"depth": 2, "scan_directions": ["up"], "long_skips": False, "conditioning": "adaln-zero"}),
    ],
)
def test_equals_half_of_what_torch_counts(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPN_SCAN_BACKEND", "reference")  # the fused operator hides its linear maps from the counter
    model = create_model(name, 10, 3, 16, 6, **options)
    # Torch counts attention as two matrix products, but not where a CPU kernel fuses them.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 16, 20), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    counted = counter.get_total_flops()
    assert counted % 2 == 0
    assert forward_multiply_adds(model, 16, 20) - scans(model, 80) == counted // 2


def test_scan_by_hand() -> None:
    """One direction over 2 tokens of 3 channels: 6 states of 3 neighbours, input gate, output gate and merge each."""
    assert scan_multiply_adds(2, 3, 1) == 6 * (3 + 1 + 1 + 1)
    assert scan_multiply_adds(2, 3) == 4 * scan_multiply_adds(2, 3, 1)


def test_attention_by_hand() -> None:
    """Two tokens, three channels: a 2 × 2 matrix of products of 3, and a 2 × 3 matrix of products of 2."""
    assert attention_multiply_adds(2, 3) == 2 * 2 * 3 + 2 * 3 * 2


def test_scans_grow_linearly_and_attention_does_not() -> None:
    def growth(**options: Any) -> float:
        model = on_meta("DiT-S/2", **options)
        return forward_multiply_adds(model, 256, 256) / forward_multiply_adds(model, 32, 32)

    assert 63 < growth(mixer="gspn") <= 64
    assert growth() > 200


def test_size_that_the_patch_does_not_divide() -> None:
    with pytest.raises(ValueError, match="a latent of 32×31 is not divisible by the patch size 2"):
        forward_multiply_adds(on_meta("DiT-S/2"), 32, 31)

"""The residual stream under autocast: float32 before and after every block, whatever the model and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gspn_dit.models import DIT_PRESETS, GSPN2_PRESETS, GSPN_PRESETS, DiffusionModel, create_model
from gspn_dit.models.mixers import MIXERS

WIDTH = 48
"""Of every model here: the presets' numbers of heads divide it, and dtypes do not depend on it."""

OPTIONS: list[dict[str, Any]] = [
    *({"name": f"GSPN-{size}/2"} for size in GSPN_PRESETS),
    *({"name": f"DiT-{size}/2"} for size in DIT_PRESETS),
    *({"name": f"GSPN2-{size}/2"} for size in GSPN2_PRESETS),
    {"name": "GSPN-N/2", "conditioning": "adaln-zero"},
    {"name": "GSPN-N/2", "conditioning": "adaln-zero", "long_skips": False},
    {"name": "GSPN-N/2", "long_skips": False},
    {"name": "GSPN-N/2", "weight_groups": 4, "scan_window": 2, "scan_directions": ["right", "up"]},
    {"name": "DiT-N/2", "positions": False},
    *({"name": "DiT-N/2", "mixer": mixer} for mixer in MIXERS),
    *({"name": "DiT-N/2", "mixer": mixer, "lpu": True} for mixer in MIXERS),
    {"name": "DiT-N/2", "mixer": "gspn", "scan_skip": True, "proxy_ratio": 8},
    {"name": "GSPN-N/2", "scan_skip": True, "proxy_channels": 5},
    {"name": "DiT-N/2", "mixer": "gspn", "positions": True},
    *({"name": "DiT-N/2", "mixer": "gspn", "scan_norm": norm, "channel_skip": True} for norm in ("layer", "rms")),
    {"name": "DiT-N/2", "mixer": "gspn", "scan_norm": "rms", "scan_norm_place": "directions", "scan_skip": True},
    {"name": "GSPN-N/2", "scan_norm": "layer", "scan_norm_place": "before", "gate_norm": True, "stem_conv": True},
    {"name": "GSPN-N/2", "lpu": True, "norm": "rms", "mlp_ratio": 1.5, "positions": True},
    {"name": "DiT-N/2", "mixer": "gspn", "weight_groups": 4, "scan_window": 2, "scan_directions": ["down"]},
]

Stream = list[tuple[Tensor, Tensor, Tensor]]


def small(name: str, **options: Any) -> DiffusionModel:
    torch.manual_seed(0)
    return create_model(name, 10, 4, 8, hidden_size=WIDTH, **options)


def stream(model: DiffusionModel, autocast: bool) -> Stream:
    """What each block takes, what its mixer gives, and what the block gives."""
    given: list[Tensor] = []
    mixed: list[Tensor] = []
    returned: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
        block.mixer.register_forward_hook(lambda _, arguments, output: mixed.append(output))
        block.register_forward_hook(lambda _, arguments, output: returned.append(output))
    latents = torch.randn(2, 4, 8, 8, dtype=model.patch_embed.weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(latents, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert len(given) == len(model.blocks)
    return list(zip(given, mixed, returned, strict=True))


def dtypes(model: DiffusionModel, autocast: bool) -> list[tuple[torch.dtype, ...]]:
    return [tuple(tensor.dtype for tensor in of_block) for of_block in stream(model, autocast)]


def name_of(options: dict[str, Any]) -> str:
    return " ".join(str(value) if key == "name" else f"{key}={value}" for key, value in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_blocks_take_and_give_float32_and_mix_in_bfloat16(options: dict[str, Any]) -> None:
    model = small(**options)
    assert dtypes(model, True) == [(torch.float32, torch.bfloat16, torch.float32)] * len(model.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["GSPN-N/2", "DiT-N/2"])
def test_without_autocast_the_stream_has_the_dtype_of_the_weights(name: str, dtype: torch.dtype) -> None:
    model = small(name, depth=2).to(dtype)
    assert dtypes(model, False) == [(dtype, dtype, dtype)] * len(model.blocks)


def test_branches_do_not_drown_in_the_stream() -> None:
    """At the start a branch is far smaller than bfloat16's spacing at its stream: a third of the values would stay."""
    for block, (before, _, after) in enumerate(stream(small("GSPN-N/2"), True)):
        assert (before == after).float().mean() < 0.01, block


def test_a_checkpointed_block_recomputes_the_same_stream() -> None:
    model = small("GSPN-N/2", depth=2)
    nn.init.normal_(model.output.linear.weight)
    arguments = (torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*arguments).float().square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))

"""Options of both families: stem, lpu, positions, MLP's width, some blocks with attention or global scans."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.config import ModelConfig
from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.models.attention import AttentionMixer
from gspn_dit.models.embeddings import sincos_positions
from gspn_dit.models.flops import forward_multiply_adds
from gspn_dit.models.gspn import GSPNBlock
from gspn_dit.models.mixers import ConvMixer
from gspn_dit.models.scans import GSPNMixer, ScanOptions
from gspn_dit.pipeline import GSPNPipeline
from tests.models.conftest import lively
from tests.models.test_dit import count, inputs
from tests.training.conftest import changed, run_training, tiny_config

Build = Callable[..., DiffusionModel]

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FAMILIES = ("DiT-N/2", "GSPN-N/2")
OF_BOTH: list[dict[str, Any]] = [
    {"stem_conv": True},
    {"lpu": True},
    {"positions": True},
    {"norm": "rms", "mlp_ratio": 1.5},
    {"attention_every": 2, "num_heads": 2, "scan_norm": "rms", "rotary": True},
    {"scan_global_every": 3, "scan_window": 2, "channel_skip": True},
    {"conv_every": 2, "scan_norm": "layer", "channel_gate": True},
]
OF_GSPN: list[dict[str, Any]] = [
    {"gate_norm": True},
    {"gate_norm": True, "norm": "rms", "mlp_ratio": 2.0, "conditioning": "adaln-zero"},
    *({"mixer": mixer, "num_heads": 2, "lpu": True} for mixer in ("attention", "linear", "neighbourhood")),
    {"mixer": "conv", "lpu": True, "positions": True},
]
CASES = [(family, options) for family in FAMILIES for options in OF_BOTH] + [("GSPN-N/2", o) for o in OF_GSPN]


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: "-".join(value))
def test_every_weight_has_a_gradient_and_any_size_will_do(build: Build, family: str, options: dict[str, Any]) -> None:
    model = build(name=family, **{"mixer": "gspn", **options})
    output = model(*inputs(4))
    output.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    latents = torch.randn(1, 2, 4, 12, dtype=torch.float64)
    assert model(latents, torch.tensor([500.0]).double(), torch.tensor([0])).shape == latents.shape


@pytest.mark.parametrize(
    ("family", "options", "more"),
    [  # width 16 and 4 blocks of DiT, 5 of GSPN
        ("DiT-N/2", {"stem_conv": True}, 9 * 16),
        ("GSPN-N/2", {"stem_conv": True}, 9 * 16),
        ("GSPN-N/2", {"lpu": True}, 5 * 9 * 16),
        ("GSPN-N/2", {"positions": True}, 0),
        ("GSPN-N/2", {"mlp_ratio": 1.5}, 5 * 2 * 16 * 24),
        ("GSPN-N/2", {"norm": "rms"}, -5 * 16),
        ("GSPN-N/2", {"gate_norm": True}, 5 * 2 * 16),
        ("DiT-N/2", {"mlp_ratio": 3.5}, -4 * (2 * 16 * 8 + 8)),
        ("DiT-N/2", {"mlp_ratio": 6.0, "mlp": "swiglu"}, 4 * (3 * 16 * 64 + 2 * 64 - (2 * 16 * 64 + 64))),
        # Attention: 4·16² + 4·16. The scan: two maps of 16² and 16, a proxy of 1 with 12·16 logits and 8·16 gates, 4.
        ("DiT-N/2", {"attention_every": 2, "num_heads": 2}, 2 * (4 * 256 + 64 - (2 * 272 + 16 + 320 + 4))),
        # Here the scan has one map, of 16² without bias, which attention does not get.
        ("GSPN-N/2", {"attention_every": 2, "num_heads": 2}, 2 * (4 * 256 + 64 - (256 + 16 + 320 + 4))),
        ("GSPN-N/2", {"scan_global_every": 2, "scan_window": 2}, 0),
    ],
)
def test_parameters_counted_by_hand(build: Build, family: str, options: dict[str, Any], more: int) -> None:
    plain = build(name=family, mixer="gspn")
    assert count(build(name=family, **{"mixer": "gspn", **options})) - count(plain) == more


def test_the_stem_adds_a_convolution_of_the_patches_and_positions_are_added_to_it(build: Build) -> None:
    plain, model = build(), build(stem_conv=True, positions=True)
    assert model.stem is not None
    model.patch_embed.load_state_dict(plain.patch_embed.state_dict())
    latents = inputs()[0]
    patches = plain.embed(latents)
    local = F.conv2d(patches.permute(0, 3, 1, 2), model.stem.weight, padding=1, groups=16).permute(0, 2, 3, 1)
    places = sincos_positions(torch.arange(4), torch.arange(4), 16)
    torch.testing.assert_close(model.embed(latents), patches + local + places, **EXACT)


def test_interpolated_positions_of_gspn_models_stay_in_the_training_grids_range() -> None:
    model = create_model("GSPN-N/2", 3, 2, 8, positions=True, interpolate_positions=True, depth=2)
    steps = torch.arange(8) / 2
    assert torch.equal(model.positions(8, 4), sincos_positions(steps, torch.arange(4), 96))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_gspn_block_with_all_of_them_by_its_formula(modulated: bool, norm: str) -> None:
    torch.manual_seed(0)
    block = GSPNBlock(16, None, modulated, lpu=True, norm=norm, mlp_ratio=1.5, gate_norm=True).double()
    lively(block)
    assert block.lpu is not None and block.expand is not None and block.contract is not None
    tokens, conditioning = torch.randn(2, 3, 4, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)

    def scaled(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def affine(x: Tensor, layer: nn.Module) -> Tensor:
        bias = layer.bias if norm == "layer" else 0.0
        return scaled(x) * layer.weight + bias

    local = tokens + block.lpu(tokens)
    gate: Any = 1.0
    if block.modulation is not None:
        shift, scale, gate = block.modulation(conditioning)
        normed = scaled(local) * (1 + scale) + shift
    else:
        normed = affine(local, block.norm)
    value = block.gate_conv(block.mixer_proj(block.mixer(block.local_conv(normed @ block.in_proj.weight.T))))
    value, hidden = affine(value, block.gate_norm), normed @ block.expand.weight.T
    branch = (value * value.relu()) @ block.out_proj.weight.T + (hidden * hidden.relu()) @ block.contract.weight.T
    output = block(tokens, None, conditioning if modulated else None)
    torch.testing.assert_close(output, local + gate * branch, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_blocks_have_attention_and_which_scans_no_window(build: Build, family: str) -> None:
    options = {"attention_every": 4, "num_heads": 2, "scan_global_every": 2, "scan_window": 2, "mixer": "gspn"}
    model = build(name=family, depth=8, **options)
    mixers = [getattr(block.mixer, "scan", block.mixer) for block in model.blocks]
    places = [number for number, mixer in enumerate(mixers, 1) if isinstance(mixer, AttentionMixer)]
    windows = {number: mixer.window for number, mixer in enumerate(mixers, 1) if isinstance(mixer, GSPNMixer)}
    assert places == [4, 8]
    assert {number for number, window in windows.items() if window is None} == {2, 6}
    assert set(windows.values()) == {2, None}


@pytest.mark.parametrize("options", [{}, {"conv_every": 2}, {"attention_every": 2, "num_heads": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_scan_goes_in_the_opposite_directions(build: Build, family: str, options: dict[str, Any]) -> None:
    options |= {"scan_directions": ["right", "down"], "scan_alternate": True, "mixer": "gspn"}
    model = build(name=family, depth=4, **options)
    scans = [module for module in model.modules() if isinstance(module, GSPNMixer)]
    turns = [("right", "down"), ("left", "up"), ("right", "down"), ("left", "up"), ("right", "down")]
    assert [scan.directions for scan in scans] == turns[: len(scans)] and len(scans) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_which_blocks_have_convolutions(build: Build, family: str) -> None:
    model = build(name=family, depth=6, mixer="gspn", conv_every=2, attention_every=3, num_heads=2)
    kinds = [type(getattr(block.mixer, "scan", block.mixer)) for block in model.blocks]
    assert kinds[:6] == [GSPNMixer, ConvMixer, AttentionMixer, ConvMixer, GSPNMixer, AttentionMixer]


def test_gate_of_channels_by_the_formula() -> None:
    torch.manual_seed(0)
    mixer = GSPNMixer(4, proxy_channels=2, channel_gate=True).double()
    mixer.initialise()
    tokens, gate = torch.randn(2, 3, 5, 4).double(), mixer.channel_gate
    scanned = mixer._scan(tokens)
    expected = scanned / (1 + torch.exp(-(scanned.mean((1, 2)) @ gate.weight.T + gate.bias)))[:, None, None]
    torch.testing.assert_close(mixer(tokens), expected, **EXACT)
    plain = GSPNMixer(4, proxy_channels=2)
    assert mixer.multiply_adds(3, 5) - plain.multiply_adds(3, 5) == 4 * 4  # once for an image


def test_a_token_reaches_every_other_in_two_blocks_that_alternate() -> None:
    torch.manual_seed(0)
    options = ScanOptions(scan_directions=("right", "down"), scan_alternate=True, proxy_channels=2)
    mixers = [options.of_scan(number).create(4) for number in (1, 2, 3)]
    for mixer in mixers:
        mixer.initialise()
    tokens = torch.randn(1, 3, 3, 4, requires_grad=True)

    def reached(depth: int) -> Tensor:
        """The tokens that the one in the middle depends on, [3, 3]."""
        mixed = functools.reduce(lambda value, mixer: value + mixer(value), mixers[:depth], tokens)
        (gradient,) = torch.autograd.grad(mixed[0, 1, 1].sum(), tokens)
        return gradient[0].abs().sum(-1) > 0

    assert reached(1).tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert reached(2).all()


def test_gspn_models_count_what_they_add() -> None:
    def cost(**options: Any) -> int:
        with torch.device("meta"):
            return forward_multiply_adds(create_model("GSPN-N/2", 10, 4, 8, depth=2, **options), 8, 8)

    assert cost(lpu=True) - cost() == 3 * 16 * 9 * 96
    assert cost(stem_conv=True) - cost() == 16 * 9 * 96
    assert cost(mlp_ratio=2.0) - cost() == 3 * 16 * 2 * 96 * 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_every": 1}, "attention_every is 1, but must be at least 2 and at most the 7 blocks of the model"),
        ({"attention_every": 8}, "attention_every is 8, but must be at least 2 and at most the 7 blocks of the model"),
        ({"attention_every": 2, "mixer": "attention"}, "attention_every is for other mixers than attention"),
        ({"conv_every": 8}, "conv_every is 8, but must be at least 2 and at most the 7 blocks of the model"),
        ({"conv_every": 2, "mixer": "conv"}, "conv_every is for other mixers than conv"),
        ({"scan_global_every": 2}, "scan_global_every needs the windows of the other blocks; give scan_window"),
        (
            {"scan_global_every": 2, "scan_window": 2, "mixer": "conv"},
            "options of scans; give mixer gspn or leave them",
        ),
        ({"rotary": True}, "num_heads and rotary are options of attention; give mixer attention"),
        ({"scan_alternate": True}, "scan_alternate changes nothing for scan_directions right, left, down, up; give"),
        ({"scan_alternate": True, "scan_directions": ["rigth"]}, "unknown direction 'rigth'"),
        ({"attention_every": 2, "num_heads": 5}, "num_heads 5 does not divide the 96 channels"),
        ({"mlp_ratio": 0.001}, "mlp_ratio 0.001 leaves an MLP of 96 channels no width"),
        ({"norm": "batch"}, "unknown norm 'batch'; allowed are layer, rms"),
        ({"positions": True, "hidden_size": 98}, "hidden_size 98 is not divisible by 4, which the positions need"),
    ],
)
def test_what_models_refuse(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model("GSPN-N/2", 10, 4, 32, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_every": 1}, "model.attention_every is 1, but must be at least 2"),
        ({"scan_global_every": 0}, "model.scan_global_every is 0, but must be at least 2"),
        ({"mlp_ratio": 0.0}, r"model.mlp_ratio is 0.0, but must lie in \(0, 64\]"),
        ({"mixer_options": {"gate_norm": True}}, "model.mixer_options.gate_norm has a key of its own, model.gate_norm"),
    ],
)
def test_what_configs_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_they_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    scans = {"scan_norm": "rms", "scan_norm_place": "directions", "channel_skip": True, "scan_expansion": 0.5}
    own = {"attention_every": 2, "num_heads": 2, "scan_window": 1, "scan_global_every": 3, "positions": True}
    own |= {"stem_conv": True, "lpu": True, "norm": "rms", "mlp_ratio": 1.5, "gate_norm": True}
    model = {"name": "GSPN-N/4", "hidden_size": 32, "depth": 2, **own, "mixer_options": scans}
    run_training(changed(tiny_config(tmp_path / "run", max_steps=1), model=model))
    pipeline = GSPNPipeline.from_checkpoint(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "saved")
    again = GSPNPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    first, middle, last = again.model.blocks
    assert first.mixer.norm_place == "directions" and first.mixer.channels == 16 and first.expand is not None
    assert (first.mixer.window, last.mixer.window) == (1, None) and isinstance(middle.mixer, AttentionMixer)
    assert again.model.has_positions and again.model.stem is not None and isinstance(first.gate_norm, nn.RMSNorm)
    images = [one([3], num_inference_steps=2, output_type="pt").images for one in (pipeline, again)]
    assert torch.equal(*images)

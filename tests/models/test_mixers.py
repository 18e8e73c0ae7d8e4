"""The mixers' formulas, costs and options, and that one registered from here alone trains and samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models import create_model
from gspn_dit.models.dit import DiTBlock
from gspn_dit.models.flops import forward_multiply_adds
from gspn_dit.models.mixers import (
    MIXERS,
    AttentionMixer,
    AttentionOptions,
    ConvMixer,
    ConvOptions,
    LinearAttentionMixer,
    Mixer,
    NeighbourhoodMixer,
    NeighbourhoodOptions,
    option_names,
    read_options,
)
from gspn_dit.models.scans import GSPNMixer, ScanMixer, ScanOptions
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.training.dry_run import estimate
from tests.models.conftest import lively
from tests.training.conftest import changed, run_training, tiny_config


def made(mixer: Mixer) -> Any:
    """The mixer in float64, every parameter drawn."""
    lively(mixer.double())
    return mixer


def tokens_of(channels: int, height: int = 3, width: int = 4, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)


# -- formulas --------------------------------------------------------------------------------------------------------


def test_linear_attention_by_its_formula() -> None:
    """Weights φ(q)·φ(k) over all tokens, normalised to sum to 1, plus a convolution of the values."""
    mixer, tokens = made(LinearAttentionMixer(8, AttentionOptions(num_heads=2))), tokens_of(8)
    query, key, value = mixer.qkv(tokens).flatten(1, 2).split(8, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = F.relu(query[..., head]) @ F.relu(key[..., head]).transpose(1, 2)
        heads.append((weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ value[..., head])
    planes = value.unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    local = F.conv2d(planes, mixer.local_conv.weight, mixer.local_conv.bias, padding=1, groups=8)
    expected = mixer.proj(torch.cat(heads, dim=-1).unflatten(1, (3, 4)) + local.permute(0, 2, 3, 1))
    torch.testing.assert_close(mixer(tokens), expected, rtol=1e-10, atol=1e-10)


def test_linear_attention_is_finite_where_no_key_answers() -> None:
    mixer = made(LinearAttentionMixer(4, AttentionOptions(num_heads=1)))
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.bias[:4], mixer.qkv.bias[4:8] = 1, -1  # every query is open, every key shut
        mixer.local_conv.weight.zero_()
        mixer.local_conv.bias.zero_()
    output = mixer(tokens_of(4))
    assert torch.equal(output, mixer.proj.bias.expand(output.shape))


@pytest.mark.parametrize(("height", "width", "count"), [(5, 7, 3), (4, 2, 3), (3, 4, 9)])
def test_neighbourhood_attention_by_its_formula(height: int, width: int, count: int) -> None:
    """Softmax over the nearest k×k tokens that the image has, each token on its own."""
    mixer = made(NeighbourhoodMixer(8, NeighbourhoodOptions(num_heads=2, neighbourhood=count)))
    tokens = tokens_of(8, height, width)
    query, key, value = mixer.qkv(tokens).split(8, dim=-1)
    mixed = torch.zeros_like(tokens)
    for row in range(height):
        for column in range(width):
            top = min(max(row - count // 2, 0), max(height - count, 0))
            left = min(max(column - count // 2, 0), max(width - count, 0))
            near = (slice(None), slice(top, top + count), slice(left, left + count))
            for head in (slice(0, 4), slice(4, 8)):
                keys, values = (part[near][..., head].flatten(1, 2) for part in (key, value))
                weights = (keys @ query[:, row, column, head, None] / 4**0.5).softmax(1)
                mixed[:, row, column, head] = (weights * values).sum(1)
    torch.testing.assert_close(mixer(tokens), mixer.proj(mixed), rtol=1e-10, atol=1e-10)


def test_a_neighbourhood_of_everything_is_attention() -> None:
    tokens = tokens_of(8, 3, 4)
    local = made(NeighbourhoodMixer(8, NeighbourhoodOptions(num_heads=2, neighbourhood=5)))
    whole = made(AttentionMixer(8, AttentionOptions(num_heads=2)))
    whole.load_state_dict(local.state_dict())
    torch.testing.assert_close(local(tokens), whole(tokens), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"^neighbourhood is 4, but must be an odd number of at least 1$"):
        NeighbourhoodMixer(8, NeighbourhoodOptions(num_heads=2, neighbourhood=4))


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_in_the_u_shaped_block(mixer: str) -> None:
    """Its parameters all learn; only the scan, which has no map of its own, is followed by one."""
    heads = {"num_heads": 2} if "num_heads" in option_names(mixer) else {}
    model = create_model("GSPN-N/2", 3, 1, 8, hidden_size=32, depth=2, mixer=mixer, **heads)
    lively(model)
    latents, times, labels = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    model(latents, times, labels).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.blocks[0].mixer_proj, nn.Linear) == (mixer == "gspn")
    assert forward_multiply_adds(model, 8, 8) > 0


def test_convolution_with_channel_attention_by_its_formula() -> None:
    mixer, tokens = made(ConvMixer(8, ConvOptions())), tokens_of(8)
    planes = mixer.in_proj(tokens).permute(0, 3, 1, 2)
    local = F.conv2d(planes, mixer.local_conv.weight, mixer.local_conv.bias, padding=1, groups=8)
    local = F.gelu(local, approximate="tanh").permute(0, 2, 3, 1)
    gate = 1 / (1 + torch.exp(-(local.flatten(1, 2).mean(1) @ mixer.channel_gate.weight.T + mixer.channel_gate.bias)))
    expected = mixer.out_proj(local * gate[:, None, None])
    torch.testing.assert_close(mixer(tokens), expected, rtol=1e-10, atol=1e-10)


def test_skip_adds_a_map_of_the_proxy_times_the_tokens() -> None:
    skipping, plain = made(GSPNMixer(32, skip=True)), made(GSPNMixer(32))
    state = skipping.state_dict()
    skip = state.pop("to_skip.weight")
    plain.load_state_dict(state)
    tokens = tokens_of(32)
    expected = plain(tokens) + (plain.to_proxy(tokens) @ skip.T) * tokens
    torch.testing.assert_close(skipping(tokens), expected, rtol=1e-12, atol=1e-12)
    assert skip.shape == (32, 2)


def test_the_skip_starts_at_the_tokens_scale() -> None:
    mixer = GSPNMixer(4096, 1, skip=True)
    mixer.initialise()
    assert mixer.to_skip is not None
    assert float(mixer.to_skip.weight.detach().std()) * 256**0.5 == pytest.approx(1, rel=0.01)


def test_lpu_adds_a_depthwise_convolution_before_both_branches() -> None:
    block = DiTBlock(8, AttentionMixer(8, AttentionOptions(num_heads=2)), lpu=True).double()
    lively(block)
    plain = DiTBlock(8, AttentionMixer(8, AttentionOptions(num_heads=2))).double()
    state = block.state_dict()
    kernel = state.pop("lpu.weight")
    plain.load_state_dict(state)
    tokens, conditioning = tokens_of(8), torch.randn(2, 8, dtype=torch.float64)
    local = F.conv2d(tokens.permute(0, 3, 1, 2), kernel, padding=1, groups=8).permute(0, 2, 3, 1)
    torch.testing.assert_close(block(tokens, conditioning), plain(tokens + local, conditioning), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "mixer",
    [
        ConvMixer(4, ConvOptions()),
        LinearAttentionMixer(4, AttentionOptions(num_heads=2)),
        ScanMixer(4, ScanOptions(scan_skip=True, proxy_channels=3, weight_groups=2)),
    ],
    ids=["conv", "linear", "gspn with skip"],
)
def test_gradients_of_tokens_and_parameters(mixer: Mixer) -> None:
    made(mixer)
    names, tensors = zip(*mixer.named_parameters(), strict=True)

    def run(tokens: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (tokens,))

    tokens = tokens_of(4, 2, 3, 1).requires_grad_()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(run, (tokens, *leaves), fast_mode=True)


# -- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        # 6 tokens of 4 channels. Maps to q, k and v and out; two products of 6 × 6 × 4.
        (AttentionMixer(4, AttentionOptions(num_heads=2)), 6 * (48 + 16) + 2 * 36 * 4),
        # The same maps, 9 taps; keys with two values and a one, queries with what comes of it: 2 heads of 2 × 3 each.
        (LinearAttentionMixer(4, AttentionOptions(num_heads=2)), 6 * (48 + 16 + 9 * 4 + 2 * (2 * 2 * 3))),
        # Two maps and 9 taps for each token, the channels' gate once.
        (ConvMixer(4, ConvOptions()), 6 * (16 + 16 + 9 * 4) + 16),
        # Two maps; the proxy of 2, one direction's 3·4 logits, 4 + 4 gates and 4 skips; 6 by the scan, 1 by the skip.
        (
            ScanMixer(4, ScanOptions(proxy_channels=2, scan_directions=("up",), scan_skip=True)),
            6 * (16 + 16 + 4 * 2 + 2 * (12 + 4 + 4 + 4) + 6 * 4 + 4),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_multiply_adds_by_hand(mixer: Mixer, expected: int) -> None:
    assert mixer.multiply_adds(2, 3) == expected


def test_working_elements_are_logits_and_gates_with_their_gradients() -> None:
    options = ScanOptions(weight_groups=2, scan_directions=("up", "left"), proxy_channels=3)
    assert options.create(8).working_elements(2, 3) == 2 * 6 * (2 * 3 * 2 + 2 * 8 + 2 * 8)
    assert AttentionMixer(8, AttentionOptions(num_heads=1)).working_elements(2, 3) == 0


def test_a_model_counts_its_mixers_by_what_they_say() -> None:
    def cost(**options: Any) -> int:
        return forward_multiply_adds(create_model("DiT-N/2", 10, 4, 8, depth=3, **options), 8, 8)

    attention, conv = MIXERS["attention"][0](64, AttentionOptions(num_heads=2)), ConvMixer(64, ConvOptions())
    assert cost() - cost(mixer="conv") == 3 * (attention.multiply_adds(4, 4) - conv.multiply_adds(4, 4))
    assert cost(lpu=True) - cost() == 3 * 16 * 9 * 64


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixer", "given", "message"),
    [
        ("conv", {"num_heads": 2}, "num_heads and rotary are options of attention; give mixer attention or leave them"),
        ("linear", {"scan_skip": True}, "channel_skip and gate_scale are options of scans; give mixer gspn or leave"),
        ("gspn", {"kernel": 3}, "unknown option 'kernel' of mixer gspn; allowed are proxy_channels, proxy_ratio"),
        ("conv", {"kernel": 3}, "unknown option 'kernel' of mixer conv; allowed are none"),
        ("mamba", {}, "unknown mixer 'mamba'; allowed are attention, gspn, conv, linear"),
    ],
)
def test_options_of_other_mixers_are_refused(mixer: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(mixer, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proxy_channels": 0}, "proxy_channels is 0, but must be at least 1"),
        ({"proxy_ratio": 0}, "proxy_ratio is 0, but must be at least 1"),
        ({"proxy_ratio": 17}, "hidden_size 16 is below the 17 channels that the proxy needs"),
    ],
)
def test_impossible_proxies(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScanOptions(**options).create(16)


def test_proxy_width_is_given_or_a_share_of_the_channels() -> None:
    assert ScanOptions(proxy_ratio=8).create(96).to_proxy.out_features == 12
    assert ScanOptions(proxy_channels=5, proxy_ratio=8).create(96).to_proxy.out_features == 5
    model = create_model("GSPN-N/2", 10, 4, 8, depth=2, proxy_channels=7, scan_skip=True)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["blocks.1.mixer.to_skip.weight"] == [96, 7]


# -- a mixer of one's own --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShiftOptions:
    columns: int = 1


class ShiftMixer(Mixer):
    """A linear map of the tokens so many columns away."""

    def __init__(self, channels: int, options: ShiftOptions) -> None:
        super().__init__()
        self.columns, self.map = options.columns, nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.map(tokens.roll(self.columns, 2))

    def multiply_adds(self, height: int, width: int) -> int:
        return height * width * self.map.weight.numel()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(MIXERS, "shift", (ShiftMixer, ShiftOptions))
    yield


def test_a_mixer_registered_here_alone_trains_and_samples(registered: None, tmp_path: Path) -> None:
    model = {"name": "DiT-N/4", "hidden_size": 16, "depth": 1, "num_heads": 2}
    model |= {"mixer": "shift", "mixer_options": {"columns": 2}}
    config = changed(tiny_config(tmp_path / "run", max_steps=1), model=model)
    tokens, width = 4, 16
    difference = estimate(config, 1).plan.multiply_adds
    difference -= estimate(changed(config, model={"mixer": "attention", "mixer_options": None}), 1).plan.multiply_adds
    assert difference == tokens * (width**2 - 4 * width**2) - 2 * tokens**2 * width
    run_training(config)
    pipeline = GSPNPipeline.from_checkpoint(tmp_path / "run")
    (block,) = pipeline.model.blocks
    assert isinstance(block.mixer, ShiftMixer)
    assert block.mixer.columns == 2
    assert pipeline([3], num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 1)


def test_options_are_frozen_dataclasses_that_need_no_value() -> None:
    for mixer, options in MIXERS.values():
        assert issubclass(mixer, Mixer)
        with pytest.raises(dataclasses.FrozenInstanceError):
            options().num_heads = 1

"""DiT: published sizes, both mixers, positions, adaLN-Zero, stochastic depth, checkpointing, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.models import DIT_PRESETS, DiffusionModel, DiT, create_model
from gspn_dit.models.dit import DiTBlock
from gspn_dit.models.embeddings import sincos_positions
from gspn_dit.models.mixers import MIXERS, AttentionMixer, AttentionOptions, ScanMixer
from tests.models.conftest import lively

EXACT = {
    ("S", "attention"): 32_865_056,
    ("B", "attention"): 130_315_808,
    ("L", "attention"): 457_840_672,
    ("XL", "attention"): 674_834_720,
    ("S", "gspn"): 31_639_376,
    ("B", "gspn"): 125_431_376,
    ("L", "gspn"): 440_490_112,
    ("XL", "gspn"): 649_223_568,
}
PUBLISHED_MILLIONS = {"S": 33.0, "B": 130.5, "L": 458.1, "XL": 675.1}
EACH_MIXER = pytest.mark.parametrize("mixer", list(MIXERS))
GLOBAL_MIXERS = pytest.mark.parametrize("mixer", ["attention", "gspn", "linear"])

Build = Callable[..., DiffusionModel]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: Any) -> DiffusionModel:
    arguments: dict[str, Any] = {"num_classes": 1000, "latent_channels": 4, "latent_size": 32, "out_channels": 8}
    with torch.device("meta"):
        return create_model(name, **{**arguments, **options})


def inputs(batch: int = 2, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels; the labels are 0, 1, 2, 3 (none) and so on."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    timesteps = 1000 * torch.rand(batch, generator=generator, dtype=torch.float64)
    return latents, timesteps, torch.arange(batch) % 4


@pytest.fixture
def dit(build: Build) -> Build:
    """Build a DiT of width 16, depth 3 and 2 heads, in float64, none of it zero."""
    return lambda **options: build(**{"name": "DiT-N/2", "depth": 3, **options})


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "mixer"), EXACT)
def test_parameter_count(size: str, mixer: str) -> None:
    counted = count(on_meta(f"DiT-{size}/2", mixer=mixer))
    assert counted == EXACT[size, mixer]
    if mixer == "attention":
        assert counted == pytest.approx(PUBLISHED_MILLIONS[size] * 1e6, rel=0.005)


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"),
    [("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16)],
)
def test_width_depth_and_heads_of_a_published_size(size: str, width: int, depth: int, heads: int) -> None:
    preset = DIT_PRESETS[size]
    assert (preset.hidden_size, preset.depth, preset.num_heads) == (width, depth, heads)


@pytest.mark.parametrize("size", ["N", "T"])
def test_small_sizes_mirror_the_gspn_family(size: str) -> None:
    dit, gspn = (count(create_model(f"{family}-{size}/2", 10, 1, 8)) for family in ("DiT", "GSPN"))
    assert 0.9 < dit / gspn < 1.15


def test_attention_is_the_default_mixer() -> None:
    model = on_meta("DiT-N/2")
    assert isinstance(model, DiT)
    assert model.mixer == "attention"
    assert {type(block.mixer) for block in model.blocks} == {AttentionMixer}
    assert {type(block.mixer) for block in on_meta("DiT-N/2", mixer="gspn").blocks} == {ScanMixer}


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DiT-M/2", {}, "unknown model 'DiT-M/2'; allowed are GSPN-N/2, .*DiT-S/2, DiT-B/2, DiT-L/2, DiT-XL/2"),
        ("GSPN-M/2", {}, "unknown model 'GSPN-M/2'; allowed are .*GSPN-XL/2, .*GSPN2-XL/2, DiT-N/2"),
        ("DiT-S/0", {}, "unknown model"),
        ("GSPN-S/2", {"mlp": "swiglu"}, "mlp is an option of DiT models, but the model is GSPN-S/2; leave it out"),
        (
            "DiT-S/2",
            {"long_skips": False},
            "long_skips is an option of GSPN models, but the model is DiT-S/2; leave it",
        ),
        ("DiT-S/2", {"conditioning": "additive"}, "conditioning is an option of GSPN models"),
        ("DiT-S/2", {"mixer": "mamba"}, "unknown mixer 'mamba'; allowed are attention, gspn, conv, linear"),
        ("DiT-S/2", {"num_heads": 5}, "num_heads 5 does not divide the 384 channels"),
        ("DiT-S/2", {"hidden_size": 18, "num_heads": 2}, "hidden_size 18 is not divisible by 4"),
        ("DiT-S/2", {"weight_groups": 4}, "channel_skip and gate_scale are options of scans"),
        ("DiT-S/2", {"scan_window": 4}, "channel_skip and gate_scale are options of scans"),
        ("DiT-S/2", {"scan_directions": ["right"]}, "channel_skip and gate_scale are options of"),
        ("DiT-S/2", {"mixer": "gspn", "scan_directions": []}, "directions is empty"),
        ("DiT-S/2", {"depth": 0}, "depth is 0, but must be at least 1"),
        ("DiT-S/2", {"dept": 3}, "unknown model option 'dept'; allowed are depth, .*mixer"),
        ("DiT-S/2", {"latent_size": 31}, "patch size 2 of model 'DiT-S/2'; choose another image size .*DiT-S/1"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(name, **options)


# -- positions -------------------------------------------------------------------------------------------------------


def test_positions_by_hand() -> None:
    """Eight channels: frequencies 1 and 1/100; the column's sines and cosines, then the row's."""
    positions = sincos_positions(torch.arange(4), torch.arange(6), 8)
    assert positions.shape == (4, 6, 8)
    row, column = 3, 5
    expected = [f(x) for at in (column, row) for f in (math.sin, math.cos) for x in (at, at / 100)]
    torch.testing.assert_close(positions[row, column], torch.tensor(expected), rtol=0, atol=1e-6)


def test_positions_follow_the_grid_that_comes(dit: Build) -> None:
    model = dit(latent_size=8)
    assert isinstance(model, DiT)
    large, wide = model.positions(8, 8), model.positions(4, 9)
    assert torch.equal(large[:4, :4], model.positions(4, 4))
    assert torch.equal(wide[:, :8], large[:4])


def test_interpolated_positions_stay_in_the_training_grid(dit: Build) -> None:
    model = dit(latent_size=8, interpolate_positions=True)
    assert isinstance(model, DiT)
    trained, fine = model.positions(4, 4), model.positions(8, 12)
    torch.testing.assert_close(fine[::2, ::3], trained)
    torch.testing.assert_close(fine[1, 1], sincos_positions(torch.tensor([0.5]), torch.tensor([1 / 3]), 16)[0, 0])


def permuted(model: DiffusionModel) -> tuple[Tensor, Tensor]:
    """Outputs for latents and for the same patches in reverse order, put back."""
    latents, timesteps, labels = inputs(1)
    patches = latents.unflatten(3, (4, 2)).unflatten(2, (4, 2))
    reverse = patches.flip(2, 4).flatten(4, 5).flatten(2, 3)
    output = model(reverse, timesteps, labels).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    return model(latents, timesteps, labels), output.flip(2, 4).flatten(4, 5).flatten(2, 3)


def test_attention_without_positions_does_not_know_places(dit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dit()
    assert not torch.allclose(*permuted(model))
    monkeypatch.setattr(model, "positions", lambda height, width: torch.zeros(height, width, 16))
    torch.testing.assert_close(*permuted(model), rtol=1e-10, atol=1e-10)


def test_scans_know_places_without_positions(dit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dit(mixer="gspn")
    monkeypatch.setattr(model, "positions", None)  # never called
    assert not torch.allclose(*permuted(model))


def test_scans_take_positions_on_request(dit: Build) -> None:
    plain, placed = dit(mixer="gspn"), dit(mixer="gspn", positions=True)
    assert isinstance(placed, DiT)
    placed.load_state_dict(plain.state_dict())  # they hold nothing to learn
    patch = nn.Linear(placed.patch_embed.in_features, 16).double()
    nn.init.zeros_(patch.weight)
    nn.init.zeros_(patch.bias)
    placed.patch_embed = patch
    tokens: list[Tensor] = []
    placed.blocks[0].register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0]))
    with torch.no_grad():
        placed(*inputs(1))
    torch.testing.assert_close(tokens[0][0], placed.positions(4, 4).double())


@pytest.mark.parametrize("directions", [["right"], ["down", "up"], ["right", "left", "down", "up"]])
def test_gates_start_so_that_a_sum_over_directions_keeps_the_scale(directions: list[str]) -> None:
    model = create_model("DiT-N/2", 3, 4, 8, mixer="gspn", hidden_size=512, depth=1, scan_directions=directions)
    mixer = model.blocks[0].mixer.scan  # type: ignore[union-attr]
    for gate in (mixer.to_input_gate, mixer.to_output_gate):  # type: ignore[union-attr]
        deviation = gate.weight.std().item() * gate.in_features**0.5  # type: ignore
        assert len(directions) * deviation**4 == pytest.approx(1, rel=0.1)


# -- structure -------------------------------------------------------------------------------------------------------


@EACH_MIXER
@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 2), (2, 10), (6, 12)])
def test_any_height_and_width_that_the_patch_divides(dit: Build, mixer: str, height: int, width: int) -> None:
    output = dit(mixer=mixer, out_channels=4)(*inputs(height=height, width=width))
    assert output.shape == (2, 4, height, width)
    assert bool(output.isfinite().all())


def test_attention_by_its_formula() -> None:
    torch.manual_seed(0)
    mixer = AttentionMixer(8, AttentionOptions(num_heads=2)).double()
    tokens = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    q, k, v = (tokens.flatten(1, 2) @ mixer.qkv.weight.T + mixer.qkv.bias).split(8, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ v[..., head])
    expected = torch.cat(heads, dim=-1) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(tokens), expected.reshape(tokens.shape), rtol=1e-12, atol=1e-12)


def test_a_block_is_what_the_paper_says() -> None:
    torch.manual_seed(0)
    block = DiTBlock(8, AttentionMixer(8, AttentionOptions(num_heads=2))).double()
    lively(block)
    tokens, conditioning = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    silu = conditioning / (1 + torch.exp(-conditioning))
    parts = (silu @ block.modulation.weight.T + block.modulation.bias)[:, None, None].split(8, dim=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    middle = tokens + gate * block.mixer(norm(tokens) * (1 + scale) + shift)
    hidden = (norm(middle) * (1 + mlp_scale) + mlp_shift) @ block.expand.weight.T + block.expand.bias
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    expected = middle + mlp_gate * (gelu @ block.contract.weight.T + block.contract.bias)
    torch.testing.assert_close(block(tokens, conditioning), expected, rtol=1e-10, atol=1e-10)


@EACH_MIXER
def test_every_block_starts_as_the_identity_and_the_output_at_zero(mixer: str) -> None:
    torch.manual_seed(0)
    model = create_model("DiT-N/2", 3, 2, 8, mixer=mixer, depth=2)
    tokens, conditioning = torch.randn(2, 4, 4, 64), torch.randn(2, 64)
    for block in model.blocks:
        assert torch.equal(block(tokens, conditioning), tokens)
    latents, timesteps, labels = inputs()
    output = model(latents.float(), timesteps, labels)
    assert torch.equal(output, torch.zeros_like(output))
    assert 0.015 < float(model.timestep_embed.expand.weight.detach().std()) < 0.025
    assert 0.015 < float(model.class_embed.weight.detach().std()) < 0.025


@EACH_MIXER
def test_every_parameter_has_a_gradient(dit: Build, mixer: str) -> None:
    model = dit(mixer=mixer)
    model(*inputs(4)).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert dead == []


@GLOBAL_MIXERS
def test_every_pixel_reaches_every_pixel(dit: Build, mixer: str) -> None:
    latents, timesteps, labels = inputs(1, 16, 16)
    latents.requires_grad_()
    dit(mixer=mixer)(latents, timesteps, labels)[0, 0, 15, 15].backward()
    assert latents.grad is not None
    assert bool((latents.grad[0, :, 0, 0] != 0).all())


def test_window_and_groups_reach_every_block(dit: Build) -> None:
    model = dit(mixer="gspn", scan_window=2, weight_groups=4)
    assert [block.mixer.scan.window for block in model.blocks] == [2] * 3
    assert [block.mixer.scan.to_logits.out_features for block in model.blocks] == [48] * 3


def test_null_label_is_the_number_of_classes(dit: Build) -> None:
    model = dit(num_classes=7)
    assert model.null_label == 7
    latents, timesteps, _ = inputs(1)
    outputs = [model(latents, timesteps, torch.tensor([label])) for label in range(8)]
    for label, output in enumerate(outputs):
        assert all(not torch.equal(output, other) for other in outputs[:label])


# -- stochastic depth, memory, autocast, compilation -----------------------------------------------------------------


def test_nothing_is_dropped_unless_asked_for() -> None:
    assert on_meta("DiT-N/2").drop_path_rates == [0.0] * 6
    assert on_meta("DiT-N/2", drop_path_rate=0.5).drop_path_rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert on_meta("DiT-N/2", depth=1, drop_path_rate=0.5).drop_path_rates == [0.0]


def test_dropped_branches_are_the_identity_and_kept_ones_are_scaled(dit: Build) -> None:
    model = dit(drop_path_rate=0.5)
    keep = torch.ones(3, 2, dtype=torch.bool)
    keep[1, 0] = False
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(*inputs(2), keep)
    before, after = seen[1]
    assert torch.equal(after[0], before[0])
    gate = model.blocks[1].modulation
    with torch.no_grad():  # doubling the gates is what keeping a branch half as often asks for
        for rows in (slice(2 * 16, 3 * 16), slice(5 * 16, 6 * 16)):
            gate.weight[rows] /= 0.75
            gate.bias[rows] /= 0.75
    conditioning = model.timestep_embed(inputs()[1]) + model.class_embed(inputs()[2])
    torch.testing.assert_close(after[1], model.blocks[1](before, conditioning)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"name": "DiT-N/2"}, {"name": "DiT-N/2", "mixer": "gspn"}, {"name": "GSPN-N/2", "depth": 4}]
)
def test_checkpointed_blocks_give_equal_gradients_from_fewer_kept_bytes(build: Build, options: dict[str, Any]) -> None:
    model = build(**options)
    arguments = (*inputs(), torch.ones(len(model.blocks), 2, dtype=torch.bool))
    results = []
    for model.gradient_checkpointing in (False, True):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(*arguments)
        gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        results.append((sum(kept.values()), output, gradients))
    (plain_bytes, plain, plain_gradients), (fewer_bytes, output, gradients) = results
    assert fewer_bytes < plain_bytes / 2
    assert torch.equal(output, plain)
    for gradient, truth in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


@EACH_MIXER
def test_bfloat16_autocast_stays_near_float32(dit: Build, mixer: str) -> None:
    model, (latents, timesteps, labels) = dit(mixer=mixer).float(), inputs()
    expected = model(latents.float(), timesteps, labels)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(latents.float(), timesteps, labels)
        output.float().square().mean().backward()
    error = (output.float() - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05  # it was computed in bfloat16, and close to float32
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_pure_bfloat16_runs(dit: Build) -> None:
    latents, timesteps, labels = inputs()
    assert dit().bfloat16()(latents.bfloat16(), timesteps, labels).dtype == torch.bfloat16


@pytest.mark.slow
@EACH_MIXER
def test_compiled_in_one_graph_equals_eager(dit: Build, mixer: str) -> None:
    model, arguments = dit(depth=1, mixer=mixer), inputs()
    parameters = list(model.parameters())
    expected = model(*arguments)
    truths = torch.autograd.grad(expected.square().sum(), parameters)
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    gradients = torch.autograd.grad(output.square().sum(), parameters)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=1e-8)


def test_samples_of_a_batch_do_not_touch(dit: Build) -> None:
    model, (latents, timesteps, labels) = dit(), inputs(3)
    together = model(latents, timesteps, labels)
    for index in range(3):
        one = slice(index, index + 1)
        alone = model(latents[one], timesteps[one], labels[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


def test_attention_is_a_fused_kernel(dit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(args[0].shape) or fused(*args))
    dit()(*inputs())
    assert calls == [(2, 2, 16, 8)] * 3

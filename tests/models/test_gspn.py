"""The GSPN transformer: published sizes, shapes, conditioning, skips, stochastic depth, memory, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gspn_dit.models import GSPNTransformer, create_model
from gspn_dit.models.gspn import GSPNBlock
from gspn_dit.models.scans import GSPNMixer
from gspn_dit.ops import DIRECTIONS, gspn_scan
from tests.models.conftest import lively

Build = Callable[..., GSPNTransformer]

ABLATED = {"conditioning": "adaln-zero", "long_skips": False, "scan_directions": ["right", "down"]}

EXACT = {"S": 19_304_676, "B": 137_764_956, "L": 444_708_260, "XL": 691_704_260}
PUBLISHED_MILLIONS = {"B": 137, "L": 443, "XL": 690}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: Any) -> GSPNTransformer:
    arguments: dict[str, Any] = {"num_classes": 1000, "latent_channels": 4, "latent_size": 32, "out_channels": 8}
    with torch.device("meta"):
        return create_model(name, **{**arguments, **options})


def inputs(batch: int = 2, height: int = 8, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels; the labels are 0, 1, 2, 3 (none) and so on."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    timesteps = 1000 * torch.rand(batch, generator=generator, dtype=torch.float64)
    return latents, timesteps, torch.arange(batch) % 4


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", EXACT)
def test_parameter_count(size: str) -> None:
    counted = count(on_meta(f"GSPN-{size}/2"))
    assert counted == EXACT[size]
    if size in PUBLISHED_MILLIONS:
        assert counted == pytest.approx(PUBLISHED_MILLIONS[size] * 1e6, rel=0.008)


def test_parameters_of_a_block_by_formula() -> None:
    channels, proxy, groups = 32, 2, 32
    norm, linears, convs = 2 * channels, 3 * channels**2, channels * (49 + 1) + channels * 9
    mixer = proxy * (channels + 12 * groups + 4 * channels + 4 * channels) + 4
    assert count(GSPNBlock(channels)) == norm + linears + convs + mixer


@pytest.mark.parametrize("groups", [1, 2, 4, 16])
def test_weight_groups_count_12_logits_each(groups: int) -> None:
    channels, proxy = 48, 3
    saved = proxy * 12 * (channels - groups)
    assert count(GSPNMixer(channels)) - count(GSPNMixer(channels, groups)) == saved


def test_proxy_is_a_sixteenth_rounded_down() -> None:
    assert GSPNMixer(900).to_proxy.out_features == 56
    assert GSPNMixer(31).to_proxy.out_features == 1


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patch_size_changes_the_two_maps_of_patches_alone(patch_size: int) -> None:
    def size(patch: int) -> int:
        return count(on_meta(f"GSPN-N/{patch}"))

    per_pixel = 4 * 96 + (96 + 1) * 8  # into the patch embedding, and out with a bias
    assert size(patch_size) - size(1) == per_pixel * (patch_size**2 - 1)


def test_overrides_replace_the_preset_and_none_keeps_it() -> None:
    model = on_meta("GSPN-N/2", hidden_size=64, depth=2, weight_groups=None, scan_window=None, drop_path_rate=None)
    assert (len(model.blocks), model.patch_embed.out_features) == (3, 64)
    assert count(on_meta("GSPN-N/2", depth=None)) == count(on_meta("GSPN-N/2"))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GSPN-M/2", "GSPN-B", "GSPN-B/0", "gspn-b/2", "GSPN-B/2 ", "DIT-B/2", ""])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown model '.*'; allowed are .*GSPN-B/2, GSPN-L/2, GSPN-XL/2"):
        on_meta(name)


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model option 'dept'; allowed are depth, drop_path_rate, hidden"):
        on_meta("GSPN-N/2", dept=2)


@pytest.mark.parametrize("latent_size", [33, (32, 31), (31, 32)])
def test_size_that_the_patch_does_not_divide(latent_size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"not divisible by the patch size 2 of model 'GSPN-N/2'; choose another .*/1"):
        on_meta("GSPN-N/2", latent_size=latent_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "depth is 3, but must be an even number of at least 2"),
        ({"depth": 0}, "depth is 0, but must be"),
        ({"weight_groups": 5}, "weight_groups 5 does not divide the 96 channels"),
        ({"weight_groups": 0}, "weight_groups 0 does not divide"),
        ({"hidden_size": 15}, "hidden_size 15 is below the 16 channels"),
        ({"scan_directions": ["right", "rigth"]}, "unknown direction 'rigth'; allowed are right, left, down, up"),
        ({"scan_directions": ["up", "up"]}, "a direction is given twice in"),
        ({"scan_directions": []}, "directions is empty; give at least one of right, left, down, up"),
        ({"conditioning": "adaln"}, "unknown conditioning 'adaln'; allowed are additive, adaln-zero"),
    ],
)
def test_impossible_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta("GSPN-N/2", **options)


def test_input_that_the_patch_does_not_divide(build: Build) -> None:
    with pytest.raises(ValueError, match="a latent of 7×8 is not divisible by the patch size 2"):
        build()(*inputs(height=7))


# -- shapes and conditioning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out_channels", "expected"), [(None, 2), (2, 2), (4, 4)])
def test_out_channels(build: Build, out_channels: int | None, expected: int) -> None:
    model = build(out_channels=out_channels)
    assert model.out_channels == expected
    assert model(*inputs()).shape == (2, expected, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 2), (2, 10), (10, 2), (6, 12), (16, 16)])
def test_any_height_and_width_that_the_patch_divides(build: Build, height: int, width: int) -> None:
    output = build()(*inputs(height=height, width=width))
    assert output.shape == (2, 2, height, width)
    assert bool(output.isfinite().all())


def test_every_pixel_reaches_every_pixel(build: Build) -> None:
    """Global propagation: the corner that is farthest away still has a gradient."""
    latents, timesteps, labels = inputs(1, 16, 16)
    latents.requires_grad_()
    build()(latents, timesteps, labels)[0, 0, 15, 15].backward()
    assert latents.grad is not None
    assert bool((latents.grad[0, :, 0, 0] != 0).all())


def test_null_label_is_the_number_of_classes(build: Build) -> None:
    model = build(num_classes=7)
    assert model.null_label == model.num_classes == 7
    latents, timesteps, _ = inputs(1)
    known = [model(latents, timesteps, torch.tensor([label])) for label in range(8)]
    for label, output in enumerate(known):
        assert all(not torch.equal(output, other) for other in known[:label])
    with pytest.raises(IndexError):
        model(latents, timesteps, torch.tensor([8]))


def test_timestep_changes_the_output(build: Build) -> None:
    model, (latents, _, labels) = build(), inputs(1)
    outputs = [model(latents, torch.tensor([time]), labels) for time in (0.0, 1.0, 500.0, 1000.0)]
    for index, output in enumerate(outputs):
        assert all((output - other).abs().max() > 1e-3 for other in outputs[:index])


def test_output_starts_at_zero_and_learns() -> None:
    model = create_model("GSPN-N/2", 3, 2, 8, hidden_size=16, depth=2)
    latents, timesteps, labels = inputs()
    output = model(latents.float(), timesteps, labels)
    assert torch.equal(output, torch.zeros_like(output))
    (output - 1).square().mean().backward()
    assert model.output.linear.bias.grad is not None
    assert bool((model.output.linear.bias.grad != 0).all())


def test_weights_are_a_function_of_torchs_seed() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = create_model("GSPN-N/2", 3, 2, 8, hidden_size=16, depth=2)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_samples_of_a_batch_do_not_touch(build: Build) -> None:
    model, (latents, timesteps, labels) = build(), inputs(4)
    together = model(latents, timesteps, labels)
    for index in range(4):
        one = slice(index, index + 1)
        alone = model(latents[one], timesteps[one], labels[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, ABLATED], ids=["default", "ablated"])
def test_every_parameter_has_a_gradient(build: Build, options: dict[str, Any]) -> None:
    model = build(**options)
    # A channel whose gate is shut everywhere has no gradient, so the whole tensor is looked at.
    model(*inputs(4)).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert dead == []


# -- structure -------------------------------------------------------------------------------------------------------


def test_a_block_is_what_the_design_says() -> None:
    """One block against the formula, with plain operations."""
    torch.manual_seed(0)
    block = GSPNBlock(32).double()
    tokens = torch.randn(2, 3, 4, 32, dtype=torch.float64)

    def depthwise(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
        size = conv.kernel_size[0]
        padded = F.pad(x, (0, 0, size // 2, size // 2, size // 2, size // 2))
        total = torch.zeros_like(x)
        for i in range(size):
            for j in range(size):
                total += padded[:, i : i + x.shape[1], j : j + x.shape[2]] * conv.weight[:, 0, i, j]
        return total if conv.bias is None else total + conv.bias

    def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
        assert layer.bias is None
        return x @ layer.weight.T

    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, correction=0)
    normed = (tokens - mean) / (variance + 1e-6).sqrt() * block.norm.weight + block.norm.bias
    local = depthwise(linear(normed, block.in_proj), block.local_conv)
    mixer = block.mixer
    proxy = linear(local, mixer.to_proxy)
    scanned = gspn_scan(
        local,
        linear(proxy, mixer.to_logits).reshape(2, 3, 4, 4, 3, 32),
        linear(proxy, mixer.to_input_gate).reshape(2, 3, 4, 4, 32),
        linear(proxy, mixer.to_output_gate).reshape(2, 3, 4, 4, 32),
        mixer.merge_weight,
        backend="reference",
    )
    value = depthwise(linear(scanned, block.mixer_proj), block.gate_conv)
    expected = tokens + linear(value * value.clamp(min=0), block.out_proj)
    torch.testing.assert_close(block(tokens), expected, rtol=1e-12, atol=1e-12)


def test_decoder_block_takes_the_output_of_its_mirror(build: Build) -> None:
    """Depth 4: blocks 0 1 | 2 | 3 4; block 3 is joined with the output of block 1, block 4 with that of block 0."""
    model = build()
    outputs: dict[int, Tensor] = {}
    joined: dict[int, Tensor] = {}
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, layer=layer: outputs.__setitem__(layer, output))
    for number, skip in enumerate(model.skips):
        skip.register_forward_pre_hook(lambda module, args, number=number: joined.__setitem__(number, args[0]))
    model(*inputs())
    assert sorted(joined) == [0, 1]
    assert torch.equal(joined[0], torch.cat([outputs[2], outputs[1]], dim=-1))
    assert torch.equal(joined[1], torch.cat([outputs[3], outputs[0]], dim=-1))


def test_encoder_reaches_the_output_through_its_own_skip_alone(build: Build) -> None:
    """With the middle path cut, what is left of an encoder block's influence is its mirror's skip."""
    model = build(drop_path_rate=0.0)
    width = 16
    with torch.no_grad():
        model.skips[0].weight[:, :width] = 0  # nothing arrives from the middle block
        model.skips[1].weight[:, width:] = 0  # nor through the outermost skip
    outputs: dict[int, Tensor] = {}
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, layer=layer: outputs.__setitem__(layer, output))
    result = model(*inputs()).sum()
    middle, inner = torch.autograd.grad(result, [outputs[2], outputs[1]], allow_unused=True)
    assert middle is None or not bool(middle.any())
    assert bool(inner.any())


def test_weight_groups_share_weights_between_neighbouring_channels() -> None:
    """With all 12C logits made equal inside a group, the full mixer computes what the grouped one does."""
    torch.manual_seed(0)
    grouped, full = GSPNMixer(32, weight_groups=4).double(), GSPNMixer(32).double()
    state = grouped.state_dict()
    logits = state["to_logits.weight"].reshape(12, 4, 2)
    state["to_logits.weight"] = logits.repeat_interleave(8, dim=1).reshape(12 * 32, 2)
    full.load_state_dict(state)
    tokens = torch.randn(2, 4, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_window_keeps_segments_apart_in_every_block(grad: bool) -> None:
    tokens = torch.randn(1, 4, 4, 16, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, :2, :2] += 1  # inside the first segment of rows and of columns
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        for window, reached in ((2, False), (None, True)):
            mixer = GSPNMixer(16, window=window).double()
            difference = (mixer(changed) - mixer(tokens)).abs().amax(-1)[0]
            assert bool((difference[2:, 2:] > 0).any()) == reached
            assert bool((difference[:2, :2] > 0).any())


def test_window_and_groups_reach_every_block(build: Build) -> None:
    model = build(scan_window=2, weight_groups=4)
    assert [block.mixer.window for block in model.blocks] == [2] * 5
    assert [block.mixer.to_logits.out_features for block in model.blocks] == [48] * 5
    plain = build(weight_groups=4)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(*inputs()), model(*inputs()))
    wide = build(scan_window=4, weight_groups=4)  # 8 pixels are 4 tokens: one segment
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(wide(*inputs()), plain(*inputs()), rtol=1e-12, atol=1e-12)


# -- directions, skips, conditioning ---------------------------------------------------------------------------------


def test_two_directions_take_half_of_the_logits_gates_and_merge_weights() -> None:
    channels, proxy, groups = 48, 3, 16
    both, all_four = (GSPNMixer(channels, groups, None, directions) for directions in (["right", "down"], DIRECTIONS))
    assert count(all_four) - count(both) == proxy * 2 * (3 * groups + 2 * channels) + 2


def test_a_mixer_of_some_directions_is_the_scan_in_those_alone() -> None:
    """Against the mixer of all four whose left and up have no weight in the merge."""
    torch.manual_seed(0)
    some, every = GSPNMixer(32, directions=["down", "right"]).double(), GSPNMixer(32).double()
    state = some.state_dict()
    state["merge_weight"] = torch.tensor([0.7, 0.0, 0.3, 0.0], dtype=torch.float64)
    some.merge_weight.data.copy_(state["merge_weight"][[2, 0]])
    for name in ("to_logits", "to_input_gate", "to_output_gate"):
        down, right = state[f"{name}.weight"].chunk(2)
        state[f"{name}.weight"] = torch.cat([right, right, down, down])
    every.load_state_dict(state)
    tokens = torch.randn(2, 4, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(some(tokens), every(tokens), rtol=1e-12, atol=1e-12)


def test_directions_reach_every_block_and_bound_what_a_token_sees(build: Build) -> None:
    model = build(scan_directions=["right", "down"])
    assert {block.mixer.directions for block in model.blocks} == {("right", "down")}
    mixer, tokens = model.blocks[0].mixer, torch.randn(1, 4, 4, 16, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 2, 2] += 1
    difference = (mixer(changed) - mixer(tokens)).abs().amax(-1)[0]
    reached = torch.zeros(4, 4, dtype=torch.bool)
    reached[2, 2] = True
    reached[1:, 3] = True  # the column to the right, and in it the three neighbours
    reached[3, 1:] = True  # the row below
    assert torch.equal(difference > 0, reached)


def test_long_skips_are_one_map_from_2c_to_c_for_each_decoder_block(build: Build) -> None:
    with_skips, without = build(), build(long_skips=False)
    assert count(with_skips) - count(without) == 2 * (2 * 16 * 16 + 16)
    assert len(without.skips) == 0
    model = on_meta("GSPN-N/2", long_skips=None)
    assert len(model.skips) == 3


def test_without_long_skips_the_blocks_are_a_plain_stack(build: Build) -> None:
    model = build(long_skips=False)
    outputs = branches(model, None)
    for (_, before), (after, _) in itertools.pairwise(outputs):
        assert torch.equal(before, after)


def test_modulated_blocks_have_three_parts_each_and_no_affine_norm() -> None:
    channels = 32
    more = count(GSPNBlock(channels, modulated=True)) - count(GSPNBlock(channels))
    assert more == 3 * channels * (channels + 1) - 2 * channels


def test_a_modulated_block_is_the_identity_at_first_and_its_gate_learns() -> None:
    torch.manual_seed(0)
    block = GSPNBlock(16, modulated=True)
    tokens, conditioning = torch.randn(2, 3, 4, 16), torch.randn(2, 16)
    output = block(tokens, None, conditioning)
    assert torch.equal(output, tokens)
    (output * torch.randn(output.shape)).sum().backward()
    assert block.modulation is not None
    shift, scale, gate = block.modulation.weight.grad.chunk(3)  # type: ignore[union-attr]
    assert bool(gate.any())
    assert not bool(shift.any()) and not bool(scale.any())  # behind the shut gate


def test_a_modulated_block_is_the_plain_one_with_its_norm_and_branch_scaled() -> None:
    """At constant modulation (weight 0): shift and 1 + scale are the affine norm's, the gate multiplies the branch."""
    torch.manual_seed(0)
    plain, modulated = GSPNBlock(16).double(), GSPNBlock(16, modulated=True).double()
    lively(plain)
    state = plain.state_dict()
    gate = torch.randn(16, dtype=torch.float64)
    state["modulation.weight"] = torch.zeros(48, 16, dtype=torch.float64)
    state["modulation.bias"] = torch.cat([state.pop("norm.bias"), state.pop("norm.weight") - 1, gate])
    modulated.load_state_dict(state)
    tokens, scale = torch.randn(2, 3, 4, 16, dtype=torch.float64), torch.tensor([0.0, 1.25])
    expected = tokens + gate * (plain(tokens, scale) - tokens)
    output = modulated(tokens, scale, torch.randn(2, 16, dtype=torch.float64))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_adaln_zero_conditions_every_block_and_not_the_tokens(build: Build) -> None:
    model, (latents, timesteps, labels) = build(conditioning="adaln-zero"), inputs(1)
    first, other = (branches(model, None, (latents, timesteps, label)) for label in (labels, labels + 1))
    assert torch.equal(first[0][0], other[0][0])  # the patches, as they were embedded
    assert not torch.allclose(first[0][1], other[0][1])
    changed = [block.modulation(torch.ones(1, 16, dtype=torch.float64)).any() for block in model.blocks]
    assert all(changed) and len(changed) == 5


# -- stochastic depth ------------------------------------------------------------------------------------------------


def test_rates_rise_linearly_from_zero(build: Build) -> None:
    assert build(drop_path_rate=0.2).drop_path_rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert on_meta("GSPN-B/2").drop_path_rates[-1] == 0.1


def branches(
    model: GSPNTransformer, keep_mask: Tensor | None, arguments: tuple[Tensor, Tensor, Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every block."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for block in model.blocks
    ]
    model(*(arguments or inputs(2)), keep_mask)
    for hook in hooks:
        hook.remove()
    return seen


def test_dropped_branch_is_the_identity_and_a_kept_one_is_scaled(build: Build) -> None:
    model = build(drop_path_rate=0.5)
    keep = torch.ones(5, 2, dtype=torch.bool)
    keep[3, 0] = False
    for layer, (before, after) in enumerate(branches(model, keep)):
        plain = model.blocks[layer](before) - before
        for sample in range(2):
            branch = after[sample] - before[sample]
            if not keep[layer, sample]:
                assert torch.equal(after[sample], before[sample])
            else:
                expected = plain[sample] / (1 - 0.5 * layer / 4)
                torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-6)


def test_a_dropped_branch_has_no_gradient(build: Build) -> None:
    model = build(drop_path_rate=0.5)
    keep = torch.ones(5, 2, dtype=torch.bool)
    keep[2] = False
    model(*inputs(2), keep).square().sum().backward()
    assert all(not bool(p.grad.any()) for p in model.blocks[2].parameters() if p.grad is not None)
    assert all(bool(p.grad.any()) for p in model.blocks[1].parameters() if p.grad is not None)


def test_without_a_mask_nothing_is_dropped_or_scaled(build: Build) -> None:
    model = build(drop_path_rate=0.5)
    for mode in (model.train(), model.eval()):
        for layer, (before, after) in enumerate(branches(mode, None)):
            assert torch.equal(after, model.blocks[layer](before))


def test_all_ones_equal_no_mask_only_at_rate_zero(build: Build) -> None:
    ones = torch.ones(5, 2, dtype=torch.bool)
    model = build(drop_path_rate=0.0)
    torch.testing.assert_close(model(*inputs(), ones), model(*inputs()), rtol=1e-12, atol=1e-12)
    model = build(drop_path_rate=0.5)
    assert not torch.allclose(model(*inputs(), ones), model(*inputs()))


@pytest.mark.parametrize("layers", [4, 6])
def test_mask_of_another_depth_is_refused(build: Build, layers: int) -> None:
    with pytest.raises(ValueError, match=f"keep_mask has {layers} layers, but the model has 5 blocks"):
        build()(*inputs(), torch.ones(layers, 2, dtype=torch.bool))


# -- memory, autocast, compilation -----------------------------------------------------------------------------------


class PlainMixer(GSPNMixer):
    """The same mixer by plain autograd."""

    def forward(self, tokens: Tensor) -> Tensor:
        proxy = self.to_proxy(tokens)
        groups = self.to_logits.out_features // 12
        gates = (layer(proxy).unflatten(-1, (4, -1)) for layer in (self.to_input_gate, self.to_output_gate))
        logits = self.to_logits(proxy).unflatten(-1, (4, 3, groups))
        return gspn_scan(tokens, logits, *gates, self.merge_weight, window=self.window)


def saved_bytes_and_gradients(mixer: GSPNMixer, tokens: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes of the distinct activations that autograd keeps, and the gradients of tokens and parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in mixer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = tokens.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = mixer(tokens)
    weight = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    return sum(kept.values()), list(torch.autograd.grad((output * weight).sum(), [tokens, *mixer.parameters()]))


@pytest.mark.parametrize(("groups", "window"), [(None, None), (4, 2)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_training_keeps_a_quarter_of_the_activations_for_equal_gradients(
    groups: int | None, window: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSPN_SCAN_BACKEND", backend)
    torch.manual_seed(0)
    ours, plain = GSPNMixer(32, groups, window).double(), PlainMixer(32, groups, window).double()
    plain.load_state_dict(ours.state_dict())
    tokens = torch.randn(2, 5, 6, 32, dtype=torch.float64)
    our_bytes, gradients = saved_bytes_and_gradients(ours, tokens)
    plain_bytes, expected = saved_bytes_and_gradients(plain, tokens)
    assert our_bytes >= tokens.nbytes  # the count sees what is kept
    assert our_bytes <= plain_bytes / 4
    for name, gradient, truth in zip(["tokens", *dict(ours.named_parameters())], gradients, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)


def test_bfloat16_autocast_stays_near_float32(build: Build) -> None:
    model, (latents, timesteps, labels) = build().float(), inputs()
    expected = model(latents.float(), timesteps, labels)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(latents.float(), timesteps, labels)
        (output.float().square().mean()).backward()
    error = (output.float() - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05  # it was computed in bfloat16, and close to float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("mask", "options"),
    [pytest.param(False, {}, marks=pytest.mark.slow), (True, {}), pytest.param(True, ABLATED, marks=pytest.mark.slow)],
)
def test_compiled_in_one_graph_equals_eager(build: Build, mask: bool, options: dict[str, Any]) -> None:
    model, arguments = build(depth=2, drop_path_rate=0.5, **options), list(inputs())
    if mask:
        arguments.append(torch.tensor([[True, False], [True, True], [False, True]]))
    parameters = list(model.parameters())
    expected = model(*arguments)
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    gradients = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for gradient, truth in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=1e-8)

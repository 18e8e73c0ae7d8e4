"""Classification backbones: sizes, costs, shapes, stochastic depth, norms, files; without timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.errors import UserError
from gspn_dit.models.backbone_blocks import BackboneBlock, BackboneMixer, ConvResidual, GlobalResponseNorm, Residual
from gspn_dit.models.backbone_model import Architecture, GSPNBackbone
from gspn_dit.models.backbones import BACKBONES, create_backbone, gspn_nano, gspn_tiny, load_backbone
from gspn_dit.models.scans import GSPNMixer

TINY: dict[str, Any] = {"widths": (8, 16), "depths": (2, 1), "global_stages": (1,), "proxy_channels": 2}


def tiny(**options: Any) -> GSPNBackbone:
    """A backbone of two stages that differs from a fresh one: no parameter is left at zero."""
    torch.manual_seed(0)
    model = gspn_nano(**{"num_classes": 5, **TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def meta(name: str) -> GSPNBackbone:
    with torch.device("meta"):
        return create_backbone(name)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "released"),
    [
        ("gspn_tiny", 31_337_468, 31_510_268),
        ("gspn_small", 50_221_250, 50_773_346),
        ("gspn_base", 92_611_828, 93_061_108),
    ],
)
def test_published_sizes(name: str, parameters: int, released: int) -> None:
    """The released models have a skip for each direction; ours is their merged one, which is the same function."""
    model = meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    mixers = [module for module in model.modules() if isinstance(module, GSPNMixer)]
    skips = [mixer.to_skip.weight.numel() for mixer in mixers if mixer.to_skip is not None]
    assert len(skips) == sum(model.architecture.depths)
    assert parameters + 3 * sum(skips) == released


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gspn2_tiny", 23_824_036),
        ("gspn2_small", 51_014_880),
        ("gspn2_base", 88_999_516),
        ("gspn_nano", 742_520),
    ],
)
def test_own_sizes(name: str, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in meta(name).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gspn_tiny", 5.30e9),
        ("gspn_small", 12.0e9),
        ("gspn_base", 15.85e9),
        ("gspn2_tiny", 4.2e9),
        ("gspn2_small", 9.2e9),
        ("gspn2_base", 14.2e9),
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, published: float) -> None:
    assert meta(name).multiply_adds(224, 224) == pytest.approx(published, rel=0.03)


def test_multiply_adds_are_counted_part_by_part() -> None:
    """One block on odd grids, by hand: an image of 9×7 pixels makes a stem of 5×4 and 3×2 tokens."""
    model = create_backbone(
        "gspn_tiny", num_classes=3, in_chans=2, widths=(8,), depths=(1,), global_stages=(0,), proxy_channels=2
    )
    stem = 5 * 4 * 9 * 2 * 4 + 3 * 2 * 9 * 4 * 8
    scan = 12 * 2 * (1 + 12 + 4 + 4 + 1) + 6 * 4 * 12 + 12  # maps from and to the proxy, scan, skip
    block = 8 * 12 + 49 * 12 + scan + 12 * 8 + 2 * 8 * 32
    assert model.multiply_adds(9, 7) == stem + 3 * 2 * block + 8 * 3


def test_where_propagation_is_global() -> None:
    architecture = BACKBONES["gspn_base"].architecture
    windows = [
        [block.mixer.scan.window for block in stage.blocks]  # type: ignore[union-attr]
        for stage in meta("gspn_base").stages
    ]
    assert windows[0] == windows[1] == [2] * 4
    assert windows[2] == [None] * 7 + [2] * 6 + [None, 2]
    assert windows[3] == [None] * 4
    assert architecture.is_global(2, 20) and not architecture.is_global(2, 21)
    assert [meta("gspn_small").architecture.is_global(stage, 0) for stage in range(4)] == [False] * 3 + [True]


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem_stride", "height", "width", "grids"),
    [(4, 224, 160, (56, 40)), (4, 33, 47, (9, 12)), (2, 28, 28, (14, 14)), (1, 5, 9, (5, 9)), (4, 1, 1, (1, 1))],
)
@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_size(stem_stride: int, height: int, width: int, grids: tuple[int, int], in_chans: int) -> None:
    model = tiny(stem_stride=stem_stride, in_chans=in_chans)
    images = torch.randn(1, in_chans, height, width)
    last, (first, second) = model.forward_intermediates(images)
    assert first.shape == (1, 8, *grids)
    assert second.shape == last.shape == (1, 16, *(-(-size // 2) for size in grids))
    assert torch.equal(model.forward_features(images), last)
    assert torch.isfinite(model(images)).all() and model(images).shape == (1, 5)
    assert [info["reduction"] for info in model.feature_info] == [stem_stride, 2 * stem_stride]


def test_a_sample_is_the_same_in_any_company() -> None:
    model, images = tiny(), torch.randn(3, 3, 20, 12)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


def test_head() -> None:
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(images), model.get_classifier()(pooled))
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.double().reset_classifier(7, "avg")
    assert model(images.double()).shape == (2, 7) and model.num_classes == 7


def test_intermediates() -> None:
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    last, (first, second) = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(second, last)
    (raw,) = model.forward_intermediates(images, indices=[-1], intermediates_only=True)
    torch.testing.assert_close(model.norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), last)
    stopped, (alone,) = model.forward_intermediates(images, indices=[0], stop_early=True, output_fmt="NHWC")
    assert torch.equal(stopped, first) and torch.equal(alone, first.permute(0, 2, 3, 1))
    assert model.prune_intermediate_layers([0]) == [0]
    assert len(model.stages) == 1 and model.num_features == model.head_hidden_size == 8
    assert torch.equal(model(images), first)


# -- parts -----------------------------------------------------------------------------------------------------------


def test_global_response_norm() -> None:
    norm, tokens = GlobalResponseNorm(2), torch.tensor([3.0, 1.0, 4.0, 0.0]).reshape(1, 2, 1, 2)
    assert torch.equal(norm(tokens), tokens)
    with torch.no_grad():
        norm.gamma.copy_(torch.tensor([3.0, 6.0]))
        norm.beta.copy_(torch.tensor([0.0, 1.0]))
    # Norms 5 and 1 over their mean 3: the first channel is multiplied by 1 + 3·5/3, the second by 1 + 6·1/3.
    torch.testing.assert_close(norm(tokens).flatten(), torch.tensor([18.0, 4.0, 24.0, 1.0]), rtol=1e-5, atol=0)
    zero = torch.zeros(1, 2, 2, 2, requires_grad=True)
    norm(zero).sum().backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all()


def test_the_scan_sees_as_far_as_its_window() -> None:
    """A pixel of the first token's changes the last token through global propagation alone."""

    def reaches(stage: int) -> bool:
        model = tiny(global_stages=(stage,), depths=(1, 1), local_kernel=0)
        block = model.stages[1].blocks[0]  # type: ignore[index, union-attr]
        tokens = torch.randn(1, 8, 8, 16, requires_grad=True)
        block.mixer.scan(block.mixer.in_proj(tokens))[0, -1, -1].sum().backward()
        assert tokens.grad is not None
        return bool(tokens.grad[0, 0, 0].abs().sum() > 0)

    assert reaches(1) and not reaches(0)


def test_mixer_is_differentiable_to_the_last_weight() -> None:
    model = tiny(lpu=True, weight_groups=1).double()
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = gspn_tiny(widths=(64, 128), depths=(1, 1), global_stages=(), num_classes=200)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        elif name.endswith(("bias", "gamma", "beta")):
            assert not parameter.any(), name
        else:
            assert (parameter == 1).all(), name
    own = gspn_nano()
    gates = own.stages[0].blocks[0].mixer.scan.to_input_gate.weight  # type: ignore[index, union-attr]
    assert gates.std().item() == pytest.approx(4**-0.25 / 8**0.5, rel=0.1)
    between = own.stem[2]
    assert isinstance(between, ConvResidual)
    assert between.first.weight.std().item() == pytest.approx((9 * 32) ** -0.5, rel=0.05)
    assert own.blocks[0].mlp.contract.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)  # type: ignore[union-attr]
    assert own.head.weight.std().item() == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr]


def test_convolutions_between_those_of_the_stem() -> None:
    torch.manual_seed(0)
    block = ConvResidual(3)
    tokens = torch.randn(2, 5, 4, 3)
    images = block.norm(tokens).permute(0, 3, 1, 2)
    branch = block.second(torch.nn.functional.gelu(block.first(images)))
    torch.testing.assert_close(block(tokens), tokens + branch.permute(0, 2, 3, 1))
    plain, more = (
        create_backbone("gspn_tiny", widths=(8,), depths=(1,), global_stages=(), stem_blocks=n) for n in (0, 2)
    )
    # Two of two convolutions of 4 to 4 channels on the grid behind the stem's first convolution.
    assert more.multiply_adds(9, 7) - plain.multiply_adds(9, 7) == 2 * 2 * 5 * 4 * 9 * 4 * 4


# -- stochastic depth ------------------------------------------------------------------------------------------------


def test_rates_rise_to_the_last_block() -> None:
    model = tiny(drop_path_rate=0.4)
    assert model.drop_path_rates == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.4, 0.4])
    assert [module.row for module in model.modules() if isinstance(module, Residual)] == [*range(6)]
    assert gspn_tiny(**TINY).drop_path_rates[-1] == 0.2


def test_keep_mask_drops_branches_by_sample() -> None:
    model, images = tiny(drop_path_rate=0.4), torch.randn(2, 3, 16, 16)
    kept = torch.ones(6, 2, dtype=torch.bool)
    kept[4:, 0] = False  # both branches of the last block, of the first image
    with torch.no_grad():
        (before,), tokens = model.forward_intermediates(images, [0], intermediates_only=True), None
        tokens = model.stages[1].downsample(before.permute(0, 2, 3, 1))  # type: ignore[operator, union-attr]
        expected = model.forward_head(model.norm(tokens).permute(0, 3, 1, 2))[0]
        scaled = tiny(drop_path_rate=0.0)
        scaled.load_state_dict(model.state_dict())
        for row, residual in enumerate(module for module in model.modules() if isinstance(module, Residual)):
            residual.rate = 0.0 if row < 4 else residual.rate
        masked = model(images, kept)
        torch.testing.assert_close(masked[0], expected)
        assert not torch.allclose(masked[1], model(images)[1])  # kept branches are divided by 1 - rate
    block = model.stages[1].blocks[0]  # type: ignore[index, union-attr]
    assert isinstance(block, BackboneBlock)
    tokens = torch.randn(2, 3, 3, 16)
    torch.testing.assert_close(
        block.mlp_residual(tokens, tokens, kept) - tokens, tokens * torch.tensor([0.0, 1 / 0.6])[:, None, None, None]
    )


def test_without_a_mask_training_draws_and_evaluation_does_not() -> None:
    model, images = tiny(drop_path_rate=0.9), torch.randn(8, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.train()
    torch.manual_seed(1)
    first = model(images)
    assert not torch.equal(first, model(images))
    torch.manual_seed(1)
    assert torch.equal(first, model(images))


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(masked: bool) -> None:
    images, kept = torch.randn(4, 3, 16, 16), torch.rand(6, 4) > 0.3

    def gradients(enable: bool) -> list[Tensor]:
        model = tiny(drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        model(images, kept if masked else None).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_the_residual_stream_is_float32_under_autocast() -> None:
    seen = []
    model = tiny()
    for module in model.modules():
        if isinstance(module, Residual):
            module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[1].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(1, 3, 16, 16))
    assert seen == [(torch.bfloat16, torch.float32)] * 6
    assert out.dtype == torch.bfloat16


# -- training helpers ------------------------------------------------------------------------------------------------


def test_what_weight_decay_leaves_alone() -> None:
    model = tiny()
    alone = model.no_weight_decay()
    assert {"head.bias", "norm.weight", "stages.0.blocks.0.mixer.scan.merge_weight"} <= alone
    assert {"stages.1.blocks.0.mixer.response_norm.gamma", "stem.0.conv.bias"} <= alone
    assert not {"head.weight", "stages.0.blocks.0.mixer.local_conv.weight", "stem.0.conv.weight"} & alone
    assert len(model.blocks) == 3


# -- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, images = tiny(in_chans=2), torch.randn(2, 2, 20, 16)
    model.save_pretrained(tmp_path / "saved")
    loaded = load_backbone(tmp_path / "saved")
    assert loaded.architecture == model.architecture and loaded.preset == "gspn_nano"
    assert torch.equal(loaded(images), model(images)) and not loaded.training
    model.reset_classifier(0)
    model.save_pretrained(tmp_path / "saved")
    assert load_backbone(tmp_path / "saved").num_classes == 0
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    pruned = tiny()
    pruned.prune_intermediate_layers([0])
    with pytest.raises(ValueError, match="prune_intermediate_layers and cannot be saved"):
        pruned.save_pretrained(tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "resnet50"}))
    with pytest.raises(UserError, match="unknown backbone 'resnet50'; allowed are gspn_tiny"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 6}))
    with pytest.raises(UserError, match=r"cannot be read .* size mismatch for head.weight"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_backbone("./nowhere/at/all")


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "unknown option 'depth' of gspn_tiny; allowed are proxy_channels, .*widths"),
        ({"depths": (1, 2)}, "widths gives 4 stages and depths 2"),
        ({"widths": (), "depths": ()}, "widths is empty"),
        ({"widths": (1, 2, 4, 8)}, "widths is .*at least 2"),
        ({"depths": (1, 0, 1, 1)}, "depths is .*at least 1"),
        ({"global_stages": (4,)}, "global_stages is .*0 to 3"),
        ({"stem_blocks": -1}, "stem_blocks is -1, but must be at least 0"),
        ({"stem_stride": 3}, "stem_stride is 3, but must be 1, 2 or 4"),
        ({"window": 0}, "window is 0"),
        ({"local_kernel": 4}, "local_kernel is 4, but must be odd"),
        ({"expansion": 0.001}, "expansion 0.001 leaves no channel"),
        ({"proxy_channels": 0}, "proxy_channels is 0"),
        ({"weight_groups": 7}, "weight_groups 7 does not divide"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"global_pool": "max"}, "unknown global_pool 'max'"),
        ({"global_pool": ""}, "num_classes is 1000, .*0 with global_pool=''"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gspn_tiny(**options)


def test_bad_calls() -> None:
    model, images = tiny(), torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="unknown backbone 'gspn_huge'; allowed are gspn_tiny"):
        create_backbone("gspn_huge")
    with pytest.raises(ValueError, match="unknown output_fmt 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")
    with pytest.raises(ValueError, match=r"stages \[2\] are asked for, but there are 0 to 1"):
        model.forward_intermediates(images, [2])
    with pytest.raises(ValueError, match="keep_mask has 5 rows, but the model has 6 branches"):
        model(images, torch.ones(5, 1, dtype=torch.bool))
    assert isinstance(model.stages[0].blocks[0].mixer, BackboneMixer)  # type: ignore[index, union-attr]
    assert Architecture(widths=[4], depths=[1], global_stages=[]).widths == (4,)

"""RMSNorm, SwiGLU and rotary positions of DiT's blocks: by their formulas, in checkpoints, compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gspn_dit.config import ModelConfig
from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.models.dit import DiTBlock, mlp_width
from gspn_dit.models.embeddings import rotate
from gspn_dit.models.flops import forward_multiply_adds
from gspn_dit.models.mixers import AttentionMixer, AttentionOptions
from gspn_dit.pipeline import GSPNPipeline
from tests.models.conftest import lively
from tests.models.test_dit import count, inputs
from tests.training.conftest import changed, run_training, tiny_config

ALL = {"norm": "rms", "mlp": "swiglu", "rotary": True}

Build = Callable[..., DiffusionModel]


@pytest.mark.parametrize(("channels", "width"), [(3, 8), (64, 176), (384, 1024), (1152, 3072)])
def test_swiglu_has_about_as_many_weights(channels: int, width: int) -> None:
    assert mlp_width(channels, "swiglu") == width
    assert mlp_width(channels, "gelu") == 4 * channels


def test_a_block_by_its_formulas() -> None:
    torch.manual_seed(0)
    mixer = AttentionMixer(8, AttentionOptions(num_heads=2))
    block = DiTBlock(8, mixer, norm="rms", mlp="swiglu").double()
    lively(block)
    tokens, conditioning = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    parts = block.modulation(conditioning)

    def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    middle = tokens + parts[2] * mixer(normed(tokens, parts[0], parts[1]))
    hidden = normed(middle, parts[3], parts[4]) @ block.expand.weight.T + block.expand.bias
    gate, value = hidden[..., :24], hidden[..., 24:]
    expected = middle + parts[5] * (
        (gate / (1 + torch.exp(-gate)) * value) @ block.contract.weight.T + block.contract.bias
    )
    torch.testing.assert_close(block(tokens, conditioning), expected, rtol=1e-10, atol=1e-10)


def test_rotation_by_hand() -> None:
    """D = 4: one pair for the column and one for the row, both at frequency 1; place (0, 0) stays."""
    vectors = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(2, 3, 4)
    angles = torch.arange(3.0)
    turned = rotate(vectors)
    assert turned[0, 0].tolist() == [1, 0, 0, 1]
    for row in range(2):
        torch.testing.assert_close(turned[row, :, 0], angles.cos())
        torch.testing.assert_close(turned[row, :, 1], angles.sin())
        torch.testing.assert_close(turned[row, :, 2], torch.full((3,), -torch.tensor(float(row)).sin()))
    wide = rotate(torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).expand(1, 2, 8))
    torch.testing.assert_close(wide[0, 1, :4], torch.cat([f(torch.tensor([1.0, 0.1])) for f in (torch.cos, torch.sin)]))


def test_products_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 16, dtype=torch.float64).expand(2, 5, 6, 16)
    a, b = rotate(query).float(), rotate(key).float()
    for down, right in ((0, 0), (1, 2), (3, 1)):
        products = (a[down:, right:] * b[: 5 - down, : 6 - right]).sum(-1)
        torch.testing.assert_close(products, products[:1, :1].expand_as(products), rtol=1e-4, atol=1e-4)


def test_rotary_attention_knows_places_without_positions(build: Build) -> None:
    model = build(name="DiT-N/2", depth=2, hidden_size=16, num_heads=2, positions=False)
    turned = build(name="DiT-N/2", depth=2, hidden_size=16, num_heads=2, positions=False, rotary=True)
    turned.load_state_dict(model.state_dict())
    latents, timesteps, labels = inputs()
    for one, equal in ((model, True), (turned, False)):
        moved = one(latents.roll(4, -1), timesteps, labels).roll(-4, -1)
        assert torch.allclose(moved, one(latents, timesteps, labels), atol=1e-9) == equal


@pytest.mark.parametrize("options", [{"norm": "rms"}, {"mlp": "swiglu"}, {"rotary": True}, ALL])
def test_every_weight_has_a_gradient_and_any_size_will_do(build: Build, options: dict[str, Any]) -> None:
    model = build(name="DiT-N/2", depth=2, **options)
    model(*inputs(4)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    latents = torch.randn(1, 2, 4, 12, dtype=torch.float64)
    assert model(latents, torch.tensor([500.0]).double(), torch.tensor([0])).shape == latents.shape


def test_sizes_of_s() -> None:
    with torch.device("meta"):
        plain, other = (create_model("DiT-S/2", 1000, 4, 32, 8, **options) for options in ({}, ALL))
    # 12 blocks: two maps of 384·1536 and their biases, or three of 384·1024.
    assert count(other) - count(plain) == 12 * (2 * 1024 - 1536)
    assert forward_multiply_adds(plain, 32, 32) == forward_multiply_adds(other, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "unknown norm 'batch'; allowed are layer, rms"),
        ({"mlp": "relu"}, "unknown mlp 'relu'; allowed are gelu, swiglu"),
        ({"rotary": True, "num_heads": 64}, "rotary needs heads whose channels 4 divides, not 6"),
        ({"rotary": True, "mixer": "linear"}, "num_heads and rotary are options of attention; give mixer attention"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model("DiT-S/2", 10, 4, 32, **options)


def test_options_of_one_family_alone() -> None:
    with pytest.raises(ValueError, match=r"model.mlp is for DiT and GSPN2 models, but model.name is GSPN-B/2"):
        ModelConfig(mlp="swiglu")
    with pytest.raises(ValueError, match=r"model.gate_norm is for GSPN models, but model.name is DiT-S/2"):
        ModelConfig(name="DiT-S/2", gate_norm=True)


def test_they_come_back_from_a_checkpoint_and_sample_as_they_trained(tmp_path: Path) -> None:
    options = {"name": "DiT-N/4", "depth": 2, "num_heads": 2, "norm": "rms", "mlp": "swiglu"}
    model = {**options, "mixer_options": {"rotary": True}, "interpolate_positions": True}
    config = changed(tiny_config(tmp_path / "run", max_steps=2), model=model, objective={"prediction": "data"})
    run_training(config)
    pipeline = GSPNPipeline.from_checkpoint(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    block = pipeline.model.blocks[0]
    assert block.rms and block.gated and block.mixer.rotary and pipeline.model.interpolate_positions
    pipeline.save_pretrained(tmp_path / "saved")
    again = GSPNPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    first, second = (one([3], num_inference_steps=2, output_type="pt").images for one in (pipeline, again))
    assert torch.equal(first, second)
    run_training(changed(config, training={"max_steps": 3}), resume="auto")


@pytest.mark.slow
def test_compiled_in_one_graph_equals_eager(build: Build) -> None:
    model, arguments = build(name="DiT-N/2", depth=1, **ALL), inputs()
    expected = model(*arguments)
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

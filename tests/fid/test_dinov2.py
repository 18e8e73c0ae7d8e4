"""DINOv2 from a local directory: the model against PyTorch's own transformer layers, and FD-DINOv2 in the same pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fid
from fid.dinov2 import VisionConfig, VisionTransformer, own_names, read_directory
from fid.extraction import extract_all
from fid.features import load_dinov2
from fid.images import LabelledImages, Reference
from fid.metrics import frechet_distance
from gspn_dit.errors import UserError
from tests.fid.conftest import noise_images, tiny_net

CONFIG = VisionConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, patch_size=56, image_size=336)


def write_model(folder: Path, config: VisionConfig = CONFIG, **more: object) -> Path:
    """A directory in the Hugging Face form, with random weights."""
    net = VisionTransformer(config)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in net.state_dict().items()}
    folder.mkdir(exist_ok=True)
    names = own_names(config.num_hidden_layers)
    assert sorted(names.values()) == sorted(state)  # every tensor of the model comes from the file
    save_file({theirs: state[ours] for theirs, ours in names.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**vars(config), "model_type": "dinov2", **more}))
    return folder


def test_a_block_is_pytorch_s_transformer_layer_with_scales(tmp_path: Path) -> None:
    net, _ = read_directory(write_model(tmp_path))
    block = net.blocks[0]
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", CONFIG.layer_norm_eps, batch_first=True, norm_first=True)
    with torch.no_grad():
        parts = (block.query, block.key, block.value)
        layer.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        scaled = (layer.self_attn.out_proj, block.out, block.scale1), (layer.linear2, block.fc2, block.scale2)
        for theirs, ours, scale in scaled:
            theirs.weight.copy_(scale[:, None] * ours.weight)
            theirs.bias.copy_(scale * ours.bias)
        for theirs, ours in ((layer.linear1, block.fc1), (layer.norm1, block.norm1), (layer.norm2, block.norm2)):
            theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(block(tokens), layer.train()(tokens), rtol=1e-4, atol=1e-5)


def test_the_class_token_is_what_comes_out(tmp_path: Path) -> None:
    net, sha256 = read_directory(write_model(tmp_path))
    assert len(sha256) == 64 and not net.training
    assert net.positions_for(6) is net.positions
    assert net.positions_for(4).shape == (1, 17, 12)
    assert torch.equal(net.positions_for(4)[:, :1], net.positions[:, :1])
    constant = VisionTransformer(CONFIG)
    constant.positions.data.fill_(0.25)
    torch.testing.assert_close(constant.positions_for(4), torch.full((1, 17, 12), 0.25))
    images = 0.02 * torch.randn(2, 3, 224, 224)
    assert net(images).shape == (2, 12)
    # patches that swap their places change the features through the positions alone
    swapped = torch.cat([images[..., 56:112], images[..., :56], images[..., 112:]], dim=-1)
    assert not torch.allclose(net(swapped), net(images), atol=1e-3)
    net.positions.data.zero_()
    torch.testing.assert_close(net(swapped), net(images), rtol=1e-4, atol=1e-4)


def test_its_distance_is_reported_beside_the_others(tmp_path: Path) -> None:
    net = load_dinov2(write_model(tmp_path))
    assert net.names["fd"] == "FD-DINOv2-12x2"  # ViT-L/14 alone is FD-DINOv2
    drawn, real = LabelledImages(noise_images(20, 0), "drawn"), LabelledImages(noise_images(22, 1), "real")
    report = fid.score(drawn, Reference(real), tiny_net(), others=[net])
    expected = frechet_distance(*(extract_all(images, [net])[0][0].features for images in (drawn, real)))
    assert report["scores"]["FD-DINOv2-12x2"] == pytest.approx(expected, rel=1e-6)
    assert report["intervals"]["FD-DINOv2-12x2"]["high"] > expected
    assert report["settings"]["other_nets"]["FD-DINOv2-12x2"]["sha256"] == net.sha256
    few = LabelledImages(noise_images(12, 0), "few")
    with pytest.raises(UserError, match=r"FD-DINOv2-12x2 needs at least 13 sample images \(its 12 features \+ 1\)"):
        fid.score(few, Reference(real), tiny_net(), others=[net])


def test_directories_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json; it must hold config\.json and model\.safetensors"):
        load_dinov2(tmp_path)
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_dinov2(folder)
    write_model(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"is no DINOv2 model that can be read: .*encoder\.layer\.2"):
        load_dinov2(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_dinov2(folder)

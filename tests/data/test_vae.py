"""Which autoencoder is which, and which directories hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from gspn_dit.data.autoencoders import adapt, configured_scale
from gspn_dit.data.vae import load_vae, vae_hash
from gspn_dit.errors import UserError
from tests.data.tiny_vae import write_vae


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def test_loaded_autoencoder_is_frozen_and_in_float32(saved: Path) -> None:
    vae = load_vae(saved)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    assert adapt(vae).factor == 2
    assert configured_scale(vae.config) == (0.5, 0.25)


def test_hash_is_of_architecture_and_weights_alone(saved: Path, tmp_path: Path) -> None:
    digest = vae_hash(load_vae(saved))
    assert vae_hash(load_vae(write_vae(tmp_path / "other scale", scale=3.0, shift=0.0))) == digest
    assert vae_hash(load_vae(write_vae(tmp_path / "other seed", seed=1))) != digest
    vae = load_vae(saved)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    assert vae_hash(load_vae(tmp_path / "pipeline")) == digest
    next(iter(vae.parameters())).view(-1)[0] += 1e-6
    assert vae_hash(vae) != digest
    config = json.loads((tmp_path / "pipeline" / "vae" / "config.json").read_text())
    (tmp_path / "pipeline" / "vae" / "config.json").write_text(json.dumps({**config, "norm_num_groups": 2}))
    assert vae_hash(load_vae(tmp_path / "pipeline")) != digest


def test_scale_and_shift_per_channel() -> None:
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), latent_channels=2, scaling_factor=0.5,
                        latents_mean=[1.0, 2.0], latents_std=[0.25, 4.0])  # fmt: skip
    assert configured_scale(vae.config) == ([2.0, 0.125], [1.0, 2.0])
    vae.register_to_config(latents_mean=None, latents_std=None, shift_factor=None)
    assert configured_scale(vae.config) == (0.5, 0.0)


def test_what_is_no_autoencoder_is_refused_in_one_line(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent does not exist; give an AutoencoderKL's directory"):
        load_vae(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be loaded as an AutoencoderKL"):
        load_vae(tmp_path / "empty")
    vae = AutoencoderKL(in_channels=4, out_channels=4, norm_num_groups=4, block_out_channels=(4,))
    vae.save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match="maps 4 channels to 4; needed are 1 or 3"):
        load_vae(tmp_path / "four")


def test_pickled_weights_are_not_read(saved: Path, tmp_path: Path) -> None:
    load_vae(saved).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="AutoencoderKL with safetensors") as caught:
        load_vae(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_are_named(saved: Path, tmp_path: Path) -> None:
    vae = load_vae(saved)
    state = {name: tensor for name, tensor in vae.state_dict().items() if name != "quant_conv.bias"}
    vae.save_config(tmp_path)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"it has no weights 'quant_conv\.bias'"):
        load_vae(tmp_path)

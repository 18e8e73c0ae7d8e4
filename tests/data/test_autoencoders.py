"""Every class of autoencoder behind one interface, with random weights: normalised once, and back to the same image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

from gspn_dit.config import LatentConfig
from gspn_dit.data.autoencoders import AUTOENCODERS, adapt, pack, unpack
from gspn_dit.data.latents import AutoencoderLatent, create_latent, latent_from_spec, latent_shape, to_signed
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import UserError

SIZE = 32


def kl() -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIZE,
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, latent_channels=2, scaling_factor=0.5,
        latents_mean=[0.1, -0.2], latents_std=[0.5, 3.0],
    )  # fmt: skip


def dc() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41407,
    )  # fmt: skip


def rae() -> Any:
    statistics = torch.Generator().manual_seed(1)
    return diffusers.AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=7, encoder_input_size=28, patch_size=8,
        encoder_num_hidden_layers=1, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, latents_mean=torch.randn(64, 4, 4, generator=statistics),
        latents_std=0.5 + torch.rand(64, 4, 4, generator=statistics), scaling_factor=1.5,
    )  # fmt: skip


def flux2() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIZE,
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, latent_channels=3,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 12))
    vae.bn.running_var.copy_(torch.linspace(0.2, 4, 12))
    return vae


# kind: what builds one, its latent's channels, and pixels per cell
CLASSES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "kl": (kl, 2, 2),
    "dc": (dc, 4, 4),
    "rae": (rae, 64, 8),
    "flux2": (flux2, 12, 4),
}


@pytest.fixture(scope="module", params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def place(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("autoencoders") / kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLASSES[kind][0]().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def latent(kind: str, place: Path) -> AutoencoderLatent:
    made = create_latent(LatentConfig(name=kind, vae=str(place)), SIZE, 3)  # type: ignore[arg-type]
    assert isinstance(made, AutoencoderLatent)
    return made


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def own_reconstruction(kind: str, vae: Any, images: torch.Tensor) -> torch.Tensor:
    """What the class itself says, in [-1, 1]; each of them decodes the mean of a posterior."""
    if kind == "rae":
        return 2 * vae((images + 1) / 2).sample - 1
    return vae(images).sample


def test_sizes_come_from_grids(kind: str, latent: AutoencoderLatent) -> None:
    _, channels, factor = CLASSES[kind]
    assert (latent.channels, latent.factor, latent.size) == (channels, factor, SIZE // factor)
    assert latent.has_posterior is (kind in ("kl", "flux2"))


@torch.no_grad()
def test_there_and_back_is_the_class_own_reconstruction(
    kind: str, latent: AutoencoderLatent, pixels: np.ndarray
) -> None:
    encoded = latent.encode(pixels)
    assert encoded.shape == (3, latent.channels, latent.size, latent.size) and encoded.dtype == torch.float32
    images = latent.autoencoder.decode(latent.denormalise(encoded))
    expected = own_reconstruction(kind, latent.vae, to_signed(pixels))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3  # not a constant that anything would equal
    assert latent.decode(encoded).shape == pixels.shape


@torch.no_grad()
def test_latents_are_normalised_once(kind: str, latent: AutoencoderLatent, pixels: np.ndarray) -> None:
    """By hand, for each class as its own pipelines do it."""
    vae, images = latent.vae, to_signed(pixels)
    if kind == "kl":
        mean, std = torch.tensor([0.1, -0.2]).view(2, 1, 1), torch.tensor([0.5, 3.0]).view(2, 1, 1)
        expected = (vae.encode(images).latent_dist.mean - mean) / std * 0.5
    elif kind == "dc":
        expected = vae.encode(images).latent * 0.41407
    elif kind == "rae":
        expected = vae.encode((images + 1) / 2).latent  # it normalises inside
        assert (latent.scale, latent.shift) == (1.0, 0.0)
    else:
        packed = Flux2Pipeline._patchify_latents(vae.encode(images).latent_dist.mean)
        mean, variance = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        expected = (packed - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
    torch.testing.assert_close(latent.encode(pixels), expected, atol=1e-5, rtol=1e-5)


def test_noise_draws_from_a_posterior_where_there_is_one(
    kind: str, latent: AutoencoderLatent, pixels: np.ndarray
) -> None:
    noise = torch.ones(3, latent.channels, latent.size, latent.size)
    moved = not torch.equal(latent.encode(pixels, noise), latent.encode(pixels))
    assert moved is latent.has_posterior


def test_spec_leads_back_to_the_same_latent(
    kind: str, latent: AutoencoderLatent, place: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    again = latent_from_spec(latent.spec())
    assert latent.spec()["name"] == kind and again.spec() == latent.spec()
    saved = latent_from_spec(latent.save(tmp_path), directory=tmp_path)
    assert torch.equal(saved.encode(pixels), latent.encode(pixels))
    latent.vae.register_to_config(_name_or_path=str(place))


def test_another_kind_is_refused_by_name(kind: str, place: Path) -> None:
    other = "dc" if kind != "dc" else "kl"
    with pytest.raises(UserError, match=f"latent.name is {other}, but .* set latent.name {kind}"):
        create_latent(LatentConfig(name=other, vae=str(place)), SIZE, 3)  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_refused(kind: str, latent: AutoencoderLatent) -> None:
    said = "takes images of 32 pixels, not of 34" if kind == "rae" else "not divisible by the factor"
    with pytest.raises(UserError, match=said):
        AutoencoderLatent(latent.vae, SIZE + (2 if kind == "rae" else 1), "x")


def test_other_sizes_are_drawn_where_the_class_can(kind: str, latent: AutoencoderLatent) -> None:
    """A representation autoencoder decodes a square of one size; it is said before a step is taken."""
    channels, factor, size = latent.channels, latent.factor, latent.size
    assert latent_shape(latent, 1, SIZE, None) == (channels, size, size)
    if kind != "rae":
        assert latent_shape(latent, 1, 2 * SIZE, SIZE) == (channels, 2 * SIZE // factor, size)
        return
    for height, width, said in ((2 * SIZE, None, "height is 64"), (None, 24, "width is 24")):
        with pytest.raises(ValueError, match=f"{said} pixels, but the autoencoder draws 32x32 alone"):
            latent_shape(latent, 1, height, width)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit: its class is VQModel; supported are AutoencoderKL, Auto"):
        load_vae(tmp_path)
    with pytest.raises(UserError, match="its class is Linear; supported are"):
        adapt(torch.nn.Linear(1, 1))
    assert {adapter.class_name for adapter in AUTOENCODERS.values()} <= set(dir(diffusers))


def test_packing_is_that_of_the_pipeline() -> None:
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(latents, 2), Flux2Pipeline._patchify_latents(latents))
    assert torch.equal(unpack(pack(latents, 2), 2), latents)

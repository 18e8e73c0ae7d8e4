"""Identity and KL latents, and the way back to 8 bits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspn_dit.config import LatentConfig
from gspn_dit.data.autoencoders import KLAutoencoder
from gspn_dit.data.latents import AutoencoderLatent, IdentityLatent, create_latent, latent_from_spec, to_uint8
from gspn_dit.data.vae import load_vae, vae_hash
from gspn_dit.errors import UserError
from tests.data.tiny_vae import CHANNELS, SIZE, write_vae


def test_all_256_values_survive_the_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    latent = IdentityLatent(16, 1)
    np.testing.assert_array_equal(latent.decode(latent.encode(pixels)), pixels)


def test_encoding_by_hand() -> None:
    """v / 127.5 - 1, channels first."""
    pixels = np.array([[[[0, 255, 51], [102, 153, 204]]]], dtype=np.uint8)  # [1, 1, 2, 3]
    encoded = IdentityLatent(2, 3).encode(pixels)
    assert encoded.dtype == torch.float32
    assert encoded.shape == (1, 3, 1, 2)
    expected = [[-1, 102 / 127.5 - 1], [1, 153 / 127.5 - 1], [51 / 127.5 - 1, 204 / 127.5 - 1]]
    torch.testing.assert_close(encoded[0, :, 0], torch.tensor(expected))


def test_encoding_takes_views_and_leaves_them_alone() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    mirrored = pixels[:, :, ::-1]
    encoded = IdentityLatent(2, 3).encode(mirrored)
    assert torch.equal(encoded, IdentityLatent(2, 3).encode(mirrored.copy()))
    assert torch.equal(encoded, IdentityLatent(2, 3).encode(pixels).flip(3))
    np.testing.assert_array_equal(pixels.ravel(), np.arange(24))


@pytest.mark.parametrize(
    ("value", "pixel"),
    [
        (-1.0, 0),  # 0.5
        (1.0, 255),  # 255.5
        (0.0, 128),  # 128
        (-0.001, 127),  # 127.8725: cut off, not rounded
        (0.0078, 128),  # 128.9945
        (0.00785, 129),  # 129.000875
        (-7.0, 0),
        (7.0, 255),
        (-1.005, 0),  # -0.1375: clamped before it is cut off
        (0.9999, 255),  # 255.48725
    ],
)
def test_8_bits_are_cut_off_not_rounded(value: float, pixel: int) -> None:
    """127.5·x + 128, clamped to [0, 255], truncated: ADM's protocol."""
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == pixel


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_8_bits_follow_the_formula(values: list[float]) -> None:
    expected = [int(min(max(float(np.float32(127.5 * np.float32(v)) + np.float32(128)), 0.0), 255.0)) for v in values]
    images = torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)
    assert to_uint8(images).ravel().tolist() == expected


def test_8_bits_are_channels_last_and_keep_the_batch() -> None:
    images = (torch.arange(24).reshape(2, 3, 2, 2) - 128) / 127.5
    pixels = to_uint8(images)
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.uint8, (2, 2, 2, 3), True)
    np.testing.assert_array_equal(pixels, np.arange(24).reshape(2, 3, 2, 2).transpose(0, 2, 3, 1))
    assert to_uint8(torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2, 3)


def test_8_bits_of_other_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert to_uint8(torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=dtype).reshape(1, 1, 2, 2)).ravel().tolist() == [
            *(0, 128, 191, 255),
        ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_counted(bad: float) -> None:
    images = torch.zeros(5, 3, 2, 2)
    images[1, 2, 0, 1] = bad
    images[1, 0, 0, 0] = bad  # twice in one image
    images[4, 0, 1, 1] = bad
    with pytest.raises(UserError, match=r"2 of 5 samples hold NaN or infinite values: .*; use an earlier checkpoint"):
        to_uint8(images)
    with pytest.raises(UserError, match="2 of 5"):
        IdentityLatent(2, 3).decode(images)


def test_spec_round_trip() -> None:
    latent = create_latent(LatentConfig(), 28, 3)
    assert (latent.size, latent.channels) == (28, 3)
    spec = json.loads(json.dumps(latent.spec()))
    assert spec == {"name": "identity", "image_size": 28, "image_channels": 3}
    again = latent_from_spec(spec)
    assert type(again) is type(latent)
    assert (again.size, again.channels, again.spec()) == (28, 3, spec)


@pytest.mark.parametrize("spec", [{"name": "magic"}, {}])
def test_unknown_latent_is_refused_by_name(spec: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"latent '{spec.get('name')}' is not known"):
        latent_from_spec(spec)


@pytest.fixture(scope="module")
def vae_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("latents") / "vae")


@pytest.fixture(scope="module")
def kl(vae_directory: Path) -> AutoencoderLatent:
    latent = create_latent(LatentConfig("kl", str(vae_directory)), SIZE, 1)
    assert isinstance(latent, AutoencoderLatent)
    return latent


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 1), dtype=np.uint8)


def test_kl_latent_is_a_draw_from_the_posterior_shifted_and_scaled(kl: AutoencoderLatent) -> None:
    """(mean + std · noise - 0.25) · 0.5, with the posterior that diffusers gives."""
    images, noise = some_images(11), torch.randn(11, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    posterior = kl.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    expected = (posterior.mean + posterior.std * noise - 0.25) * 0.5
    torch.testing.assert_close(kl.encode(images, noise), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl.encode(images), (posterior.mean - 0.25) * 0.5, rtol=1e-5, atol=1e-6)
    assert kl.moments(images).shape == (11, 2 * CHANNELS, 4, 4)
    assert (kl.channels, kl.size, kl.image_size, kl.image_channels, kl.factor) == (CHANNELS, 4, SIZE, 1, 2)


def test_kl_decodes_what_the_autoencoder_encoded(kl: AutoencoderLatent) -> None:
    images = some_images(9)
    means = kl.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
    expected = to_uint8(kl.vae.decode(means).sample)
    assert np.abs(kl.decode(kl.encode(images)).astype(int) - expected).max() <= 1
    assert kl.decode(torch.zeros(0, CHANNELS, 4, 4)).shape == (0, SIZE, SIZE, 1)
    with pytest.raises(UserError, match="1 of 1 samples hold NaN"):
        kl.decode(torch.full((1, CHANNELS, 4, 4), math.nan))


def test_scale_and_shift_may_differ_by_channel(kl: AutoencoderLatent, vae_directory: Path) -> None:
    latent = AutoencoderLatent(kl.vae, SIZE, "x", scale=[2.0, 4.0], shift=[1.0, -1.0])
    moments = torch.zeros(1, 2 * CHANNELS, 4, 4)
    assert latent.draw(moments)[0, :, 0, 0].tolist() == [-2.0, 4.0]
    np.testing.assert_array_equal(latent.decode(latent.draw(moments)), kl.decode(kl.draw(moments)))


def test_an_autoencoder_is_asked_for_its_sizes_once(vae_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, asked = KLAutoencoder.encode, []

    def count(self: KLAutoencoder, images: torch.Tensor) -> Any:
        asked.append(images.shape)
        return encode(self, images)

    monkeypatch.setattr(KLAutoencoder, "encode", count)
    create_latent(LatentConfig("kl", str(vae_directory)), 32, 3)
    assert len(asked) == 1


def test_large_latents_are_decoded_in_tiles(vae_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gspn_dit.data.vae.TILE_PIXELS", 16)
    latent = AutoencoderLatent(load_vae(vae_directory), 32, "x")
    tiles: list[tuple[int, ...]] = []
    whole = type(latent.vae.decoder).forward
    monkeypatch.setattr(
        type(latent.vae.decoder),
        "forward",
        lambda self, z, *rest: tiles.append(tuple(z.shape)) or whole(self, z, *rest),
    )
    assert latent.decode(torch.zeros(1, CHANNELS, 16, 16)).shape == (1, 32, 32, 1)
    assert len(tiles) > 1 and all(max(shape[2:]) <= 8 for shape in tiles)
    tiles.clear()
    latent.decode(torch.zeros(1, CHANNELS, 8, 8))
    assert tiles == [(1, CHANNELS, 8, 8)]


def test_kl_spec_names_the_autoencoder_and_refuses_another(
    kl: AutoencoderLatent, vae_directory: Path, tmp_path: Path
) -> None:
    spec = json.loads(json.dumps(kl.spec()))
    assert spec == {
        "name": "kl",
        "vae": str(vae_directory),
        "vae_hash": vae_hash(kl.vae),
        "scale": 0.5,
        "shift": 0.25,
        "image_size": SIZE,
        "image_channels": 1,
    }
    assert latent_from_spec(spec).spec() == spec
    moved = tmp_path / "moved"
    shutil.copytree(vae_directory, moved)
    assert latent_from_spec(spec, str(moved)).spec() == {**spec, "vae": str(moved)}
    other = write_vae(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=rf"those of the VAE {vae_directory} \(hash .*given is the VAE {other} \(hash"):
        latent_from_spec(spec, str(other))
    with pytest.raises(UserError, match=r"say where it lies now: --vae or latent\.vae"):
        latent_from_spec({**spec, "vae": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="generates pixels and takes no VAE"):
        latent_from_spec({"name": "identity", "image_size": 8, "image_channels": 1}, str(moved))


def test_scale_of_a_checkpoint_beats_that_of_the_autoencoder(kl: AutoencoderLatent, tmp_path: Path) -> None:
    rescaled = write_vae(tmp_path / "vae", scale=9.0, shift=9.0)
    latent = latent_from_spec(kl.spec(), str(rescaled))
    images = some_images(3)
    assert torch.equal(latent.encode(images), kl.encode(images))


def test_spec_of_converted_weights_may_know_less(vae_directory: Path) -> None:
    spec = {"name": "kl", "vae": str(vae_directory), "image_size": SIZE, "image_channels": 1}
    assert latent_from_spec(spec).spec()["scale"] == 0.5
    with pytest.raises(UserError, match="images of 8 pixels"):
        latent_from_spec({**spec, "image_channels": 3})


def test_saved_latent_brings_its_autoencoder(kl: AutoencoderLatent, tmp_path: Path) -> None:
    spec = kl.save(tmp_path / "model")
    assert spec["vae"] == "vae"
    latent = latent_from_spec(spec, directory=tmp_path / "model")
    assert torch.equal(latent.encode(some_images(2)), kl.encode(some_images(2)))


def test_images_that_the_factor_does_not_divide_are_refused(kl: AutoencoderLatent) -> None:
    with pytest.raises(UserError, match="images of 7 pixels are not divisible by the factor 2"):
        AutoencoderLatent(kl.vae, 7, "x")

"""What is told of latents before a run, and which are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import Tensor, nn

from gspn_dit.data import latents as latents_module
from gspn_dit.data.batches import Batches
from gspn_dit.data.images import ImageSet
from gspn_dit.data.latents import AutoencoderLatent, IdentityLatent
from gspn_dit.data.self_check import check_latents, explained_variance, psnr
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import UserError
from tests.data.tiny_vae import SIZE, write_vae


class Mean(nn.Module):
    """Stands for a trained autoencoder: latents are the means of 2×2 pixels, which decoding repeats."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.dtype, self.device, self.config = torch.float32, torch.device("cpu"), {}


@dataclass
class Averaging:
    """Its adapter; `gain` multiplies latents as a second normalisation would."""

    module: Mean
    class_name = "AutoencoderKL"
    has_posterior, image_size, image_channels, channels, factor = False, None, 1, 1, 2
    scale, shift = 1.0, 0.0

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.module.gain * nn.functional.avg_pool2d(images, 2), None

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents / self.module.gain, scale_factor=2)


class Encoded:
    """Stands for encoded latents, whose images are not at hand."""

    def __init__(self, of: Batches) -> None:
        self.images, self.at = of.images, of.at


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "adapt", Averaging)
    monkeypatch.setattr(latents_module, "vae_hash", lambda vae: "")


def batches(latent: AutoencoderLatent, count: int = 12) -> Batches:
    """Grey images of 8×8 pixels, black or white by quarters."""
    quarters = np.random.default_rng(0).integers(0, 2, (count, 2, 2), dtype=np.uint8) * 255
    pixels = quarters.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": [0] * count}
    dataset = Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=["all"])}))
    return Batches(ImageSet(dataset, "quarters", SIZE, 1), latent, seed=0)


def test_good_latents_are_told_in_two_lines(trained: None) -> None:
    latent = AutoencoderLatent(Mean(1.0), SIZE, "x")
    channels, images = check_latents(latent, batches(latent))
    assert channels.startswith("of 1 channels: means ") and ", deviations 1" in channels
    assert images == "reconstruction of 8 images: PSNR inf dB"


@pytest.mark.parametrize("gain", [0.18215, 5.0])
def test_latents_normalised_twice_are_refused(gain: float, trained: None) -> None:
    """Images come back as they were, as decoding undoes both: only the deviation tells."""
    latent = AutoencoderLatent(Mean(gain), SIZE, "x")
    with pytest.raises(UserError, match=r"the latents of x deviate by .* where about 1 is expected .* twice, or not"):
        check_latents(latent, batches(latent))


def test_scale_makes_up_for_it(trained: None) -> None:
    latent = AutoencoderLatent(Mean(0.18215), SIZE, "x", scale=1 / 0.18215)
    assert len(check_latents(latent, batches(latent))) == 2


def test_encoded_latents_are_judged_without_their_images(trained: None) -> None:
    """Decoded and encoded again they are the same; the deviation is refused there, too."""
    for gain, refused in ((1.0, False), (0.18215, True)):
        latent = AutoencoderLatent(Mean(gain), SIZE, "x")
        encoded = Encoded(batches(latent))
        if refused:
            with pytest.raises(UserError, match="deviate by"):
                check_latents(latent, encoded)
        else:
            assert check_latents(latent, encoded)[1] == (
                "reconstruction of 8 latents, decoded and encoded: 100% of variance"
            )


def test_random_weights_are_told_and_not_refused(tmp_path: Path) -> None:
    """What their latents deviate by means nothing."""
    latent = AutoencoderLatent(load_vae(write_vae(tmp_path, scale=0.01)), SIZE, "x")
    assert check_latents(latent, batches(latent))[-1].startswith("the autoencoder hardly reconstructs them")


def test_pixels_are_not_looked_at() -> None:
    assert check_latents(IdentityLatent(4, 1), None) == ()


def test_explained_variance_and_psnr_by_hand() -> None:
    assert explained_variance(np.array([0.0, 2.0]), np.array([0.0, 2.0])) == 1
    assert explained_variance(np.array([0.0, 2.0]), np.array([1.0, 1.0])) == 0
    assert psnr(np.zeros(4, np.uint8), np.full(4, 51, np.uint8)) == pytest.approx(20 * np.log10(5))

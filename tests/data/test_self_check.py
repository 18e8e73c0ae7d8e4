"""What is told of latents before a run, and which are refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch import Tensor, nn

from gspn_dit.data import latents as latents_module
from gspn_dit.data.autoencoders import KLAutoencoder
from gspn_dit.data.batches import Batches
from gspn_dit.data.images import ImageSet
from gspn_dit.data.latents import AutoencoderLatent, IdentityLatent, to_signed
from gspn_dit.data.self_check import check_latents, explained_variance, psnr
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import UserError
from gspn_dit.tasks import create_task
from tests.data.tiny_vae import CHANNELS, SIZE, write_vae
from tests.training.conftest import changed, fresh_accelerator, run_training, tiny_config

__all__ = ["fresh_accelerator"]
DEVIATION = 5.0
"""Of the fitted autoencoder's latents: that of Stable Diffusion's is about as far from 1."""
STATISTICS = ("latents_mean", "latents_std")
STEPS = 75
"""Of fitting an autoencoder, after which it keeps nearly all of the images' variance."""


class Mean(nn.Module):
    """Stands for a trained autoencoder: latents are the means of 2×2 pixels, by channel, which decoding repeats."""

    def __init__(self, gain: float, channels: int = 1) -> None:
        super().__init__()
        self.gain, self.channels = gain, channels
        self.dtype, self.device, self.config = torch.float32, torch.device("cpu"), {}


@dataclass
class Averaging:
    """Its adapter; `gain` multiplies latents as a second normalisation would."""

    module: Mean
    class_name = "AutoencoderKL"
    has_posterior, image_size, image_channels, factor = False, None, 1, 2
    scale, shift = 1.0, 0.0

    @property
    def channels(self) -> int:
        return self.module.channels

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.module.gain * nn.functional.avg_pool2d(images, 2).repeat(1, self.channels, 1, 1), None

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents[:, :1] / self.module.gain, scale_factor=2)


class Encoded:
    """Stands for encoded latents, whose images are not at hand."""

    def __init__(self, of: Batches) -> None:
        self.images, self.at = of.images, of.at


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_module, "adapt", Averaging)
    monkeypatch.setattr(latents_module, "vae_hash", lambda vae: "")


def quarters(count: int) -> np.ndarray:
    """Grey images of 8×8 pixels, black or white by quarters; half of all are white."""
    drawn = np.random.default_rng(0).permuted(np.repeat([0, 255], 2 * count)).astype(np.uint8).reshape(count, 2, 2)
    return drawn.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)


def batches(latent: AutoencoderLatent, pixels: np.ndarray | None = None) -> Batches:
    """Batches of grey images, of quarters unless given."""
    pixels = quarters(12) if pixels is None else pixels
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": [0] * len(pixels)}
    dataset = Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=["all"])}))
    return Batches(ImageSet(dataset, "quarters", SIZE, 1), latent, seed=0)


def test_good_latents_are_told_in_two_lines(trained: None) -> None:
    latent = AutoencoderLatent(Mean(1.0), SIZE, "x")
    channels, images = check_latents(latent, batches(latent))
    assert re.fullmatch(r"of 1 channels: means -?0, deviations 1", channels)
    assert images == "reconstruction of 8 images: PSNR inf dB"


@pytest.mark.parametrize("gain", [0.18215, 5.0])
def test_latents_normalised_twice_are_refused(gain: float, trained: None) -> None:
    """Images come back as they were, as decoding undoes both: only the deviation tells."""
    latent = AutoencoderLatent(Mean(gain), SIZE, "x")
    said = f"the latents of x: the only channel has a deviation of {gain:.3g} where about 0 and 1 are expected "
    with pytest.raises(UserError, match=re.escape(said) + ".* normalised twice, or not.* or set latent.check false if"):
        check_latents(latent, batches(latent))
    told = check_latents(latent, batches(latent), refuse=False)[-1]
    assert told.startswith("the only channel has a deviation") and told.endswith("(latent.check is false)")


@pytest.mark.parametrize(
    ("scale", "shift", "said"),
    [
        ([1.0] * 4, [3.0] * 4, "the median of 4 channels is 3 off in its mean"),
        ([1.0] * 4, [0.0, 0.0, 2.2, 2.2], None),  # the median is 1.1
        ([1.0] * 4, [0.0, 0.0, 6.0, 0.0], "channel 2 of 4 has a mean of -6, a deviation of 1 "),
        ([1.0, 0.1, 0.1, 0.1], [0.0] * 4, "the median of 4 channels has a deviation of 0.1"),
        ([1.0, 1.0, 1.0, 20.0], [0.0] * 4, "channel 3 of 4 has a mean of .*, a deviation of 20 "),
        ([1.0, 0.05, 1.0, 1.0], [0.0] * 4, "channel 1 of 4 has a mean of .*, a deviation of 0.05 "),
        ([1.0, 1.0, 5.0, 0.2], [0.0] * 4, None),  # unusual, as single channels may be
    ],
)
def test_means_and_single_channels_are_judged(
    scale: list[float], shift: list[float], said: str | None, trained: None
) -> None:
    """By latents that are known: half of the pixels are -1, half are 1."""
    latent = AutoencoderLatent(Mean(1.0, channels=4), SIZE, "x", scale=scale, shift=shift)
    if said is None:
        assert len(check_latents(latent, batches(latent))) == 2
        return
    with pytest.raises(UserError, match=said):
        check_latents(latent, batches(latent))


def test_of_many_channels_least_median_and_greatest_are_told(trained: None) -> None:
    scale, shift = [1.0] * 7 + [0.5, 2.0], [0.0] * 8 + [1.0]
    latent = AutoencoderLatent(Mean(1.0, channels=9), SIZE, "x", scale=scale, shift=shift)
    told = check_latents(latent, batches(latent))[0]
    assert re.fullmatch(r"of 9 channels: means -2 to -?0 \(median -?0\), deviations 0.5 to 2 \(median 1\)", told)


def test_flat_images_are_a_reason_to_leave_the_check_out(trained: None) -> None:
    """Nothing is wrong with the autoencoder; the message names the key that lets the run begin."""
    flat = (128 + quarters(40) // 255 * 4).astype(np.uint8)
    latent = AutoencoderLatent(Mean(1.0), SIZE, "x")
    with pytest.raises(UserError, match=r"the only channel has a deviation of 0\.0157 .* set latent.check false"):
        check_latents(latent, batches(latent, flat))
    assert len(check_latents(latent, batches(latent, flat), refuse=False)) == 3


def test_a_stream_that_cannot_be_asked_says_so(trained: None) -> None:
    (line,) = check_latents(AutoencoderLatent(Mean(1.0), SIZE, "x"), None)
    assert line.startswith("not looked at: a stream without a validation split")


def test_images_of_several_sizes_are_looked_at(tmp_path: Path) -> None:
    """Statistics of all of them, reconstructions of the most frequent size."""
    for number in range(10):
        file = tmp_path / "images" / "all" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(quarters(10)[number]).resize((32, 8) if number < 3 else (8, 8)).save(file)
    vae = {"name": "kl", "vae": str(write_vae(tmp_path / "vae"))}
    data = {"name": "imagefolder", "path": str(tmp_path / "images"), "image_size": 8, "buckets": ["8x8", "4x16"]}
    config = changed(tiny_config(tmp_path / "run"), data={**data, "validation_fraction": 0}, latent=vae)
    task = create_task(changed(config, model={"name": "GSPN-N/2"}))
    task.look()
    statistics, images, untrained = task.latents_found  # type: ignore[attr-defined]
    batches = task.train_data  # type: ignore[attr-defined]
    values = torch.cat([batches.at(rows)[0].transpose(0, 1).flatten(1) for rows in (range(3), range(3, 10))], dim=1)
    means, deviations = (
        " ".join(f"{x:.2g}" for x in part) for part in (values.mean(dim=1), values.std(dim=1, correction=0))
    )
    assert statistics == f"of 2 channels: means {means}, deviations {deviations}"
    assert images.startswith("reconstruction of 7 images: PSNR ")
    assert untrained.startswith("the autoencoder hardly reconstructs them")


# -- the whole way: a class of diffusers, saved, configured, and trained on --------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images`, and an AutoencoderKL at `vae`: random weights, fitted to them until it reconstructs, then measured."""
    place = tmp_path_factory.mktemp("fitted")
    pixels = quarters(40)
    for number, image in enumerate(pixels):
        file = place / "images" / "all" / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(image).save(file)
    vae = load_vae(write_vae(place / "vae")).requires_grad_(True)
    images = to_signed(pixels[..., None])
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    for _ in range(STEPS):
        loss = (vae.decode(vae.encode(images).latent_dist.mean).sample - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        std = vae.encode(images).latent_dist.mean.std(dim=(0, 2, 3))
        into, out_of = vae.quant_conv, vae.post_quant_conv
        into.weight[:CHANNELS] *= (DEVIATION / std).reshape(-1, 1, 1, 1)
        into.bias[:CHANNELS] *= DEVIATION / std
        out_of.weight *= (std / DEVIATION).reshape(1, -1, 1, 1)
        into.weight[CHANNELS:], into.bias[CHANNELS:] = 0, -20  # log-variances, which were not fitted
        latents = vae.encode(images).latent_dist.mean
    mean, std = latents.mean(dim=(0, 2, 3)).tolist(), latents.std(dim=(0, 2, 3)).tolist()
    assert std == pytest.approx([DEVIATION] * CHANNELS, rel=1e-3)
    vae.register_to_config(scaling_factor=1.0, latents_mean=mean, latents_std=std)
    vae.save_pretrained(place / "vae")
    return place


def run_on(place: Path, output_dir: Path, **latent: Any) -> None:
    data = {"name": "imagefolder", "path": str(place / "images"), "validation_fraction": 0}
    config = changed(tiny_config(output_dir, max_steps=1), data=data, model={"name": "GSPN-N/2"})
    run_training(changed(config, latent={"name": "kl", "vae": str(place / "vae"), **latent}))


def test_a_real_class_that_is_normalised_once_is_trained_on(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on(fitted, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("latents ")]
    assert len(told) == 2 and "of 2 channels" in told[0] and "reconstruction of 8 images" in told[1]


def test_a_real_class_that_is_normalised_twice_is_refused_before_anything_is_written(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by an adapter that normalises what is normalised again behind it, there and back; no image shows it."""
    encode, decode = KLAutoencoder.encode, KLAutoencoder.decode
    mean, std = (torch.tensor(load_vae(fitted / "vae").config[key]).reshape(-1, 1, 1) for key in STATISTICS)

    def encode_normalised(self: KLAutoencoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
        latents, log_variance = encode(self, images)
        return (latents - mean) / std, log_variance

    monkeypatch.setattr(KLAutoencoder, "encode", encode_normalised)
    monkeypatch.setattr(KLAutoencoder, "decode", lambda self, latents: decode(self, latents * std + mean))
    with pytest.raises(UserError, match=r"the latents of .*vae: the median of 2 channels .*set latent.check false"):
        run_on(fitted, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run_on(fitted, tmp_path / "run", check=False)
    assert "trained on all the same (latent.check is false)" in capsys.readouterr().out


def test_scale_makes_up_for_it(trained: None) -> None:
    latent = AutoencoderLatent(Mean(0.18215), SIZE, "x", scale=1 / 0.18215)
    assert len(check_latents(latent, batches(latent))) == 2


def test_encoded_latents_are_judged_without_their_images(trained: None) -> None:
    """Decoded and encoded again they are the same; the deviation is refused there, too."""
    for gain, refused in ((1.0, False), (0.18215, True)):
        latent = AutoencoderLatent(Mean(gain), SIZE, "x")
        encoded = Encoded(batches(latent))
        if refused:
            with pytest.raises(UserError, match="has a deviation of"):
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

"""Training small autoencoders."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gspn_dit.data.autoencoders import adapt
from gspn_dit.data.images import load_images
from gspn_dit.data.latents import AutoencoderLatent
from gspn_dit.data.self_check import psnr
from gspn_dit.data.vae import load_vae, vae_hash
from gspn_dit.errors import UserError
from gspn_dit.prepare import train_vae
from gspn_dit.prepare.train_vae import create_vae, learning_rate, training_loss
from tests.data.tiny_vae import write_folder


def run(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *more: str) -> None:
    words = ["--source", f"imagefolder:{source}", "--out", str(out), "--factor", "2", "--latent-channels", "2"]
    words += ["--width", "8", "--steps", "3", "--batch-size", "4", *more]
    monkeypatch.setattr(sys, "argv", ["train_vae", *words])
    train_vae.main()


def test_psnr_by_hand() -> None:
    """20·log10(255 / 5) for an error of 5 everywhere."""
    images = np.full((2, 4, 4, 1), 100, dtype=np.uint8)
    assert psnr(images, images + 5) == pytest.approx(20 * math.log10(51))
    assert psnr(images, images) == math.inf


def test_learning_rate_warms_up_and_falls_to_0() -> None:
    rates = [learning_rate(1.0, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3) and max(rates) == rates[4] > 0.99
    assert rates[50] == pytest.approx(0.5) and rates[-1] < 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_loss_is_squared_error_and_divergence_per_pixel() -> None:
    torch.manual_seed(0)
    vae = create_vae(1, 8, factor=2, latent_channels=2, width=8)
    images, noise = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 2, 4, 4)
    posterior = vae.encode(images).latent_dist
    mean, variance = posterior.mean, posterior.var
    error = (vae.decode(mean + variance.sqrt() * noise).sample - images).square().mean()
    divergence = 0.5 * (mean.square() + variance - 1 - variance.log()).sum() / 3 / 64
    torch.testing.assert_close(training_loss(vae, images, noise, 0.1), error + 0.1 * divergence)


def test_latents_of_the_training_images_have_unit_scale_and_training_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(tmp_path / "images", 40)
    for name in ("one", "two"):
        run(monkeypatch, source, tmp_path / name)
    vaes = [load_vae(tmp_path / name) for name in ("one", "two")]
    assert vae_hash(vaes[0]) == vae_hash(vaes[1]) and adapt(vaes[0]).factor == 2
    latent = AutoencoderLatent(vaes[0], 8, "x")
    training = load_images("imagefolder", source)
    noise = torch.randn(len(training), 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = latent.encode(training.pixels(), noise)
    assert latents.mean().abs() < 0.1 and abs(latents.std() - 1) < 0.1
    report = json.loads((tmp_path / "one" / "training.json").read_text())
    assert report["parameters"] == sum(parameter.numel() for parameter in vaes[0].parameters())
    assert 0 < report["psnr_db"] < 60


def test_mistakes_are_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "images", 12)
    with pytest.raises(UserError, match="exists already; give another directory"):
        run(monkeypatch, source, source)
    with pytest.raises(UserError, match="--factor is 3; allowed are 2, 4, 8 and 16"):
        run(monkeypatch, source, tmp_path / "out", "--factor", "3")
    with pytest.raises(UserError, match="images of 8 pixels are not divisible by --factor 16"):
        run(monkeypatch, source, tmp_path / "out", "--factor", "16")
    with pytest.raises(UserError, match="--width is 12, but must be a multiple of 8"):
        run(monkeypatch, source, tmp_path / "out", "--width", "12")
    with pytest.raises(UserError, match="--steps is 0, but must be at least 1"):
        run(monkeypatch, source, tmp_path / "out", "--steps", "0")
    assert not (tmp_path / "out").exists()

"""Training small representation autoencoders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gspn_dit.data.images import load_images
from gspn_dit.data.latents import AutoencoderLatent
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import UserError
from gspn_dit.prepare import train_rae
from gspn_dit.prepare.train_rae import hide, patches, representation_loss
from tests.data.tiny_vae import write_folder


def run(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, *more: str) -> None:
    words = ["--source", f"imagefolder:{source}", "--out", str(out), "--patch-size", "4", "--channels", "64"]
    words += ["--layers", "1", "--steps", "3", "--batch-size", "4", *more]
    monkeypatch.setattr(sys, "argv", ["train_rae", *words])
    train_rae.main()


def test_patches_and_what_is_hidden_lie_row_by_row() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
    assert patches(16 * images, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    hidden = hide(images, torch.tensor([[0.6, 0.4, 0.9, 0.5]]), 2)  # the second alone is below 1/2
    assert (hidden[0, 0, :2, 2:] == 0.5).all()
    hidden[0, 0, :2, 2:] = images[0, 0, :2, 2:]
    assert torch.equal(hidden, images)


def test_loss_is_cross_entropy_and_squared_error() -> None:
    torch.manual_seed(0)
    tokens, images, labels = torch.randn(2, 5, 2, 2), torch.rand(2, 3, 4, 4), torch.tensor([1, 0])
    classify, draw = torch.nn.Linear(5, 3), torch.nn.Linear(5, 12)
    logits = classify(tokens.flatten(2).mean(dim=2))
    entropy = -logits.log_softmax(dim=1)[[0, 1], labels].mean()
    drawn = torch.stack([draw(tokens[:, :, row, column]) for row in range(2) for column in range(2)], dim=1)
    error = (drawn - (2 * patches(images, 2) - 1)).square().mean()
    torch.testing.assert_close(representation_loss(tokens, images, labels, classify, draw), entropy + error)


def test_latents_are_normalised_and_training_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "images", 24)
    for name in ("one", "two"):
        run(monkeypatch, source, tmp_path / name)
    one, two = (load_vae(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    images = load_images("imagefolder", str(source), "train", channels=3)
    latent = AutoencoderLatent(one, images.image_size, "x")
    assert (latent.channels, latent.size, latent.has_posterior) == (64, images.image_size // 4, False)
    latents = latent.encode(images.pixels())
    assert latents.mean(dim=0).abs().max() < 1e-3
    std = latents.std(dim=0, correction=0)
    assert std.median() == pytest.approx(1, abs=0.02)
    report = json.loads((tmp_path / "one" / "training.json").read_text())
    assert report["psnr_db"] > 0 and report["noise"] == 0.4 and "out" not in report
    with pytest.raises(UserError, match="exists already; give another directory"):
        run(monkeypatch, source, tmp_path / "one")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--channels", "96"), "--channels is 96, but must be a multiple of 64"),
        (("--steps", "0"), "--steps is 0, but must be at least 1"),
        (("--noise", "-1"), "--noise is -1.0, but must be at least 0 and finite"),
        (("--patch-size", "7"), "are not divisible by --patch-size 7"),
    ],
)
def test_mistakes_take_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    source = write_folder(tmp_path / "images", 8)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, source, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()

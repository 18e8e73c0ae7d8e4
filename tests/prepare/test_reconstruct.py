"""Originals and what an autoencoder makes of them, side by side on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fid.checks import check_samples
from fid.images import read_reference, read_samples
from gspn_dit.data.images import load_images
from gspn_dit.data.latents import AutoencoderLatent
from gspn_dit.data.vae import load_vae
from gspn_dit.errors import UserError
from gspn_dit.prepare.reconstruct import main
from gspn_dit.protocols import PROTOCOLS
from tests.data.tiny_vae import write_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def test_both_sets_have_the_same_rows(vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["--vae", str(vae), "--source", "digits", "--images", "21", "--out", str(out), "--device", "cpu"])
    images = load_images("digits", split="validation")
    decoded, originals = read_samples(out / "decoded.npz"), read_reference(out / "originals.npz", 8).images
    rows = [round(i * (len(images) - 1) / 20) for i in (0, 20)]
    np.testing.assert_array_equal(originals.pixels[[0, 20]], images.pixels(np.array(rows)))
    np.testing.assert_array_equal(decoded.labels, originals.labels)
    latent = AutoencoderLatent(load_vae(vae), 8, "x")
    with torch.no_grad():  # a batch of 8 is decoded as one
        expected = latent.decode(latent.draw(latent.moments(np.asarray(originals.pixels[8:16]))))
    np.testing.assert_array_equal(decoded.pixels[8:16], expected)
    stated = json.loads((out / "decoded.json").read_text())
    assert decoded.generation == stated
    assert (stated["batch_size"], stated["source"], stated["split"]) == (8, "digits", "validation")
    assert stated["autoencoder"]["vae_hash"] == latent.hash and stated["posterior"] == "mean"
    check_samples(PROTOCOLS["reconstruction"], decoded)


def test_mistakes_take_one_line(vae: Path, tmp_path: Path) -> None:
    start = ["--vae", str(vae), "--source", "digits"]
    with pytest.raises(UserError, match="exists already; give another directory"):
        main([*start, "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--images is 0, but must be at least 1"):
        main([*start, "--images", "0", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="the VAE nowhere does not exist"):
        main(["--vae", "nowhere", "--source", "digits", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

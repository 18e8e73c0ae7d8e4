"""The same images, features and settings give torch-fidelity's own figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from fid.images import read_reference, read_samples
from fid.metrics import manifold_membership
from gspn_dit.protocols import PROTOCOLS
from tests.fid.conftest import TINY, noise_images, tiny_net

PROTOCOL = dataclasses.replace(PROTOCOLS["quick"], order="stored", kid_subset_size=25)


def write_pngs(pixels: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def peer(samples: Path, reference: Path, extractor: str, **options: Any) -> dict[str, float]:
    """torch-fidelity's figures, with its shuffle, cache and CUDA off."""
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=str(samples),
        input2=str(reference),
        feature_extractor=extractor,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        cache=False,
        samples_shuffle=False,
        kid_subsets=PROTOCOL.kid_subsets,
        kid_subset_size=PROTOCOL.kid_subset_size,
        rng_seed=PROTOCOL.kid_seed,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
        **options,
    )


def assert_equal_figures(report: dict[str, Any], expected: dict[str, float], of_distance: float = 1e-6) -> None:
    scores, names = report["scores"], report["names"]
    found = {
        "frechet_inception_distance": scores[names["fd"]],
        "inception_score_mean": scores[names["is"]]["mean"],
        "inception_score_std": scores[names["is"]]["std"],
        "kernel_inception_distance_mean": scores[names["kid"]]["mean"],
        "kernel_inception_distance_std": scores[names["kid"]]["std"],
        "precision": scores["precision"],
        "recall": scores["recall"],
    }
    for name, value in found.items():
        tolerance = of_distance if name == "frechet_inception_distance" else 1e-6
        assert value == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


def test_figures_are_torch_fidelity_s_own(tmp_path: Path) -> None:
    drawn = write_pngs(noise_images(53, 0, low=60), tmp_path / "drawn")
    real = write_pngs(noise_images(60, 1), tmp_path / "real")
    report = fid.score(read_samples(drawn), read_reference(real, None), tiny_net(), protocol=PROTOCOL, batch_size=9)
    expected = peer(drawn, real, TINY)
    assert expected["frechet_inception_distance"] > 1 and 0 < expected["recall"] < 1
    assert_equal_figures(report, expected)


def test_precision_and_recall_are_torch_fidelity_s_own() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(70, 12, generator=generator), torch.randn(90, 12, generator=generator) * 1.2
    expected = prc_features_to_metric(first, second, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    precision, recall = (float(members.mean()) for members in manifold_membership(first, second, 3))
    assert 0 < precision < 1 and 0 < recall < 1
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)

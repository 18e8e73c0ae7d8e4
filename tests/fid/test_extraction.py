"""One pass over images that need not lie in memory: equal for any batches and processes, with the set's hash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fid import extraction, labelled, npz
from fid.distributed import World, local_device
from fid.extraction import extract_all
from fid.features import FeatureNet
from fid.images import LabelledImages, LazyPixels, Reference, read_samples
from gspn_dit.errors import UserError
from tests.fid.conftest import noise_images, tiny_net

ROOT = Path(__file__).resolve().parents[2]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_processes_share_the_same_batches(count: int, batch_size: int, size: int) -> None:
    alone = World().own(count, batch_size)
    shares = [World(rank, size).own(count, batch_size) for rank in range(size)]
    assert sorted((batch for share in shares for batch in share), key=lambda batch: batch.start) == alone
    assert [index for batch in alone for index in batch] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("net_name", ["digits", "tiny"])
def test_batches_change_no_moment(net: FeatureNet, digits: Reference, net_name: str) -> None:
    images = LabelledImages(digits.images.pixels[:150], "some", digits.images.labels[:150])
    chosen = net if net_name == "digits" else tiny_net()
    (whole,), sha256 = extract_all(images, [chosen], batch_size=150)
    for batch_size in (1, 7, 64):
        (parts,), other = extract_all(images, [chosen], batch_size=batch_size)
        assert other == sha256 == images.sha256
        for layer in whole.moments:
            first, second = whole.moments[layer], parts.moments[layer]
            assert second.count == 150
            torch.testing.assert_close(second.mean, first.mean, rtol=0, atol=1e-6)
            torch.testing.assert_close(second.covariance, first.covariance, rtol=1e-6, atol=1e-6)


def test_several_nets_see_every_image_once() -> None:
    pixels, asked = noise_images(30, 0), []

    def read(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return pixels[rows]

    lazy = LabelledImages(LazyPixels(read, pixels.shape), "lazy")
    nets = [tiny_net(), tiny_net(layers=("features",))]
    found, sha256 = extract_all(lazy, nets, batch_size=4)
    assert sorted(asked) == list(range(30))
    assert sha256 == LabelledImages(pixels, "array").sha256
    assert torch.equal(found[0].features, found[1].features) and found[1].logits is None
    alone, _ = extract_all(LabelledImages(pixels, "array"), nets, batch_size=4)
    assert torch.equal(found[0].features, alone[0].features)
    assert set(found[0].moments) == {"features", "spatial"} and set(found[1].moments) == {"features"}
    means = found[0].moments["features"].mean
    torch.testing.assert_close(means, found[0].features.double().mean(dim=0), rtol=0, atol=1e-9)
    assert found[0].spatial is None
    (kept,), _ = extract_all(LabelledImages(pixels, "array"), nets[:1], batch_size=4, keep_spatial=True)
    assert kept.spatial is not None and kept.spatial.shape == (30, 6)
    means = kept.moments["spatial"].mean
    torch.testing.assert_close(means, kept.spatial.double().mean(dim=0), rtol=0, atol=1e-9)


def test_grey_images_are_repeated_for_a_net_of_any_size() -> None:
    grey = noise_images(9, 0)[..., :1]
    colour = np.repeat(grey, 3, axis=3)
    found = [extract_all(LabelledImages(pixels, ""), [tiny_net()])[0][0].features for pixels in (grey, colour)]
    assert torch.equal(*found)


def test_features_that_are_not_finite_name_their_image(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_net()
    original = net.extractor.forward

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, *rest = original(images)
        return (torch.where((images[:, :1, 0, 0] == 77), torch.nan, features), *rest)

    monkeypatch.setattr(net.extractor, "forward", forward)
    pixels = np.zeros((12, 8, 8, 3), np.uint8)
    pixels[7] = 77
    with pytest.raises(UserError, match=r"the features of image 7 of here are NaN or infinite"):
        extract_all(LabelledImages(pixels, "here"), [net], batch_size=5)


def test_at_most_a_few_batches_are_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction.os, "cpu_count", lambda: 2)
    pixels, decoded, used = noise_images(60, 0), [], []

    def read(rows: np.ndarray) -> np.ndarray:
        decoded.extend(rows.tolist())
        assert len(decoded) - len(used) <= 3 * 4 + 4  # two that wait for each of two threads' turn, and one in use
        return pixels[rows]

    net = tiny_net()
    original = net.extractor.forward

    def forward(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        used.extend(range(len(images)))
        return original(images)

    monkeypatch.setattr(net.extractor, "forward", forward)
    extract_all(LabelledImages(LazyPixels(read, pixels.shape), ""), [net], batch_size=4)
    assert len(decoded) == len(used) == 60


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 of this machine has no GPU: there are 2"):
        local_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [local_device(name) for name in ("cuda", "cpu", "cuda:0")] == ["cuda:3", "cpu", "cuda:0"]


@pytest.mark.parametrize("compressed", [False, True])
def test_large_arrays_are_mapped(tmp_path: Path, compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = noise_images(20, 0), np.arange(20)
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, arr_1=labels, arr_0=pixels)
    expected = read_samples(path)
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 1000)
    found = read_samples(path)
    assert isinstance(found.pixels, np.memmap) and not isinstance(expected.pixels, np.memmap)
    np.testing.assert_array_equal(found.pixels, pixels)
    features, sha256 = extract_all(found, [tiny_net()], batch_size=3)
    assert sha256 == found.sha256 == expected.sha256
    assert torch.equal(features[0].features, extract_all(expected, [tiny_net()], batch_size=3)[0][0].features)
    np.savez(path, arr_0=np.full((70, 9, 9, 1), np.nan, np.float32))
    with pytest.raises(UserError, match="has 5670 NaN or infinite values"):
        read_samples(path)
    np.savez(path, arr_0=np.array([{}] * 3000, dtype=object))
    with pytest.raises(UserError, match="holds pickled objects, which are never loaded"):
        read_samples(path)


def test_large_directories_are_decoded_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise_images(5, 0)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{4 - index}-{index % 2}.png")
    small = read_samples(tmp_path)
    monkeypatch.setattr(labelled, "IN_MEMORY_BYTES", 10)
    large = read_samples(tmp_path)
    assert isinstance(small.pixels, np.ndarray) and isinstance(large.pixels, LazyPixels)
    np.testing.assert_array_equal(large.pixels[:], pixels[::-1])
    np.testing.assert_array_equal(large.pixels[np.array([3, 0])], pixels[::-1][[3, 0]])
    assert large.sha256 == small.sha256 and large.labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_report_what_one_reports(digits: Reference, save: Callable[..., Path], tmp_path: Path) -> None:
    held_out = digits.held_out
    assert held_out is not None
    samples = save(held_out.pixels[:200], held_out.labels[:200])
    common = ["--samples", str(samples), "--reference", "digits", "--protocol", "digits"]
    reports = []
    for processes in (1, 2, 3):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        out = tmp_path / str(processes)
        # the third of three processes has no batch of samples
        three = ["--cache", str(tmp_path / "cache"), "--batch-size", "128"]
        options = three if processes == 3 else ["--no-cache", "--batch-size", "16"]
        done = subprocess.run(
            [*launcher, "-m", "fid", *common, *options, "--out", str(out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1
        reports.append(json.loads((out / "report.json").read_text()))
    first = reports[0]
    for processes, report in zip((1, 2, 3), reports):
        assert report["settings"]["processes"] == processes
        assert report["settings"]["samples"] == first["settings"]["samples"]
        for part in ("scores", "held_out", "comparison"):
            for name, value in first[part].items():
                assert report[part][name] == pytest.approx(value, abs=1e-6), (processes, name)
    assert len(list((tmp_path / "cache").iterdir())) == 2

"""Power-function averages, and averages of other lengths made of their snapshots, against those tracked directly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from gspn_dit.checkpoint import find_checkpoints, load_tensors, read_manifest
from gspn_dit.errors import UserError
from gspn_dit.training.ema import PowerEMA
from gspn_dit.training.post_hoc_ema import (
    find_snapshots,
    power_exponent,
    profile_products,
    reconstruct,
    reconstruction_weights,
    save_snapshot,
    write_reconstruction,
)
from tests.training.conftest import run_training, tiny_config
from tests.training.test_loop import assert_same_tensors


@pytest.mark.parametrize("sigma_rel, exponent", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_the_paper_names(sigma_rel: float, exponent: float) -> None:
    """σ_rel of 0.05 and 0.10 stand for γ of 16.97 and 6.94 (arXiv 2312.02696, section 3.1)."""
    assert power_exponent(sigma_rel) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.075, 0.13, 0.25])
def test_exponent_gives_the_profile_its_relative_length(sigma_rel: float) -> None:
    """By numerical integration of (γ+1) τ^γ over [0, 1]."""
    exponent = power_exponent(sigma_rel)
    time = (np.arange(200_000) + 0.5) / 200_000
    density = (exponent + 1) * time**exponent / 200_000
    mean = (density * time).sum()
    assert np.sqrt((density * (time - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-5)


def test_products_of_profiles_by_numerical_integration() -> None:
    time = (np.arange(400_000) + 0.5) / 400_000 * 8

    def profile(end: float, exponent: float) -> np.ndarray:
        return np.where(time <= end, (exponent + 1) * time**exponent / end ** (exponent + 1), 0)

    expected = [(profile(end, gamma) * profile(6.0, 3.5)).sum() * 8 / 400_000 for end, gamma in ((4, 2.0), (8, 7.0))]
    assert profile_products([4, 8], [2.0, 7.0], 6.0, 3.5) == pytest.approx(expected, rel=1e-4)


def walk(steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Weights of a training: a random walk of 64 values around 1 that slows down."""
    generator = torch.Generator().manual_seed(seed)
    strides = torch.randn(steps, 64, generator=generator, dtype=torch.float64)
    return list(1 + (strides / torch.arange(1, steps + 1)[:, None] ** 0.5).cumsum(0))


def follow(path: list[torch.Tensor], *lengths: float, every: Callable[[int, PowerEMA], None] | None = None) -> PowerEMA:
    """Track averages of a path; return the first."""
    model = nn.Linear(64, 1, bias=False).double()
    averages = [PowerEMA(model.named_parameters(), length) for length in lengths]
    for step, weights in enumerate(path, 1):
        model.weight.data.copy_(weights)
        for average in averages:
            average.update(model, step)
            if every is not None:
                every(step, average)
    return averages[0]


def test_average_weighs_each_step_by_the_integral_of_the_profile() -> None:
    """Weights of step k count (k^(γ+1) - (k-1)^(γ+1)) / t^(γ+1)."""
    path = walk(7)
    average = follow(path, 0.1)
    ends = (np.arange(8) / 7) ** (average.exponent + 1)
    expected = sum(float(share) * weights for share, weights in zip(np.diff(ends), path, strict=True))
    torch.testing.assert_close(average.tensors["weight"][0], expected, rtol=1e-12, atol=1e-12)


STEPS = 512
INTERVAL = 16


@pytest.fixture(scope="module", params=["float32", "float16"])
def snapshots(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with 32 snapshots of the paper's two lengths, in each dtype."""
    run = tmp_path_factory.mktemp(request.param)

    def save(step: int, average: PowerEMA) -> None:
        if step % INTERVAL == 0:
            save_snapshot(run, step, average.sigma_rel, average.tensors, request.param)

    follow(walk(STEPS), 0.05, 0.10, every=save)
    return run


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.10, 0.15, 0.20])
@pytest.mark.parametrize("step", [STEPS, 320])
def test_reconstruction_equals_the_directly_tracked_average(snapshots: Path, sigma_rel: float, step: int) -> None:
    """The profile is within a percent; the weights differ by less than that share of what averaging does to them."""
    path = walk(STEPS)[:step]
    tensors, profile_error = reconstruct(find_snapshots(snapshots), sigma_rel, step)
    direct = follow(path, sigma_rel).tensors["weight"][0]
    assert profile_error < (0.01 if step == STEPS else 0.02)
    rounding = 3e-4 if snapshots.name.startswith("float16") else 3e-7
    deviation = (tensors["weight"][0].double() - direct).norm()
    assert deviation < 0.01 * (path[-1] - direct).norm() + rounding * direct.norm()


def test_fit_is_exact_for_a_profile_that_was_stored_and_says_how_far_off_another_is() -> None:
    gamma = [power_exponent(length) for length in (0.05, 0.10)]
    times, exponents = [50, 50, 100, 100], gamma * 2
    weights, error = reconstruction_weights(times, exponents, 100, gamma[1])
    assert weights == pytest.approx([0, 0, 0, 1], abs=1e-6) and error < 1e-6
    _, far = reconstruction_weights([100], gamma[:1], 100, power_exponent(0.25))
    assert far > 0.5  # a profile of a twentieth is not one of a quarter


def test_run_with_averages_resumes_bit_for_bit_and_writes_what_sampling_reads(tmp_path: Path) -> None:
    from gspn_dit.pipeline import GSPNPipeline

    options = {"ema_sigma_rel": [0.05, 0.2], "ema_snapshot_every": 1, "ema_snapshot_dtype": "float32"}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_training(tiny_config(whole, **options))
    run_training(tiny_config(parted, max_steps=3, checkpoint_every=2, **options))
    (parted / "checkpoints" / "step-00000003" / "config.json").unlink()  # the third step is lost
    interval = {"ema_snapshot_every": 2}  # may change on resume, and the last step has a snapshot anyway
    run_training(tiny_config(parted, **{**options, **interval}), resume="auto")
    one, other = find_checkpoints(whole)[4], find_checkpoints(parted)[4]
    for stem in ("model", "ema", "ema-0.050", "ema-0.200", "optimizer"):
        assert_same_tensors(load_tensors(one, stem), load_tensors(other, stem))
    snapshots = find_snapshots(parted)
    assert [(s.step, s.sigma_rel) for s in snapshots] == [(n, length) for n in (1, 2, 4) for length in (0.05, 0.2)]
    out, error = write_reconstruction(parted, 0.2, None, None)
    assert error < 1e-6 and read_manifest(out)["ema"]["sigma_rel"] == 0.2
    stored = load_tensors(other, "ema-0.200")
    for name, tensor in load_tensors(out, "ema").items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-5, atol=1e-6)
    images = [GSPNPipeline.from_checkpoint(p)([1], 2, output_type="np").images for p in (out, one)]
    assert images[0].shape == images[1].shape
    with pytest.raises(UserError, match=r"no training state .* give it as training\.initialize_from"):
        run_training(tiny_config(tmp_path / "averaged", **options), resume=str(out))
    with pytest.raises(UserError, match="exists; delete it, or give another --out"):
        write_reconstruction(parted, 0.2, None, None)


def test_what_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_reconstruction(tmp_path / "none", 0.1, None, None)
    with pytest.raises(UserError, match=r"--sigma-rel is 0\.4, but must lie in \(0, 0\.28\]"):
        write_reconstruction(tmp_path, 0.4, None, None)
    with pytest.raises(UserError, match=r"has no snapshots of averages; train with training\.ema_sigma_rel"):
        write_reconstruction(tmp_path, 0.1, None, None)
    run_training(tiny_config(tmp_path / "run", max_steps=2, ema_sigma_rel=[0.05], ema_snapshot_every=2))
    with pytest.raises(UserError, match=r"--step is 9, but the snapshots are of steps 2 to 2"):
        write_reconstruction(tmp_path / "run", 0.05, 9, None)
    with pytest.raises(UserError, match=r"no sum of the snapshots .* comes near --sigma-rel 0\.25"):
        write_reconstruction(tmp_path / "run", 0.25, None, None)
    assert not (tmp_path / "run" / "ema").exists()
    (tmp_path / "run" / "ema_snapshots" / "step-00000002-ema-0.050.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is not a snapshot of an average"):
        write_reconstruction(tmp_path / "run", 0.05, None, None)


@pytest.mark.parametrize("lengths", [[0.05, 0.0501], [0.5], [0.0]])
def test_lengths_are_checked_with_the_config(lengths: list[float]) -> None:
    from gspn_dit.config import TrainingConfig

    with pytest.raises(ValueError, match=r"training\.ema_sigma_rel is .* different lengths in \[0\.01, 0\.28\]"):
        TrainingConfig(ema_sigma_rel=lengths)


def test_a_snapshot_says_its_format_step_and_length(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()  # not contiguous, as safetensors alone would refuse
    save_snapshot(tmp_path, 12, 0.05, {"weight": weight}, "float16")
    (snapshot,) = find_snapshots(tmp_path)
    assert (snapshot.path.name, snapshot.step, snapshot.sigma_rel) == ("step-00000012-ema-0.050.safetensors", 12, 0.05)
    with safe_open(snapshot.path, "pt") as file:
        assert json.loads(file.metadata()["snapshot"]) == {"format_version": 1, "step": 12, "sigma_rel": 0.05}
        assert file.get_tensor("weight").tolist() == [[1.0, 3.0], [2.0, 4.0]]
        assert file.get_tensor("weight").dtype == torch.float16

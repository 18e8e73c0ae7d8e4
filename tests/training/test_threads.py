"""A run keeps the number of CPU threads that it began with, and with it its bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspn_dit.checkpoint import read_manifest
from gspn_dit.config import Config
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, tensors_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wide_config(output_dir: Path, steps: int) -> Config:
    """Products and normalisations large enough for PyTorch to share them out between threads."""
    config = tiny_config(output_dir, max_steps=steps, batch_size=64, checkpoint_every=1)
    return changed(config, model={"name": "GSPN-N/2", "hidden_size": 96})


def test_a_resumed_run_goes_on_with_its_threads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run_training(wide_config(tmp_path / "whole", 2))
    run_training(wide_config(tmp_path / "resumed", 1))
    torch.set_num_threads(2)
    run_training(wide_config(tmp_path / "resumed", 2), resume="auto")
    assert torch.get_num_threads() == 1
    assert_same_tensors(tensors_of(tmp_path / "resumed", 2), tensors_of(tmp_path / "whole", 2))
    assert (
        "computes with 1 CPU thread per process, as it began and not 2, so that its results stay the same; "
        "--training.cpu_threads 2 to change that\n"
    ) in capfd.readouterr().out


def test_a_config_may_name_the_threads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run_training(tiny_config(tmp_path, max_steps=2, cpu_threads=2))
    assert torch.get_num_threads() == 2
    run_training(tiny_config(tmp_path, max_steps=4, cpu_threads=1), resume="auto")
    assert torch.get_num_threads() == 1
    manifests = [read_manifest(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (2, 4)]
    assert [manifest["cpu_threads"] for manifest in manifests] == [2, 1]
    assert "computes with" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_machine_s_threads_leave_the_bits_alone(tmp_path: Path) -> None:
    def train(name: str, steps: int, threads: int) -> None:
        command = [sys.executable, "train.py", "--output_dir", str(tmp_path / name), "--resume", "auto"]
        command += ["--model.name", "GSPN-N/2", "--model.depth", "2", "--training.max_steps", str(steps)]
        command += ["--training.batch_size", "64", "--training.validation_images", "16", "--training.trackers", "[]"]
        command += ["--sampling.steps", "2", "--sampling.per_class", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)

    train("whole", 6, threads=2)
    train("resumed", 3, threads=2)
    train("resumed", 6, threads=1)
    assert_same_tensors(tensors_of(tmp_path / "resumed", 6), tensors_of(tmp_path / "whole", 6))

"""Two processes compute what one computes, and continue bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gspn_dit.training.checkpoint import find_checkpoints
from tests.training.test_loop import assert_same_tensors, tensors_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def train(
    output_dir: Path, processes: int, *options: str, script: str = "train.py"
) -> subprocess.CompletedProcess[str]:
    """Run a script that trains a tiny model on the digits in one or more processes of one thread each."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [
        *("--config", "configs/demo.yaml", "--output_dir", str(output_dir)),
        *("--model.name", "GSPN-N/4", "--model.hidden_size", "16", "--model.depth", "2", "--sampling.steps", "2"),
        *("--training.batch_size", "64", "--training.trackers", "[]", "--training.num_processes", str(processes)),
        *("--training.checkpoint_every", "25", "--training.log_every", "25", *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        [*launcher, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("script, tolerance", [("train.py", 1e-4), ("tests/training/train_in_float64.py", 1e-9)])
def test_world_size_and_accumulation_change_the_order_of_sums_alone(
    tmp_path: Path, script: str, tolerance: float
) -> None:
    runs = {"1x64": (1, "1"), "2x32": (2, "1"), "2x16x2": (2, "2")}
    for name, (processes, accumulation) in runs.items():
        done = train(
            tmp_path / name,
            processes,
            "--training.max_steps",
            "50",
            "--training.gradient_accumulation_steps",
            accumulation,
            script=script,
        )
        assert done.returncode == 0, done.stderr
    one = tensors_of(tmp_path / "1x64", 50)
    for name in ("2x32", "2x16x2"):
        for key, tensor in tensors_of(tmp_path / name, 50).items():
            if key.startswith(("model/", "ema/")):
                difference = (tensor - one[key]).double().norm() / one[key].double().norm().clamp_min(1e-12)
                assert difference <= tolerance, (name, key, difference)


def test_two_processes_stopped_and_resumed_are_bit_identical(tmp_path: Path) -> None:
    for name, steps in (("whole", "50"), ("parted", "25")):
        done = train(tmp_path / name, 2, "--training.max_steps", steps)
        assert done.returncode == 0, done.stderr
    done = train(tmp_path / "parted", 2, "--training.max_steps", "50", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tensors_of(tmp_path / "whole", 50), tensors_of(tmp_path / "parted", 50))


def test_sigterm_to_the_launcher_saves_one_step_in_all_processes(tmp_path: Path) -> None:
    """The launcher forwards the signal and kills after 30 seconds; no logging or checkpoint step lies in between."""
    arguments = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"),
        *("--config", "configs/demo.yaml", "--output_dir", str(tmp_path), "--training.max_steps", "1000000"),
        *("--model.name", "GSPN-N/4", "--model.hidden_size", "16", "--model.depth", "2", "--training.trackers", "[]"),
        *("--training.log_every", "5", "--training.checkpoint_every", "1000000"),
        *("--training.validate_every", "1000000", "--training.sample_every", "1000000"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    job = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert job.stdout is not None
    lines = iter(job.stdout.readline, "")
    assert any("step 5/" in line for line in lines)
    job.send_signal(signal.SIGTERM)
    rest = job.stdout.read()
    job.wait(timeout=60)
    assert "stopped by signal 15" in rest
    (step,) = find_checkpoints(tmp_path)
    assert f"goes on from step {step}" in rest


def test_mistake_is_told_once(tmp_path: Path) -> None:
    done = train(tmp_path, 2, "--training.max_steps", "1", "--model.name", "GSPN-N/3")
    assert done.returncode != 0
    assert done.stderr.count("is not divisible by the patch size 3") == 1

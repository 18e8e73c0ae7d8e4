"""Two processes compute what one computes, and continue bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspn_dit.checkpoint import find_checkpoints
from tests.training.test_loop import assert_same_tensors, tensors_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def command(output_dir: Path, processes: int, *options: str, script: str = "train.py") -> list[str]:
    """How a script trains a tiny model on the digits in one or more processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *(*launcher, script, "--config", "configs/demo.yaml", "--output_dir", str(output_dir)),
        *("--model.name", "DiT-N/4", "--model.hidden_size", "16", "--model.depth", "2", "--sampling.steps", "2"),
        *("--training.batch_size", "64", "--training.trackers", "[]", "--training.num_processes", str(processes)),
        *("--training.checkpoint_every", "25", "--training.log_every", "25", *options),
    ]


def train(*arguments: Any, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run what `command` gives to its end."""
    return subprocess.run(
        command(*arguments, **keywords), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def start(*arguments: Any) -> subprocess.Popen[str]:
    """Start what `command` gives, in a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def wait_for_line(job: subprocess.Popen[str], words: str) -> None:
    """Read the job's output up to a line with these words."""
    assert job.stdout is not None
    assert any(words in line for line in iter(job.stdout.readline, "")), f"the job ended without '{words}'"


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


def test_two_processes_killed_and_resumed_are_bit_identical(tmp_path: Path) -> None:
    done = train(tmp_path / "whole", 2, "--training.max_steps", "50")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data    digits: 1,437 images of 10 classes") == 1
    job = start(tmp_path / "killed", 2, "--training.max_steps", "50", "--training.log_every", "1")
    wait_for_line(job, "step 30/50")
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(timeout=60)
    assert list(find_checkpoints(tmp_path / "killed")) == [25]
    done = train(tmp_path / "killed", 2, "--training.max_steps", "50", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tensors_of(tmp_path / "whole", 50), tensors_of(tmp_path / "killed", 50))


def test_sigterm_to_the_launcher_saves_one_step_in_all_processes(tmp_path: Path) -> None:
    """The launcher forwards the signal and kills after 30 seconds; no logging or checkpoint step lies in between."""
    never = "1000000"
    intervals = [f"--training.{name}_every" for name in ("checkpoint", "validate", "sample")]
    options = [word for interval in intervals for word in (interval, never)]
    job = start(tmp_path, 2, "--training.max_steps", never, "--training.log_every", "5", *options)
    wait_for_line(job, "step 5/")
    job.send_signal(signal.SIGTERM)
    assert job.stdout is not None
    rest = job.stdout.read()
    job.wait(timeout=60)
    assert "stopped by signal 15" in rest
    (step,) = find_checkpoints(tmp_path)
    assert f"--resume auto resumes from step {step}" in rest


def test_mistake_is_told_once(tmp_path: Path) -> None:
    done = train(tmp_path, 2, "--training.max_steps", "1", "--model.name", "DiT-N/3")
    assert done.returncode != 0
    assert done.stderr.count("is not divisible by the patch size 3") == 1


def test_a_classifier_is_the_same_over_two_processes(tmp_path: Path) -> None:
    """Through augmentation and mixing, whose partners may be another process's samples."""
    options = ("task=classification", "model.name=gspn_nano", "classification.crop_padding=1", "training.max_steps=20")
    options += ("classification.mixup=0.8", "classification.cutmix=1.0", "classification.erasing_probability=0.25")
    options += ("classification.randaugment_magnitude=9.0", "training.batch_size=6", "training.trackers=[]")
    options += ("training.decay_vectors=false", "training.layer_decay=0.8", "model.drop_path_rate=0.2")
    words = [f"--{option}" for option in options]
    words.append('--model.backbone_options={"widths": [8, 16], "depths": [1, 1], "global_stages": [1]}')
    for processes in (1, 2):
        launcher = command(tmp_path, processes)[: 1 if processes == 1 else 5]
        script = ["tests/training/train_in_float64.py", f"--output_dir={tmp_path / str(processes)}"]
        done = subprocess.run(
            [*launcher, *script, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    one, two = (tensors_of(tmp_path / processes, 20) for processes in ("1", "2"))
    for name, tensor in two.items():
        if name.startswith(("model/", "ema/")):
            difference = (tensor - one[name]).double().norm() / one[name].double().norm().clamp_min(1e-12)
            assert difference <= 1e-9, (name, difference)

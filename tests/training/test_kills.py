"""A run killed at random moments, again and again, ends where an uninterrupted one ends."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gspn_dit.checkpoint import find_checkpoints
from tests.training.conftest import tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20
LAST_STEPS = 4
"""How many steps an alarm may take: no machine is so fast that a run ends before its alarms."""


def continue_run(output_dir: Path, kill: tuple[int, float] | None = None) -> None:
    """Train on from where the run stands, in a process of its own; `kill` is (steps, seconds after them) to SIGKILL.

    The SIGKILL comes after `seconds` or `LAST_STEPS` more steps, whichever is first.
    """
    from gspn_dit.training import loop
    from tests.training.conftest import run_training

    if kill is not None:
        steps, seconds = kill
        original, taken = loop.Trainer.train_step, []

        def train_step(trainer: loop.Trainer) -> Any:
            taken.append(trainer.state.step)
            if len(taken) == steps:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            if len(taken) == steps + LAST_STEPS:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(trainer)

        loop.Trainer.train_step = train_step  # type: ignore[method-assign]
    run_training(tiny_config(output_dir, max_steps=240, checkpoint_every=3, log_every=2, keep_last=2), resume="auto")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_twenty_random_kills_change_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gspn_dit.training.loop", "gspn_dit.grid"])

    def run(name: str, kill: tuple[int, float] | None = None) -> int | None:
        process = context.Process(target=continue_run, args=(tmp_path / name, kill))
        process.start()
        process.join(timeout=300)
        return process.exitcode

    assert run("whole") == 0
    chance, reached = random.Random(0), [0]
    for _ in range(KILLS):
        assert run("killed", (chance.randint(1, 8), chance.uniform(0, 0.05))) == -signal.SIGKILL
        reached.append(max(find_checkpoints(tmp_path / "killed"), default=0))
    assert reached == sorted(reached) and 30 < reached[-1] < 240
    assert run("killed") == 0
    assert_same_tensors(tensors_of(tmp_path / "whole", 240), tensors_of(tmp_path / "killed", 240))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "death, words",
    [
        ("raise RuntimeError('rank one has had enough')", "RuntimeError: rank one has had enough"),
        ("os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL)"),
    ],
)
def test_rank_that_dies_ends_the_job_and_is_named(tmp_path: Path, death: str, words: str) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import os\n"
        "from gspn_dit.config import parse_train_arguments\n"
        "from gspn_dit.training import loop\n"
        "original = loop.Trainer.train_step\n"
        "def train_step(trainer):\n"
        "    if trainer.state.step == 3 and os.environ['RANK'] == '1':\n"
        f"        {death}\n"
        "    return original(trainer)\n"
        "loop.Trainer.train_step = train_step\n"
        "loop.train(parse_train_arguments())\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)),
            *("--config", "configs/demo.yaml", "--output_dir", str(tmp_path / "run"), "--training.max_steps", "1000"),
            *("--model.name", "DiT-N/4", "--model.hidden_size", "16", "--model.depth", "2"),
            *("--training.checkpoint_every", "2", "--training.trackers", "[]", "--sampling.steps", "2"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    # Start-up of two processes included; the job itself ends within seconds of the death.
    assert time.monotonic() - began < 120
    assert done.returncode != 0
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert words in summary
    assert max(find_checkpoints(tmp_path / "run")) == 2

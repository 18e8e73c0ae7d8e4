"""Signals that ask a run to end, a terminal that closes, memory and disks that give out."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from gspn_dit.checkpoint import find_checkpoints
from gspn_dit.errors import UserError, advise_on_memory
from gspn_dit.training import loop, stop
from gspn_dit.training.progress import Progress
from gspn_dit.training.stop import SIGNALS, StopSignal
from tests.training.conftest import run_training, tiny_config


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with StopSignal(1) as asked:
        assert asked.agreed() is None
        os.kill(os.getpid(), number)
        assert asked.agreed() == number
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_a_second_interrupt_kills_but_not_the_echo_of_the_first(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now, kill, sent = [0.0], os.kill, []
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    with StopSignal(1) as asked:
        kill(os.getpid(), signal.SIGINT)
        now[0] = 0.9
        kill(os.getpid(), signal.SIGINT)
        now[0] = 100.0
        kill(os.getpid(), signal.SIGTERM)  # a cluster's, while the checkpoint is being written
        assert asked.agreed() == signal.SIGINT
        monkeypatch.setattr(stop.os, "kill", lambda *call: sent.append(call))
        kill(os.getpid(), signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert capfd.readouterr().err.count("Ctrl-C again kills at once") == 1


@pytest.mark.slow
def test_interrupts_at_random_moments_lose_no_finished_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times: the checkpoint is of the step that was done at the signal, or of the one in hand."""
    original, chance, taken, done = loop.Trainer.train_step, random.Random(0), [0], [0]

    def interrupt(trainer: loop.Trainer) -> None:
        done[0] = trainer.state.step
        os.kill(os.getpid(), signal.SIGINT)

    def train_step(trainer: loop.Trainer) -> Any:
        taken[0] -= 1
        if taken[0] == 0:
            threading.Timer(chance.uniform(0, 0.05), interrupt, (trainer,)).start()
        return original(trainer)

    monkeypatch.setattr(loop.Trainer, "train_step", train_step)
    reached = [0]
    for _ in range(20):
        taken[0] = chance.randint(1, 5)
        config = tiny_config(tmp_path, max_steps=10_000, checkpoint_every=10_000, log_every=2, keep_last=1)
        run_training(config, resume="auto")
        reached += list(find_checkpoints(tmp_path))
        assert done[0] <= reached[-1] <= done[0] + 1
    assert reached == sorted(set(reached)) and len(reached) == 21


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(1) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.agreed() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_ends_the_showing_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        progress = Progress(0, 10, Accelerator(cpu=True))
        for _ in range(3):
            progress.advance()
            progress.show({"loss": 1.0, "images_per_second": 2.0})
        assert progress.step == 3


def test_a_clock_that_is_set_while_a_run_works_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps, clock = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + jumps.uniform(-3e7, 3e7))
    run_training(tiny_config(tmp_path, max_steps=3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(find_checkpoints(tmp_path)) == [2, 3]
    assert all(0 < line["images_per_second"] < 1e6 for line in lines if "loss" in line)


@pytest.mark.parametrize("lost", ["output", "data"])
def test_a_network_drive_that_vanishes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    file = tmp_path / "run" / "metrics.jsonl" if lost == "output" else "/net/images/1.png"

    def vanish(*arguments: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(file))

    monkeypatch.setattr(loop.Trainer, "train_step", vanish)
    with pytest.raises(UserError) as caught:
        run_training(tiny_config(tmp_path / "run"))
    named = f"output_dir {tmp_path / 'run'} cannot be written" if lost == "output" else f"{file} cannot be used"
    assert str(caught.value) == (
        f"{named}: [Errno {errno.ESTALE}] Stale file handle: '{file}'; checkpoints stay as they are, resume with "
        "--resume auto"
    )


def test_memory_that_runs_out_names_the_batch_and_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Trainer, "train_step", lambda trainer: torch.empty(1 << 60))
    with pytest.raises(UserError) as caught:
        run_training(tiny_config(tmp_path / "run", gradient_accumulation_steps=2))
    message = str(caught.value)
    assert "out of memory: training.batch_size is 8, of which each process takes 4 images at a time; lower" in message
    assert "training.gradient_accumulation_steps" in message and "DefaultCPUAllocator" in message


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("x: out of memory")],
)  # fmt: skip
def test_every_kind_of_memory(error: Exception) -> None:
    with pytest.raises(UserError, match="out of memory: lower --batch-size"), advise_on_memory("lower --batch-size"):
        raise error


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shape"), advise_on_memory("lower --batch-size"):
        raise RuntimeError("shape mismatch")

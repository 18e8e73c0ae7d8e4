"""What is printed before the first step, and the first estimate of the time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gspn_dit.config import DataConfig
from gspn_dit.training import progress as progress_module
from gspn_dit.training.progress import Progress
from tests.training.conftest import run_training, tiny_config


def test_a_run_says_what_it_reads_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run", max_steps=3, validate_every=2)
    run_training(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "data    digits: 1,437 images of 10 classes, 8x8 grey; 16 of 360 more for validation",
        lines[1],
        "run     3 steps of 8 images, 0.0167 epochs, seed 0, 1 process on cpu, float32",
        f"writes  {tmp_path / 'run'}: a checkpoint every 2, a validation every 2 steps, and all of them at the last "
        "step",
    ]
    assert lines[1].startswith("model   GSPN-N/4, ") and lines[4].startswith("step 1/3")
    run_training(dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=4)), "auto")
    resumed = capsys.readouterr().out.splitlines()
    assert resumed[2].startswith("run     from step 3 on, 1 step of 8 images")


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/@eaDir/0.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name)
    config = tiny_config(tmp_path / "run", max_steps=1)
    data = DataConfig(name="imagefolder", path=str(tmp_path / "set"), validation_fraction=0.5)
    run_training(dataclasses.replace(config, data=data))
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"data    {tmp_path / 'set'}: 2 images of 2 classes, 8x8 RGB; 2 more for validation",
        "        left out: hidden or system folders: 1 (@eaDir)",
    ]


def make_progress(is_main: bool, monkeypatch: pytest.MonkeyPatch, seconds_per_step: float) -> Progress:
    clock = SimpleNamespace(now=100.0)
    found = Progress(10, 1010, SimpleNamespace(is_main_process=is_main, device=torch.device("cpu")))  # type: ignore[arg-type]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock.now)
    original = found.advance

    def advance() -> None:
        clock.now += 50.0 if found.step == 10 else seconds_per_step  # the first step warms up
        original()

    found.advance = advance  # type: ignore[method-assign]
    return found


def test_the_time_is_estimated_once_when_steps_were_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step does not count; at 2 s a step three are enough, and 996 are left."""
    progress = make_progress(True, monkeypatch, 2.0)
    for _ in range(3):
        progress.advance()
    assert capsys.readouterr().out == ""
    for _ in range(9):
        progress.advance()
    assert capsys.readouterr().out == (
        "time    about 00:33:12 for the 996 steps left, at 2 s a step; previews, validation and checkpoints come on "
        "top\n"
    )


def test_short_steps_are_timed_for_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make_progress(True, monkeypatch, 0.125)
    for _ in range(8):
        progress.advance()
    assert capsys.readouterr().out == ""
    progress.advance()
    assert "for the 991 steps left, at 0.125 s a step" in capsys.readouterr().out


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = make_progress(False, monkeypatch, 2.0)
    for _ in range(9):
        progress.advance()
    assert capsys.readouterr().out == ""

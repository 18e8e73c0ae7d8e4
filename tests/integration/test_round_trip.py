"""The main job through its command lines: train, resume, sample, report; and what a mistake prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--config", "configs/demo.yaml", "--model.depth", "2", "--model.hidden_size", "16"),
    *("--training.batch_size", "16", "--training.log_every", "5", "--training.trackers", "[]", "--sampling.steps", "2"),
)


def command(*arguments: str | Path, module: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *(["-m"] if module else []), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(*arguments: str | Path, module: bool = False) -> str:
    done = command(*arguments, module=module)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_resume_sample_report(tmp_path: Path) -> None:
    run, report = tmp_path / "run", tmp_path / "report"
    train = ("train.py", *TINY, "--output_dir", run)
    succeed(*train, "--training.max_steps", "20")
    assert "step 30/30" in succeed(*train, "--training.max_steps", "30", "--resume", "auto")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20, 25, 30]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]

    sample = ("sample.py", "--checkpoint", run, "--classes", "0-9", "--steps", "2")
    succeed(*sample, "--per-class", "8", "--out", tmp_path / "grid.png", "--save-npz", tmp_path / "samples.npz",
            "--order", "interleaved", "--save-images", tmp_path / "images")  # fmt: skip
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (80, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == list(range(10)) * 8
    third = np.asarray(Image.open(sorted((tmp_path / "images").iterdir())[3]))
    assert np.array_equal(third, images[3, :, :, 0])

    succeed("fid", "--samples", tmp_path / "samples.npz", "--reference", "digits", "--features", "digits",
            "--out", report, module=True)  # fmt: skip
    scores = json.loads((report / "report.json").read_text())["scores"]
    assert scores["n"] == 80 and np.isfinite(scores["FD-digits"]) and scores["FD-digits"] > 0
    assert not any(name.startswith("FID") for name in scores)
    assert "FD-digits" in (report / "report.md").read_text()
    assert Image.open(report / "grid.png").size[0] > 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("train.py", "--config", "configs/demo.yaml", "--training.lr", "1"), "unknown key 'training.lr'"),
        (
            ("train.py", "--config", "configs/demo.yaml", "--training.max_step", "1"),
            "did you mean 'training.max_steps'",
        ),
        (("train.py", "--config", "configs/absent.yaml"), "config file configs/absent.yaml does not exist"),
        (("sample.py", "--checkpoint", "absent", "--out", "grid.png"), "checkpoint absent does not exist"),
        (("sample.py", "--chekpoint", "x", "--out", "grid.png"), "--checkpoint"),
    ],
)
def test_mistakes_print_one_line_and_exit_with_2(arguments: tuple[str, ...], words: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and words in done.stderr
    assert done.stdout == ""
    assert not (ROOT / "grid.png").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_answers_within_three_seconds(script: str) -> None:
    """Measured in processor time, which other work on the machine does not stretch."""
    timed = (
        "import resource, subprocess, sys;"
        f"done = subprocess.run([sys.executable, {script!r}, '--help'], capture_output=True, text=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(done.returncode, len(done.stdout), used.ru_utime + used.ru_stime)"
    )
    code, length, seconds = succeed("-c", timed).split()
    assert code == "0" and int(length) > 500
    assert float(seconds) < 3

"""What studies share: runs that are done or of other settings, facts measured once, rates, intervals of pairs."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calibration, study
from benchmarks.study import best_rate, call, interval, once, paired_ratio, train
from gspn_dit.config import parse_train_arguments, save_config
from gspn_dit.errors import UserError

WORDS = ["--config", "configs/demo.yaml", "--training.max_steps", "40"]


def make_run(run: Path, step: int) -> None:
    """What a training leaves that has come to a step."""
    run.mkdir(parents=True)
    save_config(parse_train_arguments([*WORDS, "--output_dir", str(run)]).config, run / "config.yaml")
    (run / "environment.json").write_text(json.dumps({"git_commit": "0123456789abcdef", "git_changes": True}))
    lines = [{"step": step // 2, "val_loss": 9.0, "loss": 2.0}, {"step": step, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_run_that_is_done_is_not_trained_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_run(tmp_path / "run", 40)
    monkeypatch.setattr(study, "call", lambda *_: pytest.fail("it ran"))
    expected = {"step": 40, "val_loss": 9.0, "loss": 1.0, "commit": "0123456-dirty"}
    assert train(WORDS, tmp_path / "run") == expected


def test_a_run_that_was_interrupted_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_run(tmp_path / "run", 20)
    asked: list[list[str]] = []
    monkeypatch.setattr(study, "call", lambda words, log: asked.append([*words, str(log)]))
    train(WORDS, tmp_path / "run")
    log = str(tmp_path / "run.log")
    assert asked == [["train.py", *WORDS, "--output_dir", str(tmp_path / "run"), "--resume", "auto", log]]


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 40)
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} was trained with other settings; delete it"):
        train([*WORDS, "--seed", "7"], tmp_path / "run")


def test_a_failure_names_the_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"-c import sys.* failed with exit code 3; see .*log"):
        call(["-c", "import sys; print('why'); sys.exit(3)"], tmp_path / "some" / "log")
    assert (tmp_path / "some" / "log").read_text() == "why\n"


def test_a_fact_is_measured_once(tmp_path: Path) -> None:
    assert once(tmp_path / "some" / "fact.json", lambda: {"a": 1}) == {"a": 1}
    assert once(tmp_path / "some" / "fact.json", lambda: pytest.fail("again")) == {"a": 1}


def test_a_calibration_is_kept_when_variants_are_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def measure(words: dict[str, list[str]], *_: object) -> dict[str, float]:
        asked.append(list(words))
        return {name: 10.0 * len(asked) + 5.0 * (name == "c") for name in words}

    monkeypatch.setattr(calibration, "milliseconds_per_step", measure)
    variants: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    file = tmp_path / "some" / "calibration.json"
    assert calibration.calibrated(file, {name: variants[name] for name in "ab"}) == {"a": 10.0, "b": 10.0}
    assert calibration.calibrated(file, {"b": []}) == {"b": 10.0}
    # "c" took 25 where "a" took 20, so that it takes 12.5 where "a" took 10
    assert calibration.calibrated(file, variants) == {"a": 10.0, "b": 10.0, "c": 12.5}
    assert asked == [["a", "b"], ["a", "c"]]


def test_a_step_of_several_sizes_takes_the_mean_of_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A median over steps of both sizes would be that of one."""
    times = [1.0, 4.0, 4.0]
    asked = []

    def measure(words: Mapping[str, Sequence[str]], _folder: Path, rounds: int, _clock: Any, average: Any) -> Any:
        asked.append(rounds)
        return {name: average(times) for name in words}

    monkeypatch.setattr(calibration, "milliseconds_per_step", measure)
    assert calibration.calibrated(tmp_path / "one.json", {"a": []}, 10) == {"a": 4.0}
    assert calibration.calibrated(tmp_path / "two.json", {"a": []}, 10, sides=(32, 64)) == {"a": 3.0}
    assert asked == [10, 40]


READINGS = itertools.count()


def clock_of_process() -> float:
    """Seconds by which every step takes as many milliseconds as the number of its process."""
    return next(READINGS) % 2 * os.getpid() / 1e3


def test_each_variant_is_timed_in_processes_of_its_own(tmp_path: Path) -> None:
    words = [*WORDS, "--training.batch_size", "2"]
    steps: list[Sequence[float]] = []
    calibration.milliseconds_per_step(
        {"a": words, "b": words}, tmp_path, 4, clock_of_process, lambda times: steps.append(times) or 0.0
    )
    processes = [round(step) for times in steps for step in times]
    assert [processes.count(one) for one in dict.fromkeys(processes)] == [2, 2, 2, 2] and os.getpid() not in processes


def test_what_a_timed_training_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        calibration.milliseconds_per_step({"a": [*WORDS, "--training.batch_size", "0"]}, tmp_path, 2)


def test_the_best_rate_and_whether_a_better_one_may_lie_beyond() -> None:
    assert best_rate({1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0}) == {
        "losses": {1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0},
        "best": 2e-3,
        "at_an_end": False,
    }
    assert best_rate({1e-3: 1.0, 2e-3: 2.0})["at_an_end"]


def test_intervals_of_two() -> None:
    """Student's t of one degree of freedom is 12.7062; ratios 2 and 8 have the geometric mean 4."""
    found = interval([0.1, 0.3])
    assert found["mean"] == pytest.approx(0.2)
    assert found["high"] - 0.2 == pytest.approx(12.7062 * math.sqrt(0.02) / math.sqrt(2), rel=1e-4)
    assert math.isnan(interval([1.0])["low"])
    values = [("a", 1, 2.0), ("b", 1, 1.0), ("a", 2, 8.0), ("b", 2, 1.0), ("a", 3, 99.0)]
    rows = [{"variant": variant, "seed": seed, "fd": value} for variant, seed, value in values]
    ratio = paired_ratio(rows, "fd", "a", "b")
    assert ratio["mean"] == pytest.approx(4) and ratio["pairs"] == 2

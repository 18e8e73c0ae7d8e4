"""A study of quality from its plan to its table: killed and resumed, with trainings that are made up, and real ones."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calibration, contest, evidence, quality, scoring
from benchmarks.contenders import CONTENDERS, fitted, parameters
from benchmarks.contest import Cell, drift
from benchmarks.presets import PRESETS
from benchmarks.protocol import UNWANTED
from benchmarks.quality_tables import fair_table
from benchmarks.scoring import METRICS
from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import UserError

DIGITS = scoring.DATA_SETS["digits"]
NAMES = ["attention", "conv", "gspn-normed"]
BASE = {"attention": 2.0, "conv": 3.0, "gspn-normed": 1.5}
BEST_RATE = {"attention": 0.016, "conv": 0.004, "gspn-normed": 0.064}
"""The last lies beyond the first grid."""
MILLISECONDS = {"attention": 10.0, "conv": 5.0, "gspn-normed": 20.0}
LONGER = {"conv": 1.1}
BETTER = 1
"""The number of the setting that is best for all."""
COMMAND = ["--data", "digits", "--contenders", *NAMES, "--trials", "2", "--seconds", "10", "--finalists", "1"]


class World:
    """Trainings that take no time, whose FD is a formula."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: Counter[str] = Counter()
        self.parsed: set[str] = set()
        self.stop_after = math.inf
        self.cells: dict[str, Cell] = {}
        arguments = Cell.arguments

        def remembered(cell: Cell, size: str) -> list[str]:
            self.cells[str(cell)] = cell
            return [*arguments(cell, size), "--cell", str(cell)]

        monkeypatch.setattr(Cell, "arguments", remembered)
        monkeypatch.setattr(scoring.DataSet, "check", lambda _: None)
        monkeypatch.setattr(scoring.DataSet, "net", net_of)
        monkeypatch.setattr(contest, "train", self.train)
        monkeypatch.setattr(contest, "call", self.score)
        monkeypatch.setattr(calibration, "milliseconds_per_step", self.time)

    def train(self, words: Sequence[str], run: Path) -> dict[str, Any]:
        cell = self.cells[words[-1]]
        if cell.contender not in self.parsed:  # once, because it takes a while
            self.parsed.add(cell.contender)
            config = parse_train_arguments([*words[:-2], "--output_dir", str(run)]).config
            assert (config.training.max_steps, config.training.learning_rate) == (cell.steps, cell.rate)
        run.mkdir(parents=True, exist_ok=True)
        (run / "environment.json").write_text(json.dumps({"git_commit": "0123456789", "git_changes": False}))
        if not (run / "metrics.jsonl").exists():
            if len(self.trained) >= self.stop_after:
                raise KeyboardInterrupt
            self.trained[words[-1]] += 1
            (run / "metrics.jsonl").write_text(json.dumps({"step": cell.steps, "loss": 1.0}) + "\n")
        (run / "cell").write_text(words[-1])
        if cell.contender == "conv" and cell.rate > 0.01:
            run.with_name("run.log").write_text("8 steps in a row had a non-finite loss or gradient and were skipped")
            raise UserError("it failed")
        return {"val_loss": formula(cell)}

    def score(self, words: Sequence[str], log: Path) -> None:
        directory = Path(words[2])
        cell = self.cells[(directory / "run" / "cell").read_text()]
        options = fitted(cell.contender, cell.setting, cell.data, "N")
        figures = {
            **dict.fromkeys(METRICS, 0.5),
            "parameters": parameters(cell.data, options),
            # In convolution's trainings steps take longer than they were timed.
            "training_seconds": cell.steps * MILLISECONDS[cell.contender] / 1e3 * LONGER.get(cell.contender, 1.0),
            "setting": DIGITS.setting,
        }
        (directory / "result.json").write_text(json.dumps(figures | {"fd": formula(cell)}))

    def time(self, arguments: Mapping[str, Sequence[str]], folder: Path, *_: Any) -> dict[str, float]:
        slower = {"gspn-normed": 1.2} if folder.name.startswith("recheck") else {}
        names = {key: key.split()[0] for key in arguments}
        return {key: MILLISECONDS[name] * slower.get(name, 1.0) for key, name in names.items()}


def net_of(data: scoring.DataSet) -> dict[str, Any]:
    known = {"features": 64, "architecture": "conv"}
    return {"score": data.name, "sha256": hashlib.sha256(data.features.encode()).hexdigest(), **known}


def formula(cell: Cell) -> float:
    settings = CONTENDERS[cell.contender].settings(2)
    fd = BASE[cell.contender] * (1 + abs(math.log2(cell.rate / BEST_RATE[cell.contender])))
    fd *= 1.0 if cell.setting == settings[BETTER] else 1.1
    wobble = 0.01 * BASE[cell.contender] * (cell.seed % 3)
    return fd * math.exp(wobble) * (1000 / cell.steps) ** 0.5


def found(work: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((work / "study.json").read_text())
    for of in result["data"].values():
        assert of.pop("machine")["cores"] and of.pop("software")["torch"]
    return result


def ratio(result: Mapping[str, Any], budget: int, kind: str, rival: str) -> dict[str, Any]:
    key = {"budget": budget, "kind": kind, "rival": rival}
    (entry,) = (row for row in result["comparisons"] if {name: row[name] for name in key} == key)
    return entry


def test_a_study_that_is_stopped_and_resumed_is_the_uninterrupted_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = World(monkeypatch)
    once, twice = (["--work", str(tmp_path / name)] for name in ("once", "twice"))
    quality.main([*COMMAND, *once, "--jobs", "1"])
    assert set(world.trained.values()) == {1}
    trained, world.trained, world.stop_after = set(world.trained), Counter(), 17
    with pytest.raises(KeyboardInterrupt):
        quality.main([*COMMAND, *twice, "--jobs", "1"])
    assert len(world.trained) == 17 and not (tmp_path / "twice" / "study.json").exists()
    world.stop_after = math.inf
    quality.main([*COMMAND, *twice, "--jobs", "1"])
    assert set(world.trained.values()) == {1} and set(world.trained) == trained
    assert found(tmp_path / "once") == found(tmp_path / "twice")
    with pytest.raises(UserError, match=r"twice holds a study of another protocol; give another --work"):
        quality.main([*COMMAND, *twice, "--seeds", "6"])


def test_what_a_study_chooses_and_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    World(monkeypatch)
    quality.main([*COMMAND, "--work", str(tmp_path), "--out", str(tmp_path / "out.json"), "--jobs", "1"])
    result = found(tmp_path)
    digits = result["data"]["digits"]
    for name in NAMES:
        search = digits["search"][name]
        best = {budget: rates["best"] for budget, rates in search["rates"].items()}
        assert best == {"1": pytest.approx(BEST_RATE[name]), "4": pytest.approx(BEST_RATE[name])}
        assert search["chosen"] == dict(CONTENDERS[name].settings(2)[BETTER])
        assert len(search["first_rates"]["loss"]) >= 5 and len(search["rates"]["1"]["loss"]) >= 5
    assert digits["search"]["conv"]["first_rates"]["loss"]["0.032"] is None  # it diverged
    cells = digits["cells"]
    scored = [cell for cell in cells if any("equal" in role for role in cell["for"])]
    assert {cell["seed"] for cell in scored} == set(range(5))
    searched = [cell for cell in cells if cell not in scored]
    assert {cell["seed"] for cell in searched} == {100}
    assert not any("fd" in cell for cell in searched)  # what chooses draws nothing
    steps = {(c["variant"], role): c["steps"] for c in scored for role in c["for"] if c["rate"] and "16" not in role}
    assert steps["attention", "1×, equal time"] == steps["conv", "1×, equal steps"] == 1000
    assert steps["conv", "1×, equal time"] == 2000 and steps["gspn-normed", "4×, equal time"] == 2000
    assert steps["gspn-normed", "4×, equal steps"] == 4000
    assert {cell["variant"] for cell in cells if "16×, equal time" in cell["for"]} == {"attention", "gspn-normed"}
    # FD ∝ base · exp(0.01 · base · (0, 1, 2, 0, 1)) / √steps: means of logarithms by hand.
    wobble = 0.01 * (1.5 - 2.0) * 4 / 5
    steps_alike = ratio(result, 1, "equal steps", "attention")
    assert steps_alike["fd"]["mean"] == pytest.approx(1.5 / 2 * math.exp(wobble))
    assert steps_alike["fd"]["pairs"] == 5
    time_alike = ratio(result, 4, "equal time", "attention")
    assert time_alike["fd"]["mean"] == pytest.approx(1.5 / 2 * 2**0.5 * math.exp(wobble))
    table = result["comparisons"]
    assert len(table) == 4 * 2 + 2 * 1  # two budgets of two kinds with two rivals, the largest with one
    assert all(row["p"] <= row["p_holm"] <= len(table) * row["p"] + 1e-12 for row in table)
    smallest = min(table, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(len(table) * smallest["p"])
    points = {(p["variant"], p["budget"]): p["fd"]["mean"] for p in result["curves"] if p["kind"] == "equal time"}
    assert points["attention", 16] == pytest.approx(points["attention", 1] / 4)
    assert not digits["time_held"] and max(digits["drift"].values()) == pytest.approx(0.2)
    plain = json.loads(
        (tmp_path / "out.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert plain["data"]["digits"]["plan"]["dropped"] == []
    text = fair_table(plain)
    entry = f"{steps_alike['fd']['mean']:.3f} [{steps_alike['fd']['low']:.3f}, {steps_alike['fd']['high']:.3f}]"
    assert f"| digits, 16 tokens | 1×, equal steps | gspn-normed | attention | {entry} |" in text
    assert "| digits, 16 tokens | 4×, equal time | conv | 0.004 | 8,000 | 44.0 | 5 |" in text
    assert "trainings at equal time took, beside the first model's: conv +10 % (digits)." in text
    assert (
        "A budget of 1× is, of the processor's time, 10 s (digits). A step's time moved by more than 5 % on digits."
        in text
    )
    assert "learning rates and options chosen on" in text
    assert f"FD is by the features of conv {net_of(DIGITS)['sha256'][:8]} (digits)." in text
    evidence.draw({"quality": plain}, tmp_path)
    assert (tmp_path / "evidence_quality.png").stat().st_size > 1000


def test_a_study_whose_trainings_all_diverge_is_tabulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Convolution diverges in every scored cell but one, scans in all: no pair is left, and no interval of one seed."""
    world = World(monkeypatch)
    train = world.train

    def diverging(words: Sequence[str], run: Path) -> dict[str, Any]:
        done, cell = train(words, run), world.cells[words[-1]]
        if (cell.contender == "conv" and 1 <= cell.seed < 100) or (cell.contender == "gspn-normed" and cell.seed < 100):
            run.with_name("run.log").write_text("8 steps in a row had a non-finite loss or gradient and were skipped")
            raise UserError("it failed")
        return done

    monkeypatch.setattr(contest, "train", diverging)
    words = ["--budgets", "1", "--drop", "options", "equal-steps", "--jobs", "2"]
    quality.main([*COMMAND, "--work", str(tmp_path), *words])
    result = json.loads((tmp_path / "study.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name}"))
    assert [row["fd"] for row in result["comparisons"]] == [None, None]
    assert [row["diverged"] for row in result["comparisons"]] == [5, 9]
    (conv,) = (point for point in result["curves"] if point["variant"] == "conv")
    assert conv["seeds"] == 1 and conv["fd"]["low"] is None
    text = fair_table(result)
    assert "| gspn-normed | attention | no pair | no pair | 1.0 | 5 |" in text
    assert "learning rates chosen on" in text
    assert "Dropped: options by halving, and their learning rates (digits), 1×, equal steps (digits)." in text
    evidence.draw({"quality": result}, tmp_path)
    assert (tmp_path / "evidence_quality.png").stat().st_size > 1000


def test_scores_of_two_feature_extractors_do_not_share_a_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    World(monkeypatch)
    words = [*COMMAND, "--budgets", "1", "--drop", "options", "equal-steps", "--work", str(tmp_path)]
    quality.main(words)
    scores = (tmp_path / "study.json").read_bytes()
    with pytest.raises(UserError, match=r"--features of digits is other, but .* holds scores by digits with SHA-256"):
        quality.main([*words, "--features", "other"])
    assert (tmp_path / "study.json").read_bytes() == scores


def test_data_sets_that_were_studied_apart_share_one_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Columns of p-values are corrected for both; an earlier study's own figures stay as they are."""
    World(monkeypatch)
    words = [*COMMAND[2:], "--budgets", "1", "4", "--drop", "options", "equal-steps", "early-scores", "--hours", "99"]
    first, second = tmp_path / "first", tmp_path / "second"
    quality.main([*words, "--data", "digits", "--work", str(first)])
    apart = json.loads((first / "study.json").read_text())
    assert [(row["data"], row["budget"]) for row in apart["comparisons"]] == 2 * [("digits", 4)]
    (first / "study.json").write_text(json.dumps(apart).replace('"cores": ', '"cores": 9'))  # another machine's
    both = [*words, "--data", "fashion", "--work", str(second), "--beside", str(first / "study.json")]
    quality.main(both)
    joined = json.loads((second / "study.json").read_text())
    assert [row["data"] for row in joined["comparisons"]] == 2 * ["digits"] + 2 * ["fashion"]
    assert joined["comparisons"][0] | {"p_holm": 0} == apart["comparisons"][0] | {"p_holm": 0}
    smallest = min(joined["comparisons"], key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, 4 * smallest["p"]))
    text = fair_table(joined)
    assert re.search(r"Trained at .*\. digits: [^:]*, 9\d+ cores.* fashion: [^:]*cores", text)
    evidence.draw({"quality": joined}, tmp_path)  # no data set has two budgets
    assert (tmp_path / "evidence_quality.png").stat().st_size > 1000
    for other in (["--seeds", "6"], ["--budgets", "1", "8"]):
        with pytest.raises(UserError, match=r"study\.json is a study by another protocol; its figures cannot share"):
            quality.main([*both, *other])
    (tmp_path / "bare.json").write_text('{"protocol": {}, "data": {}}')
    with pytest.raises(UserError, match=r"bare\.json is a study by another protocol"):
        quality.main([*both, "--beside", str(tmp_path / "bare.json")])
    larger = [*both, "--budgets", "1", "4", "16", "--work", str(tmp_path / "larger"), "--out", str(tmp_path / "out")]
    quality.main(larger)  # for fashion alone
    joined = json.loads((tmp_path / "out").read_text())
    assert (joined["protocol"]["budgets"], joined["protocol"]["widest"]) == ([1, 4, 16], "fashion")
    assert {(row["data"], row["budget"]) for row in joined["comparisons"]} == {
        ("digits", 4),
        ("fashion", 4),
        ("fashion", 16),
    }
    quality.main([*words, "--data", "digits", "--work", str(first), "--beside", str(tmp_path / "out")])  # the other way
    again = json.loads((first / "study.json").read_text())
    assert again["comparisons"] == joined["comparisons"] and again["protocol"] == joined["protocol"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_into_their_hours_and_say_what_they_do_without(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.main(["--preset", name, "--plan"])
    out = capsys.readouterr().out
    words = PRESETS[name].words
    kinds = itertools.takewhile(lambda word: not word.startswith("--"), words[words.index("--drop") + 1 :])
    left_out = [UNWANTED[kind] for kind in kinds]
    assert left_out
    reason, *parts, _ = out.splitlines()
    assert reason.startswith(f"{name}: ")
    for line in parts:
        part = re.split(r" {2,}", line)[1]
        assert ("dropped" in line) == any(unwanted(part) for unwanted in left_out), line
    assert float(re.findall(r"cells, ([\d.]+) hours of 2 cores", out)[0]) <= 5
    assert not re.search(r"\b5 cells of", out)  # five seeds of each, never fewer


def test_options_change_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    quality.main(["--preset", "small", "--plan", "--data", "fashion-256", "--jobs", "1"])
    out = capsys.readouterr().out
    assert "digits" not in out and re.search(r"fashion-256 +4×, equal time +20 cells of +235 s", out)
    seconds = ["fashion-256=10", "digits=1", "fashion=1", "fashion-latents=1"]
    quality.main(["--preset", "small", "--plan", "--seconds", *seconds])
    assert re.search(r"fashion-256 +4×, equal time +20 cells of +155 s", capsys.readouterr().out)


def test_what_is_dropped_is_not_run_and_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    World(monkeypatch)
    hours = next(tenths / 10 for tenths in range(1, 1000) if "4×, equal steps" in kept_names(tenths / 10))
    quality.main([*COMMAND, "--work", str(tmp_path), "--hours", str(hours), "--jobs", "1"])
    result = found(tmp_path)
    dropped = [part["part"] for part in result["data"]["digits"]["plan"]["dropped"]]
    assert dropped == ["16×, equal steps"]
    assert not [cell for cell in result["data"]["digits"]["cells"] if "16×, equal steps" in cell["for"]]
    assert "16×, equal steps" in capsys.readouterr().out


def kept_names(hours: float) -> set[str]:
    """What the command's plan keeps within so many hours of one core; nothing where the plan is refused."""
    from benchmarks.protocol import Field, Protocol, fit_into, parts

    digits = dataclasses.replace(DIGITS, seconds=10)
    every = parts(Protocol(trials=2, finalists=1), [Field(digits, tuple(NAMES))])
    try:
        return {part.name for part in fit_into(every, hours, 1)[0]}
    except UserError:
        return set()


def test_the_plan_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((contest, "train"), (contest, "call"), (calibration, "milliseconds_per_step")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it ran"))
    quality.main([*COMMAND, "--work", str(tmp_path / "work"), "--plan", "--jobs", "2"])
    out = capsys.readouterr().out
    assert re.search(r"digits +1×, equal time +15 cells of +35 s +0\.15 core hours", out)  # 15 · 35 s are 0.146 h
    assert "hours of 2 cores; seeds are not dropped" in out
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--contenders", "gspn", "conv"],
            "--contenders begins with gspn, but the first is what others are measured by; put a rival",
        ),
        (["--widest", "fashion"], "--widest is fashion, but must be one of --data: digits"),
        (["--jobs", "0"], "--jobs is 0, but must be at least 1"),
        (
            ["--only", "digits=gspn,conv"],
            "--only begins with gspn, but the first is what others are measured by; put a rival",
        ),
        (["--only", "digits=attention,mamba"], "--only names mamba, but contenders are attention, attention-lpu, "),
        (["--seconds", "0"], "--seconds is 0, but must be a number above 0"),
        (["--seconds", "digits=soon"], "--seconds is soon, but must be a number above 0"),
        (["--seeds", "3"], "--seeds is 3, but a fair study needs at least 5"),
        (["--trials", "99"], "--trials is 99, but a contender has 16 settings; give fewer"),
        (["--size", "M"], "--size is M, but must be one of N, T, S, B, L, XL"),
        (
            ["--out", "setup.py/study.json"],
            "--out setup.py/study.json cannot be created: .* is not a directory",
        ),
        (["--hours", "0.01"], "the plan takes .* hours at least, but --hours is 0.01"),
    ],
)
def test_what_is_refused_before_anything_runs(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        quality.main([*COMMAND, "--work", str(tmp_path / "work"), *words])
    assert not (tmp_path / "work").exists()


def test_models_of_other_parameters_than_planned_are_refused() -> None:
    setting = CONTENDERS["conv"].settings(1)[0]
    planned = parameters(DIGITS, fitted("conv", setting, DIGITS, "N"))
    row = {"variant": "conv", "data": "digits", "options": dict(setting), "diverged": False, "parameters": planned}
    contest.refuse_unequal([row], DIGITS, "N")
    with pytest.raises(UserError, match=r"conv on digits has .* parameters, but .* were planned and attention has"):
        contest.refuse_unequal([{**row, "parameters": planned + 64}], DIGITS, "N")


def test_drift_is_of_times_over_the_references() -> None:
    """A machine half as fast for all is no drift."""
    assert drift({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 4.0}, "a") == {"a": 0, "b": 0}
    assert drift({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.2}, "a")["b"] == pytest.approx(0.1)


def test_a_training_that_failed_for_another_reason_stops_the_study(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(words: Sequence[str], run: Path) -> None:
        run.mkdir(parents=True)
        run.with_name("run.log").write_text("no space left on device")
        raise UserError("train.py failed")

    monkeypatch.setattr(contest, "train", fail)
    cell = Cell(DIGITS, "attention", CONTENDERS["attention"].settings(1)[0], 0.01, 5, 0)
    with pytest.raises(UserError, match=r"train.py failed"):
        contest.run_cell(cell, tmp_path, "N")
    assert not (cell.directory(tmp_path, "N") / "result.json").exists()


# -- real trainings --------------------------------------------------------------------------------------------------

REAL = """
import dataclasses, json, math, os, signal, sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from benchmarks import calibration, contest, quality, scoring, study
from gspn_dit.config import parse_train_arguments
from gspn_dit.training.loop import train

torch.set_num_threads(1)
scoring.SETTING.update(steps=1, reference=100)
scoring.DATA_SETS["digits"] = dataclasses.replace(scoring.DATA_SETS["digits"], samples=100)
work, last = sys.argv[1], int(sys.argv[2])
done = Path(work) / "trained.txt"

def train_here(words, log):
    AcceleratorState._reset_state(reset_partial_state=True)
    with done.open("a") as file:
        file.write(words[words.index("--output_dir") + 1] + "\\n")
    train(parse_train_arguments(words[1:]))

def score_here(words, log):
    scoring.score_cell(Path(words[2]), scoring.DATA_SETS["digits"])

trained = contest.train

def train_and_tell(words, run):
    found = trained(words, run)
    assert math.isfinite(found["val_loss"])
    if len(done.read_text().splitlines()) >= last:
        os.kill(os.getpid(), signal.SIGKILL)
    rate = float(run.parents[1].name.removeprefix("rate-"))
    return {**found, "val_loss": 1 + abs(math.log2(rate / 0.008))}  # two steps say nothing of rates

class InTurn:  # trainings take signals, which the main thread alone can
    def __init__(self, jobs): ...
    def __enter__(self): return self
    def __exit__(self, *_): ...
    map = staticmethod(map)

study.call, contest.call, contest.train, contest.ThreadPoolExecutor = train_here, score_here, train_and_tell, InTurn
contest.SEARCH_ROUNDS = calibration.ROUNDS = 3
quality.main(["--work", work, *sys.argv[3:]])
"""


@pytest.mark.slow
def test_real_trainings_killed_and_resumed(tmp_path: Path) -> None:
    """Two contenders, five seeds, one budget of some steps, and so few hours that the search of options and equal steps
    are dropped: every cell is trained once, whatever was killed.
    """

    def run(last: int) -> tuple[int, str]:
        words = ["--data", "digits", "--contenders", "attention", "gspn-normed", "--trials", "2", "--budgets", "1"]
        words += ["--seconds", "0.4", "--jobs", "1", "--hours", "0.12"]
        command = [sys.executable, "-c", REAL, str(tmp_path), str(last), *words]
        done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
        return done.returncode, done.stderr[-2000:]

    root = Path(scoring.__file__).parents[1]
    assert run(6)[0] == -signal.SIGKILL
    assert not (tmp_path / "study.json").exists()
    code, told = run(10**6)
    assert code == 0, told
    result = json.loads((tmp_path / "study.json").read_text())
    trained = (tmp_path / "trained.txt").read_text().splitlines()
    cells = result["data"]["digits"]["cells"]
    assert len(trained) == len(set(trained)) == len(cells) == 2 * (5 + 5)
    assert all(math.isfinite(cell["val_loss"]) for cell in cells)
    assert {row["kind"] for row in result["comparisons"]} == {"equal time"}
    assert [part["part"].split(",")[0] for part in result["data"]["digits"]["plan"]["dropped"]] == [
        "1×",
        "options by halving",
    ]
    assert {search["rates"]["1"]["best"] for search in result["data"]["digits"]["search"].values()} == {0.008}

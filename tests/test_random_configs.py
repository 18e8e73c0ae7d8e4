"""Whatever a config file holds, training answers with a run, or with one line and exit code 2, never a traceback."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import hypothesis.strategies as st
import pytest
import yaml
from accelerate.state import AcceleratorState
from hypothesis import Phase, given, settings

from gspn_dit.config import TrainArguments, parse_train_arguments
from gspn_dit.config.parsing import _types
from gspn_dit.errors import run_cli
from gspn_dit.training.loop import train

TINY: dict[str, Any] = {
    "output_dir": "run",
    "model": {"name": "GSPN-N/4", "hidden_size": 16, "depth": 2},
    "sampling": {"steps": 1, "per_class": 1, "max_classes": 1},
    "training": {"max_steps": 1, "batch_size": 2, "validation_images": 2, "trackers": [], "fd_samples": 16},
}
"""A run of a second, which each example spoils here and there."""
TOO_LONG = {"training.compile", "training.max_steps", "model.depth"}
"""Keys that can make a run long: their values are kept small."""

integers = st.sampled_from([-(2**63), -7, -1, 0, 1, 2, 3, 4, 8, 2**31, 2**53 + 1, 2**63 - 1, 2**64, 10**40])
floats = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1e-320, 0.5, 1.0, 1e308, float("inf"), float("nan")]))
WORDS = (
    "",
    " ",
    "no",
    "~",
    "null",
    "auto",
    "GSPN-S/2",
    "DiT-N/4",
    "a/b",
    "é",
    "日本",
    "\u202e",
    "\U0001f600",
    "\ud800",
)
TRAPS = ("$HOME", "~nobody", "a\0b", "{{ x }}", "1e5", "007", "1:30", ".inf", "<<", "!!int x")
words = st.one_of(st.text(max_size=12), st.sampled_from(WORDS + TRAPS))
odd = st.sampled_from([datetime.date(2024, 5, 1), b"a", {"a"}, {}, [], [[]], {1: 2}, {"a": {"b": 1}}])
anything = st.one_of(integers, floats, words, st.booleans(), st.none(), odd, st.lists(words | floats, max_size=3))


def right(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type, of which some are out of range."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) in (list, tuple):
        return st.lists(right(get_args(kind)[0]), max_size=3)
    simple = {
        int: st.integers(1, 4) | st.integers(-2, 9) | integers,
        float: st.floats(0, 1) | st.floats(0, 1) | floats,
        str: words,
        bool: st.booleans(),
    }
    return simple.get(kind, st.none())


@st.composite
def trees(draw: st.DrawFn) -> dict[Any, Any]:
    """The tiny config with a few keys of another value, mostly of the right type, and now and then a strange key."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key in draw(st.lists(st.sampled_from(sorted(_types())), max_size=4)):
        section, _, name = key.rpartition(".")
        fitting = st.one_of(*(right(kind) for kind in _types()[key]))
        value = draw(anything if draw(st.integers(0, 7)) == 0 else fitting)
        if key in TOO_LONG and (value is True or (isinstance(value, int) and value > 3)):
            continue
        if isinstance(value, str) and (".." in value or value.startswith("/")):
            continue
        (tree.setdefault(section, {}) if section else tree)[name] = value
    for key in draw(st.lists(words | st.sampled_from(["training", "model", "output_dir"]), max_size=1)):
        if draw(st.integers(0, 5)) == 0:
            tree[key] = draw(anything)
    return tree


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """The bytes of a file: YAML of a tree, or something else, or YAML with a flaw."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=40))
    if kind == 1:
        return draw(st.text("{}[]&*!:|>-?#'\"%@`~$ \n\tab01.\0\ufeff", max_size=40)).encode()
    content = yaml.dump(draw(trees()), allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == 2:
        place = draw(st.integers(0, len(content)))
        return content[:place] + draw(st.binary(max_size=3)) + content[place:]
    return content


def answer(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str], run: bool) -> str:
    """Start training with a file and return "run" or the line that it answers with; anything else is an error."""
    (folder / "some.yaml").write_bytes(content)
    AcceleratorState._reset_state(reset_partial_state=True)

    def main() -> None:
        arguments = parse_train_arguments(["--config", "some.yaml", "--overwrite"])
        if run:
            train(TrainArguments(arguments.config, None, True))

    capsys.readouterr()
    try:
        run_cli(main)
    except SystemExit as end:
        assert end.code == 2
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if ": error: " in line]
        assert len(lines) == 1
        return lines[0]
    return "run"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@given(content=files())
@settings(max_examples=25)
def test_reading(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(content, tmp_path, capsys, run=False)


@pytest.mark.slow
@given(content=files())
@settings(max_examples=int(os.environ.get("RANDOM_CONFIGS", "40")), phases=[Phase.generate])
def test_reading_and_running(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(content, tmp_path, capsys, run=True)

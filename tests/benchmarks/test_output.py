"""What a benchmark found is printed, and written where a file is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.output import publish


def test_a_result_is_printed_and_written_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "result.json"
    publish({"a": [1.5, None]}, file)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a": [1.5, None]} and file.read_text(encoding="utf-8") == printed
    publish([1], None)
    assert capsys.readouterr().out == "[\n  1\n]\n"
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_of_a_long_result_some_keys_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"a": 1, "cells": list(range(99))}
    publish(result, tmp_path / "result.json", ("a", "b"))
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == result

"""The cost of whole models: every contender at tiny sizes, at equal parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cost
from benchmarks.block_tables import cost_table
from benchmarks.contenders import CONTENDERS, TOLERANCE
from gspn_dit.errors import UserError


def test_every_contender_is_measured_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some" / "cost.json"
    cost.main(["--size", "N", "--sides", "4", "2", "--repeats", "1", "--out", str(file)])
    report = json.loads(file.read_text())
    cells = report["cells"]
    assert [(cell["tokens"], cell["variant"]) for cell in cells] == [(n, name) for n in (4, 16) for name in CONTENDERS]
    target = report["settings"]["parameters"]
    for cell in cells:
        assert 0 < cell["forward"]["best_ms"] < cell["forward_backward"]["best_ms"]
        assert abs(cell["parameters"] / target - 1) <= TOLERANCE
    assert set(report["times_faster_than_attention"]["16"]) == set(report["exponents"]) == set(CONTENDERS)
    assert report["times_faster_than_attention"]["4"]["attention"] == 1
    assert "| attention | 1.00× | 1.00× |" in cost_table(report)
    assert json.loads(capsys.readouterr().out)["megabytes"] == report["megabytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sides", "4", "0"], "--sides is 4 0, but each must be at least 1"),
        (["--contenders", "conv"], "--contenders lacks attention, which the others are measured by; add it"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cost.main(words)

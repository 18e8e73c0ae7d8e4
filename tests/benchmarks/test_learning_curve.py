"""A run's accuracy by steps and minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.learning_curve import curve_table, validated
from gspn_dit.errors import UserError


def write(run: Path, rows: list[dict[str, float]]) -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_validations_are_in_order_and_the_last_of_a_resumed_step_counts(tmp_path: Path) -> None:
    scores = [(100, 0.5), (200, 0.6), (100, 0.55)]
    rows = [{"step": step, "val_top1": top1, "val_loss": 1.0, "val_top5": 1.0} for step, top1 in scores]
    found = validated(write(tmp_path / "run", [{"step": 50, "loss": 2.0}, *rows]))
    assert found == [
        {"step": 100, "val_top1": 0.55, "val_loss": 1.0},
        {"step": 200, "val_top1": 0.6, "val_loss": 1.0},
    ]


def test_what_is_no_run_of_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        validated(tmp_path)
    with pytest.raises(UserError, match="no validation with a top-1"):
        validated(write(tmp_path / "run", [{"step": 1, "val_loss": 2.0}]))


def test_a_table_has_ten_rows_and_the_last(tmp_path: Path) -> None:
    points = [{"step": n, "processor_minutes": n / 10, "val_top1": n / 100, "val_loss": 0.5} for n in range(1, 26)]
    facts = {"model": "gspn_nano", "batch_size": 64, "processor_milliseconds_per_step": 99.6, "commit": "abc"}
    machine = {"processor": "a processor", "cores": 2, "kernels": "compiled kernels (AVX2)"}
    text = curve_table({**facts, "curve": points, "machine": machine, "software": {"torch": "1", "commit": "abc"}})
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 9 and rows[0].startswith("| 1 | 0.1 | 1.00 |") and rows[-1].startswith("| 25 | 2.5 | 25.00 |")
    assert "gspn_nano, one seed, averaged weights; 100 ms a step of 64 images" in text

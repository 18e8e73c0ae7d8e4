"""The tables of text-to-image: what stands in them for a result whose figures are known."""

from __future__ import annotations

from typing import Any

from benchmarks.text_quality import SCORES, summary
from benchmarks.text_tables import text_quality_table, text_to_image_table
from benchmarks.text_to_image import best_of_few

MACHINE = {"processor": "a chip", "cores": 2, "kernels": "kernels (AVX2)"}
SOFTWARE = {"torch": "2.0", "commit": "abc"}


def cell(budget: str, variant: str, seed: int, fd: float, share: float) -> dict[str, Any]:
    scores = {score: fd if score.startswith("fd_") else share for score in SCORES}
    facts = {"steps": 1234, "commit": "1234567", "processor_seconds": 60.0, "val_loss": fd / 100}
    return {"budget": budget, "variant": variant, "seed": seed, **facts, **scores}


def result(attention_steps_too: float = 20.0) -> dict[str, Any]:
    """Of scans FD is half of attention's and every share larger by 0.1; `attention_steps_too` at equal steps."""
    budgets = {"equal time": 20.0, "equal steps": attention_steps_too}
    cells = [
        cell(budget, variant, seed, value * seed, share)
        for budget, fd in budgets.items()
        for seed in (1, 2)
        for variant, value, share in (("gspn", 10.0, 0.4), ("attention", fd, 0.3))
    ]
    rates = {mixer: {"losses": {"0.003": 1, "0.006": 2}, "best": 0.003, "at_an_end": mixer == "gspn"}
             for mixer in ("gspn", "attention")}  # fmt: skip
    runs = {who: {"steps": 400, **{f"fd_{name}": fd for name in ("train", "pairs", "validation")}}
            for who, fd in (("student", 21.0), ("two steps", 50.0))}  # fmt: skip
    return {
        "setting": {"seeds": [1, 2], "seconds": 60, "search_steps": 100, "sampler_steps": 10, "guidance_scale": 2.0},
        "images": {"train": 50, "pairs": 40, "validation": 20},
        "real": {name: {"retrieval": 0.9, "retrieval10": 1.0} for name in ("train", "pairs", "validation")},
        "rates": rates,
        "processor_milliseconds_per_step": {"gspn": 200.0, "attention": 210.0},
        "cells": cells,
        "budgets": {name: summary([row for row in cells if row["budget"] == name]) for name in budgets},
        "distillation": {
            "teacher": cell("equal time", "attention", 1, 20.0, 0.3),
            "processor_seconds": 20.0,
            "runs": runs,
            "fd_ratios": {who: {"train": run["fd_train"] / 20} for who, run in runs.items()},
            "targets": {"FD ÷ teacher": [1.05, 1.10], "non-finite steps": [3, 0]},
        },
        "machine": MACHINE,
        "software": SOFTWARE,
    }


def test_scores_of_both_mixers_stand_beside_their_ratio_or_difference() -> None:
    text = text_quality_table(result())
    assert "| seen captions, FD | 15.0 ± 64 | 30.0 ± 127 | 0.500 [0.500, 0.500] |" in text
    assert "| held-out pairs, R@10 (chance 0.250, real 1.000) | 0.400" in text
    assert "| +0.100 [+0.100, +0.100] |" in text
    assert "Of a planned 60.0 s of a processor a run: 1,234 steps in 60.0 s at 0.003 with gspn, at an end of" in text
    assert "those tried and 1,234 steps in 60.0 s at 0.003 with attention, the best of" in text
    assert text.count("| seen captions, FD |") == 1 and "| equal time and equal steps |" in text
    assert "Trained at 1234567. a chip, 2 cores" in text


def test_budgets_that_differ_have_tables_of_their_own() -> None:
    text = text_quality_table(result(attention_steps_too=10.0))
    assert "| equal time |" in text and "| equal steps |" in text
    assert "| 15.0 ± 64 | 15.0 ± 64 | 1.000 [1.000, 1.000] |" in text


def test_a_student_stands_between_its_teacher_and_its_controls() -> None:
    text = text_quality_table(result())
    assert "| distilled scans | 400 | 21.0 | 21.0 | 21.0 | 1.050 |" in text
    assert "| control: the same, after two steps | 400 | 50.0 | 50.0 | 50.0 | 2.500 |" in text
    assert (
        "| FD ÷ teacher | 1.05 | 1.10 | yes |" in text and "| non-finite steps, in float32 | 3.00 | 0.00 | no |" in text
    )
    assert "control" not in text_quality_table({**result(), "distillation": None})


def test_times_of_layers() -> None:
    def entry(mixer: str, side: int, milliseconds: float, **more: Any) -> dict[str, Any]:
        facts = {"shape": [side, side, 640], "mixer": mixer, "best_ms": milliseconds, "extrapolated": False}
        return {**facts, "extra_bytes": 5_000_000, "load_average": 1.0 + side, **more}

    far = {"extrapolated": True, "extra_bytes": None, "load_average": 2.0}
    entries = [entry("attention", 2, 80.4), entry("gspn", 2, 40.2)]
    entries += [entry("gspn", 4, 1500.0), entry("attention", 4, 7.2e6, **far)]
    whole = {"value": 95.0, "published_whole_image_on_an_A100": 84}
    exponents = {"640": {"attention": 1.948, "gspn": 1.02}}
    facts = {"exponents": exponents, "ratio": whole, "device": MACHINE, "software": SOFTWARE}
    text = text_to_image_table({"entries": entries, **facts})
    assert "| 640 | 2×2 | 80 ms | 40 ms | 2.00× | 5 MB | 5 MB |" in text
    assert "| 640 | 4×4 | 2.0 h (extrapolated) | 1.50 s | 4,800× |  | 5 MB |" in text
    assert "to the power of 1.95 with attention, 1.02 with scans at width 640." in text
    assert "the ratio is then 95×. The paper's own figure gives 84×" in text and "Load average 2.0 to 5.0." in text


def test_large_grids_are_run_again_where_there_is_time() -> None:
    runs: list[int] = []
    assert best_of_few(lambda: runs.append(0), 1.0, seconds=10) == {"best_ms": 0.0, "runs": 4}
    assert best_of_few(lambda: runs.append(0), 6.0, seconds=10) == {"best_ms": 6000.0, "runs": 1}
    assert len(runs) == 3

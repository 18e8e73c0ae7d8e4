"""The study of classifiers: what its cells differ in, and figures from cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.classification import DATA_SETS, MODELS, arguments, classification_table, main, points, summary
from gspn_dit.config import Config, parse_train_arguments
from gspn_dit.errors import UserError


def config(model: str, search: bool = False, data: str = "fashion") -> Config:
    return parse_train_arguments(arguments(data, "place", model, 2e-3, 5, 40, search)).config


def test_models_differ_in_nothing_else() -> None:
    whole = [config(model).to_dict() for model in MODELS]
    for found in whole:
        del found["model"]["name"], found["model"]["backbone_options"]
    assert all(found == whole[0] for found in whole)
    assert whole[0]["seed"] == 5 and whole[0]["training"]["max_steps"] == 40


@pytest.mark.parametrize("data", DATA_SETS)
def test_a_search_sees_nothing_of_what_models_are_judged_by(data: str) -> None:
    searched, judged = config("gspn", True, data), config("gspn", False, data)
    assert judged.data.path == "place"
    assert searched.data.path == DATA_SETS[data]["training_split"].format(root="place") != "place"
    assert searched.data.validation_fraction > 0


def test_models_have_equal_parameters() -> None:
    """About 0.6 million each, to 2%."""
    import torch

    from gspn_dit.models.classifiers import create_classifier

    pytest.importorskip("timm")
    with torch.device("meta"):
        models = [create_classifier(model["name"], 10, 1, model["options"]) for model in MODELS.values()]
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert max(counts) / min(counts) < 1.02


def cell(model: str, seed: int, top1: float) -> dict[str, Any]:
    return {"model": model, "seed": seed, "val_top1": top1, "val_top5": 1.0, "val_loss": 0.5}


def test_differences_are_of_pairs() -> None:
    """Seeds differ more than models: -0.02 and -0.04 in pairs, with Student's interval of two."""
    cells = [cell("gspn", 0, 0.90), cell("vit", 0, 0.88), cell("gspn", 1, 0.80), cell("vit", 1, 0.76)]
    found = summary(cells)
    assert found["gspn"]["top1_minus_gspn"] == {"mean": 0, "low": 0, "high": 0}
    difference = found["vit"]["top1_minus_gspn"]
    assert difference["mean"] == pytest.approx(-0.03)
    assert difference["high"] + 0.03 == pytest.approx(12.7062 * 0.02 / math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert found["vit"]["val_top1"]["mean"] == pytest.approx(0.82)


def test_the_table_says_what_the_study_found() -> None:
    cells = [{**cell(model, seed, top), "steps": 300, "commit": "1234567"} for model, seed, top in (
        ("gspn", 0, 0.90), ("vit", 0, 0.88), ("gspn", 1, 0.80), ("vit", 1, 0.76),
    )]  # fmt: skip
    facts = {"name": "net", "parameters": 614_234, "multiply_adds": 20_710_656}
    text = classification_table(
        {
            **{"seconds": 60, "search_seconds": 12, "cells": cells, "summary": summary(cells)},
            "models": {"gspn": facts, "vit": facts},
            "cpu_milliseconds_per_step": {"gspn": 131.2, "vit": 215.0},
            "rates": {"gspn": {"best": 0.004, "at_an_end": False}, "vit": {"best": 0.001, "at_an_end": True}},
            "machine": {"processor": "a chip", "cores": 2, "kernels": "kernels (AVX2)"},
            "software": {"torch": "2.0", "commit": "abc"},
        }
    )
    own, other = text.splitlines()[2:4]
    assert own.startswith("| net | 614,234 | 20.7M | 131 ms | 300 | 0.004 | 85.0 ± 64 |  | 0.500 ± ")
    assert "| 0.001 (at an end) | 82.0 ± 76 | -3.00 [-15.71, +9.71] |" in other
    assert "60 seconds of one thread for each model, 2 paired seeds, rates searched in 12 seconds each." in text
    assert points({"mean": 0.01, "low": math.nan, "high": math.nan}) == "+1.00"


def test_data_that_are_not_there_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["classification", "--data", "emoji", "--root", str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"--root .*none is not there; gspn_dit.prepare.emoji makes it"):
        main()

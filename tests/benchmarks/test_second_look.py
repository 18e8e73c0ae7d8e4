"""Samples of a study's cells by further feature extractors: which cells, which distance, paired ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import scoring, second_look
from benchmarks.contest import Cell
from benchmarks.quality_tables import second_look_table
from benchmarks.second_look import compared, distance, scored_cells
from fid.features import load_feature_net
from gspn_dit.errors import UserError

DIGITS = scoring.DATA_SETS["digits"]
NAMES = ("attention", "gspn-normed")


def row(variant: str, seed: int, *roles: str, **more: Any) -> dict[str, Any]:
    facts = {"variant": variant, "options": {}, "rate": 0.01, "steps": 7, "seed": seed, "diverged": False}
    return {**facts, "for": list(roles), **more}


def study(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"protocol": {"size": "N", "budgets": [1, 4, 16]}, "data": {"digits": {"cells": list(cells)}}}


def test_looks_at_the_largest_budget_of_all() -> None:
    both = [row(name, seed, role) for name in NAMES for seed in (0, 1) for role in ("1×, equal time", "4×, equal time")]
    found = scored_cells(study(*both, row("attention", 0, "16×, equal time")), DIGITS)
    assert list(found) == ["4×, equal time"]
    assert [(cell.contender, cell.seed) for cell in found["4×, equal time"]] == [(n, s) for n in NAMES for s in (0, 1)]


def test_trainings_that_diverged_have_no_samples() -> None:
    cells = [row(name, seed, "1×, equal time", diverged=seed == 1) for name in NAMES for seed in (0, 1)]
    assert {cell.seed for cell in scored_cells(study(*cells), DIGITS)["1×, equal time"]} == {0}


def test_few_samples_have_a_kernel_distance() -> None:
    net = load_feature_net("digits")
    rows = torch.randn(net.feature_dim, net.feature_dim, generator=torch.Generator().manual_seed(0))
    assert distance(net, rows, torch.cat([rows, rows]))[0] == "KID-digits"
    assert distance(net, torch.cat([rows, rows]), torch.cat([rows, rows])) == ("FD-digits", pytest.approx(0, abs=1e-3))


def test_ratios_are_paired_by_seed() -> None:
    values = {"attention": [2.0, 4.0], "gspn-normed": [1.0, 2.0]}
    rows = [
        {"kind": "1×, equal time", "variant": name, "seed": seed, "score": "FD-x", "value": value}
        for name, both in values.items()
        for seed, value in enumerate(both)
    ]
    (entry,) = compared(rows)
    assert (entry["ours"], entry["rival"]) == ("gspn-normed", "attention")
    assert entry["ratio"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5, "pairs": 2})
    (entry,) = compared([{**one, "value": one["value"] - 1.0} for one in rows])
    assert entry["ratio"] is None


def test_command(tmp_path: Path) -> None:
    real, generator = DIGITS.load("train").pixels(range(300)), np.random.default_rng(0)
    noise = {"attention": 80, "gspn-normed": 20}
    cells = [row(name, seed, "1×, equal time") for name in NAMES for seed in (0, 1)]
    for one in cells:
        images = real + generator.integers(0, noise[one["variant"]], real.shape)
        directory = Cell(DIGITS, one["variant"], (), 0.01, 7, one["seed"]).directory(tmp_path, "N")
        directory.mkdir(parents=True)
        scoring.save_samples(directory / scoring.SAMPLES, images.clip(0, 255).astype(np.uint8))
    (tmp_path / "study.json").write_text(json.dumps(study(*cells)), encoding="utf-8")
    words = ["--study", str(tmp_path / "study.json"), "--work", str(tmp_path), "--nets", "digits"]
    second_look.main([*words, "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    digits = found["data"]["digits"]
    assert digits["comparisons"][0]["ratio"]["high"] < 1 and len(digits["cells"]) == 4
    (net,) = digits["nets"]
    assert net == DIGITS.net() and (net["score"], net["architecture"]) == ("digits", "conv")
    assert digits["tokens"] == 16
    text = second_look_table(found)
    assert "| 1×, equal time | gspn-normed | attention | 0." in text and " and 5,000 real images." in text

    second_look.main([*words, "--reference", "300", "--out", str(tmp_path / "few.json")])
    few = json.loads((tmp_path / "few.json").read_text(encoding="utf-8"))
    assert " and 300 real images." in second_look_table(few)
    assert few["data"]["digits"]["cells"][0]["value"] != digits["cells"][0]["value"]
    with pytest.raises(UserError, match="--reference is 1, but must be at least 2"):
        second_look.main([*words, "--reference", "1"])

    (tmp_path / "other.json").write_text(json.dumps({"data": {"larger": {**digits, "tokens": 64}}}), encoding="utf-8")
    both = ["--beside", str(tmp_path / "other.json"), "--out", str(tmp_path / "both.json")]
    second_look.main([*words, *both])
    joined = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    own = {**joined["data"]["digits"], "machine": digits["machine"]}  # whose load differs from one look to the next
    assert list(joined["data"]) == ["digits", "larger"] and own == digits
    assert "\n64 tokens, the same 1,000 samples" in second_look_table(joined)
    for content in ("[]", "{}", '{"data": []}', '{"data": {"digits": {}}}'):
        (tmp_path / "other.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"other\.json is not what benchmarks\.second_look found; give its --out"):
            second_look.main([*words, *both])

    (directory / scoring.SAMPLES).unlink()
    with pytest.raises(UserError, match=r"samples\.npz is missing; --work must be the directory"):
        second_look.main(words)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{}", "is no study of benchmarks.quality; give its --out"),
        ("[1", "cannot be read"),
        (json.dumps({"data": {"fashion": {}}, "protocol": {}}), "has no digits, but fashion"),
        (json.dumps(study()), "has no budget on digits that all contenders were scored at"),
    ],
)
def test_what_is_no_study_is_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        second_look.main(["--study", str(tmp_path / "study.json"), "--nets", "digits"])

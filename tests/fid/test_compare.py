"""Reports side by side: the table, its intervals, and what is not mixed silently."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fid
from fid.cli import main
from fid.compare import compare, markdown_table
from fid.images import LabelledImages, Reference
from gspn_dit.errors import UserError


@pytest.fixture(scope="module")
def scored(net: fid.FeatureNet, digits: Reference) -> dict[str, Any]:
    images = LabelledImages(digits.images.pixels[:100], "a", digits.images.labels[:100], None, {"guidance_scale": 1.5})
    return fid.score(images, digits, net)


@pytest.fixture
def store(tmp_path: Path, scored: dict[str, Any]) -> Callable[..., Path]:
    """Write the report with one value changed at a dotted place."""

    def write(name: str, place: str = "", value: Any = None) -> Path:
        report = copy.deepcopy(scored)
        *parents, last = place.split(".")
        if place:
            holder = report
            for key in parents:
                holder = holder[key]
            holder[last] = value
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        return tmp_path / name

    return write


def test_one_table_with_intervals(
    store: Callable[..., Path], tmp_path: Path, scored: dict[str, Any], capsys: Any
) -> None:
    first, second = store("a"), store("b", "scores.FD-digits", 12.345)
    out = tmp_path / "deep" / "table.md"
    main(["compare", str(first), str(second / "report.json"), "--out", str(out)])
    text = out.read_text()
    assert capsys.readouterr().out == text and [entry.name for entry in out.parent.iterdir()] == ["table.md"]
    interval = scored["intervals"]["FD-digits"]
    shown = f"[{interval['low']:.4g}, {interval['high']:.4g}]"
    assert f"| FD-digits | {scored['scores']['FD-digits']:.4g} {shown} | 12.35 {shown} |" in text
    assert "| n | 100 | 100 |" in text and "| guidance_scale | 1.5 | 1.5 |" in text
    assert "jackknife for Fréchet distances" in text


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("settings.protocol.name", "other", "the protocol (features / other)"),
        ("settings.protocol.neighbourhood", 5, "the protocol's neighbourhood 3 / 5"),
        ("settings.feature_net.sha256", "ab" * 32, "the feature extractor ("),
        ("settings.reference.sha256", "ab" * 32, "the reference ("),
        ("settings.reference.statistics", "ab" * 32, "the reference's statistics (None / abababababab)"),
        ("settings.samples.n", 99, "the number of samples (100 / 99)"),
        ("settings.other_nets", {"FD-DINOv2": {}}, "the other nets ("),
    ],
)
def test_unlike_reports_are_mixed_on_request_alone(
    store: Callable[..., Path], place: str, value: Any, words: str
) -> None:
    first, second, third = store("a"), store("b", place, value), store("c")
    with pytest.raises(UserError) as caught:
        compare([first, third, second])
    assert f"{first} and {second} differ in {words}" in str(caught.value) and "--allow-mixed" in str(caught.value)
    rows = compare([first, third, second], allow_mixed=True)
    assert rows[0] == ("score", str(first), str(third), f"{second}*")
    assert "does not compare" in markdown_table(rows) and "does not compare" not in markdown_table(
        compare([first, third])
    )


def test_other_samples_and_batches_compare(store: Callable[..., Path]) -> None:
    first = store("a")
    for name, place in (("b", "settings.samples.sha256"), ("c", "settings.batch_size"), ("d", "settings.generation")):
        assert len(compare([first, store(name, place)])[0]) == 3


def test_what_is_no_report_is_refused(store: Callable[..., Path], tmp_path: Path) -> None:
    good, old = store("a"), store("old", "format_version", 1)
    (tmp_path / "text").write_text("words")
    (tmp_path / "list").write_text("[]")
    for other, message in (
        (tmp_path / "none", "no report at .*none"),
        (tmp_path / "text", "cannot be read"),
        (tmp_path / "list", "is no report that python -m fid wrote"),
        (store("half", "settings", {}), "is no report that python -m fid wrote: it does not say how"),
        (old, "has format_version 1, this version reads 2; evaluate the samples again"),
    ):
        with pytest.raises(UserError, match=message):
            compare([good, other])
    with pytest.raises(UserError, match="needs at least two reports"):
        compare([good])

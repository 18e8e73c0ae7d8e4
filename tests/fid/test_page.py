"""The HTML report in a browser: every image loads, the tables are there, and nothing comes from the network."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fid
from fid.extraction import extract_all
from fid.images import LabelledImages, Reference, read_reference
from fid.page import interval_methods, page, score_rows
from fid.report import TILE_SIZE, write_report
from tests.browser import chromium
from tests.fid.conftest import noise_images, tiny_net
from tests.fid.test_protocols import SMALL_ADM, adm_reference, drawn_images

PROBE = """
<script>
addEventListener("load", () => {
  const text = (cell) => cell.textContent;
  const found = {
    widths: [...document.images].map((image) => image.complete ? image.naturalWidth : 0),
    sources: [...document.querySelectorAll("[src], [href]")].map((e) => (e.src || e.href).slice(0, 22)),
    tables: [...document.querySelectorAll("table")].map(
      (table) => [...table.rows].map((row) => [...row.cells].map(text))),
    headings: [...document.querySelectorAll("h1, h2")].map(text),
    folded: [...document.querySelectorAll("details:not([open]) > summary")].map(text),
    captions: [...document.querySelectorAll("figcaption")].map(text),
    fetched: performance.getEntriesByType("resource").map((e) => e.name).filter((name) => !name.startsWith("data:")),
  };
  document.body.innerHTML = "";
  document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(found)}));
});
</script>
"""


def number_text(value: float) -> str:
    """Three digits that count, none of them lost before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def opened(path: Path, profile: Path) -> dict[str, Any]:
    """What the browser, offline, makes of a page."""
    copy = path.with_name("probed.html")
    copy.write_text(path.read_text(encoding="utf-8") + PROBE)
    done = subprocess.run(
        [
            *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--virtual-time-budget=10000"),
            *("--dump-dom", copy.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_report_opens_whole_and_alone(tmp_path: Path) -> None:
    path, _ = adm_reference(tmp_path)
    real = read_reference(path, 8)
    held_out = LabelledImages(noise_images(60, 7, low=40), "held out")
    drawn = dataclasses.replace(drawn_images(), class_names=tuple("<abcd"))
    reference = dataclasses.replace(real, held_out=held_out)
    report = fid.score(drawn, reference, tiny_net(""), protocol=SMALL_ADM)
    write_report(report, drawn, tmp_path / "report", reference=real.images)
    found = opened(tmp_path / "report" / "index.html", tmp_path / "profile")
    assert len(found["widths"]) == 1 + 5 * 4 and min(found["widths"]) > 0
    assert {source[:15] for source in found["sources"]} == {"data:image/png;"} and found["fetched"] == []
    assert found["headings"] == [
        "FID report",
        "Scores",
        "Samples against real images",
        "Published figures",
        "Nearest real images in feature space",
        "Notes",
    ]
    assert found["folded"] == ["Settings"]
    scores, _, published, settings = found["tables"]
    by_name = {row[0]: row[1:] for row in scores}
    for name in ("FID", "sFID", "precision", "recall"):
        interval = report["intervals"][name]
        expected = [number_text(value) for value in (report["scores"][name], interval["low"], interval["high"])]
        assert by_name[name][0] == "{} [{}, {}]".format(*expected)
        assert by_name[name][1] == number_text(report["held_out"][name])
    assert all("[" in by_name[name][0] for name in ("IS", "KID"))
    assert [row[0] for row in published[1:3]] == ["these samples", "real images"] and len(published) == 7
    assert ["protocol.reference_file", "VIRTUAL_imagenet256_labeled.npz"] in settings
    assert ["generation.guidance_scale", "1.0"] in settings
    assert any(caption.startswith("sample ") and caption.endswith(": <") for caption in found["captions"])


def test_a_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    """The same without a browser: every source is inside, whatever the samples' names say."""
    name = '"><img src="http://example.org/x.png">'
    images = LabelledImages(noise_images(40, 0), name, np.arange(40) % 2, (name, "b"), {name: name})
    report = fid.score(images, Reference(dataclasses.replace(images, source="b")), tiny_net())
    text = page(report, "QUJD", [[(name, "QUJD")]])
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:image/png;base64,QUJD"}
    assert "<img src=" not in text and "<script" not in text and "@import" not in text and "url(" not in text


def test_large_images_are_shown_smaller_and_neighbours_are_the_nearest(tmp_path: Path) -> None:
    pixels = noise_images(30, 0, 256)
    drawn = LabelledImages(pixels[:20], "drawn", np.arange(20) % 2)
    real = LabelledImages(pixels[10:], "real")
    report = fid.score(drawn, Reference(real), tiny_net())
    assert [(entry["sample"], entry["label"]) for entry in report["neighbours"]] == [(0, 0), (1, 1)]
    features = extract_all(LabelledImages(pixels, ""), [tiny_net()])[0][0].features
    distances = (features[0] - features[10:]).norm(dim=1)
    assert report["neighbours"][0]["nearest"] == distances.argsort()[:3].tolist()
    assert report["neighbours"][0]["distance"] == pytest.approx(distances.sort().values[:3].tolist(), rel=1e-4)
    write_report(report, drawn, tmp_path / "report", reference=real)
    shown = re.findall(r"<figcaption>distance (.*?)</figcaption>", (tmp_path / "report/index.html").read_text())
    assert shown[:3] == [f"{distance:#.3g}" for distance in report["neighbours"][0]["distance"]]
    with Image.open(tmp_path / "report" / "grid.png") as grid:
        assert grid.height < 2 * (TILE_SIZE + 10) and grid.width > 10 * TILE_SIZE


def test_a_score_has_its_interval_beside_it_in_three_digits() -> None:
    report = {
        "scores": {"fd": 0.2604, "is": {"mean": 9.8, "std": 0.129}, "agreement": 1.0, "n": 1000},
        "held_out": {"fd": 1234.5, "is": {"mean": 9.7955, "std": 0.1}, "agreement": None, "n": 360},
        "intervals": {
            "fd": {"low": 0.22111, "high": 0.31999, "method": "a jackknife"},
            "is": {"low": 9.7, "high": 9.9, "method": "a jackknife"},
        },
        "titles": {"fd": "FD"},
        "comparison": None,
    }
    assert score_rows(report) == [
        ("score", "samples", "real, held out"),
        ("FD", "0.260 [0.221, 0.320]", "1,234"),
        ("is", "9.80 [9.70, 9.90]", "9.80 ± 0.1"),
        ("agreement", "1.00", "–"),
        ("images", "1,000", "360"),
    ]
    assert interval_methods(report) == "In brackets: 95 % intervals (FD, is: a jackknife)."
    assert interval_methods({**report, "intervals": {}}) == ""

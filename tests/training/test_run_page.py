"""The page of a run: what it draws, that it holds everything it needs, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gspn_dit.errors import UserError
from gspn_dit.training.charts import Axis, chart, read_metrics, thin, tick_texts, ticks
from gspn_dit.training.run_page import MAX_GRIDS, main, render, write_run_page
from tests.browser import chromium
from tests.training.conftest import run_training, tiny_config


def write_metrics(run: Path, *lines: dict[str, object]) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def path_of(page: str, name: str) -> list[tuple[float, float]]:
    """Pixels of the curve with this name."""
    (path,) = re.findall(rf'<path d="M([^"]*)"[^>]*data-name="{re.escape(name)}"', page)
    return [tuple(map(float, point.split(","))) for point in path.split(" L")]


def test_curve_is_drawn_where_its_values_are(tmp_path: Path) -> None:
    """Steps 0 to 100 fill the width from 58 to 430, the values 1 to 3 the height from 224 up to 24."""
    write_metrics(tmp_path, *({"step": step, "loss": loss} for step, loss in ((0, 3.0), (50, 2.0), (100, 1.0))))
    assert path_of(render(tmp_path), "loss") == [(58.0, 24.0), (244.0, 124.0), (430.0, 224.0)]


def test_what_spans_much_is_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    write_metrics(tmp_path, *({"step": step, "grad_norm": 10.0**-step} for step in range(3)))
    heights = [y for _, y in path_of(render(tmp_path), "gradient norm")]
    assert heights == [24.0, 124.0, 224.0]


def labels_of(svg: str) -> list[str]:
    """The texts of a chart, the unit first if there is one, in the order in which they are drawn."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_learning_rate_is_drawn_from_zero_on_a_linear_axis(tmp_path: Path) -> None:
    """A warm-up over three decades: the values 1e-5, 5e-3 and 1e-2 lie 0.2, 100 and 200 pixels above zero at 224."""
    write_metrics(tmp_path, *({"step": n, "learning_rate": rate} for n, rate in enumerate((1e-5, 5e-3, 1e-2))))
    page = render(tmp_path)
    assert [y for _, y in path_of(page, "learning rate")] == [223.8, 124.0, 24.0]
    assert labels_of(page)[:6] == ["0.000", "0.002", "0.004", "0.006", "0.008", "0.010"]


def test_memory_and_arithmetic_have_units(tmp_path: Path) -> None:
    lines = ({"step": n, "peak_memory_bytes": 1.04e9 * n, "model_flops_per_second": 2.5e13 * n} for n in (1, 2))
    write_metrics(tmp_path, *lines)
    page = render(tmp_path)
    assert {"GB", "0.5", "2.0", "TFLOP/s"} <= set(labels_of(page))
    assert "<b>2.08 GB</b>" in page and "<b>50 TFLOP/s</b>" in page and "e+0" not in page


@pytest.mark.parametrize(
    "values", [[0.4251, 0.4259], [1e-6, 3e-6], [123_456, 987_654], [5e6, 4e8], [-3.25, 1234.5], [2e-9, 1.0], [7, 7]]
)
def test_labels_of_the_axis_fit_before_it_and_differ(values: list[float]) -> None:
    """52 pixels are left of the axis, and a digit is at most 7 wide."""
    labels = [text for text in labels_of(chart({"a": list(enumerate(values))}, "")) if text]
    assert max(map(len, labels)) * 7 <= 52
    of_values = labels[: labels.index("0.0") if "0.0" in labels else len(labels)]
    assert len(set(of_values)) == len(of_values)


@pytest.mark.parametrize("first", [0, 10, 950, 10_000, 10_400])
def test_the_title_of_the_steps_stands_before_their_first_label(first: int) -> None:
    drawn = chart({"a": [(first, 1.0), (first + 5000, 2.0)]})
    below = re.findall(r'<text x="([\d.]+)" y="242" text-anchor="(?:middle|end)">([^<]*)</text>', drawn)
    (*labels, (end, title)) = [(float(x), text) for x, text in below]
    assert title == "step" and 7 * len(title) <= end <= 52
    assert end + 6 <= labels[0][0] - 3.5 * len(labels[0][1])


def test_a_unit_takes_the_prefix_of_the_largest_value() -> None:
    assert [Axis("B", scaled=True).fit(value) for value in (12, 5e3, 2e12)] == [(1, "B"), (1e3, "kB"), (1e12, "TB")]
    assert Axis("images/s").fit(5e3) == (1, "images/s")


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0.424, 0.426], ["0.424", "0.426"]),
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([0.0, 2e-6], ["0", "2e-06"]),
        ([0.0, 20_000.0], ["0", "20,000"]),
        ([0.0], ["0"]),
    ],
)
def test_texts_of_ticks(values: list[float], texts: list[str]) -> None:
    assert tick_texts(values) == texts


def test_null_and_half_written_lines_are_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 1, "loss": None}, {"step": 2, "loss": 0.5, "comparable": False})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == {"loss": [(2, 0.5)]}


def test_long_curves_are_averaged_and_keep_their_length() -> None:
    curve = [(float(step), float(step)) for step in range(100_000)]
    thinned = thin(curve, 400)
    assert len(thinned) == 400 and thinned[0] == (124.5, 124.5) and thinned[-1] == (99874.5, 99874.5)


@pytest.mark.parametrize(
    "low, high, expected", [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.71, [0.2, 0.4, 0.6]), (5, 5, [5]), (-1, 1, None)]
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high)
    assert all(low <= tick <= high for tick in found) and 1 <= len(found) <= 11
    assert expected is None or found == pytest.approx(expected)


def test_grids_are_embedded_first_and_last_included_newest_first(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 1, "loss": 1.0})
    (tmp_path / "samples").mkdir()
    for step in range(1, 31):
        Image.new("L", (2, 2), step).save(tmp_path / "samples" / f"step-{step:08d}.png")
    shown = [int(step) for step in re.findall(r"<figcaption>step (\d+)</figcaption>", render(tmp_path))]
    assert len(shown) == MAX_GRIDS and shown[0] == 30 and shown[-1] == 1 and shown == sorted(shown, reverse=True)


def test_large_grids_are_embedded_smaller(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 1, "loss": 1.0})
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "samples" / "step-00000001.png")
    (content,) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', render(tmp_path))
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (1200, 600)


def test_page_needs_nothing_else_and_escapes_what_it_quotes(tmp_path: Path) -> None:
    run = tmp_path / "a<b>"
    write_metrics(run, {"step": 1, "loss": 1.0, "quick<fd>": 3.0})
    (run / "config.yaml").write_text("data:\n  path: </pre><script>alert(1)</script>\n")
    page = render(run)
    assert "<script" not in page and "a&lt;b&gt;" in page and "quick&lt;fd&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_page_loads_itself_again_only_while_the_run_goes_on(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"step": 7, "loss": 1.0})
    assert 'http-equiv="refresh"' in render(tmp_path, 10, running=True)
    page = write_run_page(tmp_path, 10).read_text()
    assert 'http-equiv="refresh"' not in page and "step 7 of 10" in page
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_directory_without_metrics_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run_page", str(tmp_path)])
    with pytest.raises(UserError, match="is no run directory"):
        main()


def test_browser_shows_the_page_of_a_training(tmp_path: Path) -> None:
    """Training writes the page by itself; the browser's document and its picture show curves and samples."""
    browser, run = chromium(), tmp_path / "run"
    run_training(tiny_config(run, sample_every=2, validate_every=2))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/u"]
    address = (run / "index.html").as_uri()
    document = subprocess.run([browser, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    for words in ("Training loss", "Validation loss by time t", "Learning rate", "Gradient norm", "images/s"):
        assert words in document.stdout
    assert len(path_of(document.stdout, "loss")) == 4 and len(path_of(document.stdout, "t &lt; ¼ (nearly clean)")) == 2
    assert document.stdout.count('<img alt="samples at step') == 2 and "step 4 of 4" in document.stdout
    picture = tmp_path / "page.png"
    options = [f"--screenshot={picture}", "--window-size=1400,1000", "--hide-scrollbars"]
    subprocess.run([browser, *flags, *options, address], capture_output=True, timeout=120, check=True)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert (0x25, 0x63, 0xEB) in colours  # the first curve's

"""The playground in a browser: pictures form and can be taken away, errors can be read, users do not mix."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn_dit import GSPNPipeline
from gspn_dit.grid import class_grid
from tests.browser import chromium
from tests.tiny import write_run

pytest.importorskip("gradio", reason="needs Gradio (pip install 'gspn-dit[playground]')")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")

pytestmark = pytest.mark.slow
SECONDS = 120_000  # milliseconds: a busy machine loads Gradio slowly


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "mine")
    (run / "report").mkdir()
    (run / "index.html").write_text("<p>the page of the run</p>")
    (run / "report" / "index.html").write_text("<p>its report</p>")
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium(), args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(run_directory: Path, browser: Any) -> Iterator[str]:
    command = [sys.executable, "-m", "gspn_dit.playground", "--port", "0", "--device", "cpu", "--checkpoint"]
    with subprocess.Popen([*command, str(run_directory)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            (found,) = re.findall(r"open (http://\S+) in a browser", server.stdout.readline())
            yield found
            open_page(browser, found)  # for which the server does not wait
            server.terminate()
            assert server.wait(60) == 128 + signal.SIGTERM
        finally:
            server.kill()


def open_page(browser: Any, address: str) -> Any:
    page = browser.new_page(viewport={"width": 1300, "height": 1100})
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    return page


def fill(page: Any, **values: float) -> None:
    for label, value in values.items():
        write(page, label, str(value))


def write(page: Any, label: str, text: str) -> None:
    """Write into a field until it keeps the text: one that has just appeared may still take its first value."""
    field = page.get_by_label(label).locator("visible=true").first
    for _ in range(20):
        field.fill(text)
        field.press("Tab")
        page.wait_for_timeout(300)
        if field.input_value() == text:
            return
    raise AssertionError(f"{label} is {field.input_value()!r} after {text!r} was written 20 times")


def expected(run: Path, seed: int, **options: Any) -> np.ndarray:
    """The grid that the page's first settings ask for: six images of each class in thirty steps."""
    pipeline = GSPNPipeline.from_checkpoint(run)
    pipeline.set_progress_bar_config(disable=True)
    labels = [label for label in range(5) for _ in range(6)]
    images = pipeline(labels, 30, 1.5, seed=seed, output_type="np", **options).images
    return np.asarray(class_grid(images, labels, pipeline.class_names))


def shown(page: Any, number: int = 0) -> np.ndarray:
    """The picture of a source, when it is complete."""
    playwright.expect(page.locator("#state")).to_contain_text("30 images, seed", timeout=SECONDS)
    source = page.locator(f"#picture-{number} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def test_a_grid_appears_and_can_be_taken_away(browser: Any, address: str, run_directory: Path) -> None:
    page, asked, states = open_page(browser, address), [], []
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.expose_function("noted", lambda text: states.append(text))
    page.evaluate(
        "new MutationObserver(() => noted(document.querySelector('#state').innerText))"
        ".observe(document.querySelector('#state'), {subtree: true, childList: true, characterData: true})"
    )
    page.get_by_label("mine, no average").check()
    fill(page, Seed=7)
    page.click("#draw")
    assert np.array_equal(shown(page), expected(run_directory, 7))
    assert not np.array_equal(shown(page, 1), shown(page))
    assert any(state.strip().endswith("Waiting …") for state in states)
    assert [state for state in states if re.fullmatch(r"mine, EMA: step \d+ of 30", state.strip())]
    with page.expect_download() as grid:
        page.click("#grid")
    with page.expect_download() as settings:
        page.click("#settings")
    assert grid.value.suggested_filename == "grid.png"
    assert Image.open(grid.value.path()).size[0] > 2 * 300
    noted = json.loads(Path(settings.value.path()).read_text(encoding="utf-8"))
    assert noted["seed"] == 7 and [each["weights"] for each in noted["drawn_by"]] == ["ema", "model"]
    assert asked and all(url.startswith((address, f"blob:{address}")) for url in asked)
    page.close()


def test_an_error_can_be_read_and_the_page_goes_on(browser: Any, address: str, run_directory: Path) -> None:
    page = open_page(browser, address)
    page.get_by_text("Size", exact=True).click()
    write(page, "Height (0: as trained)", "9")
    page.click("#draw")
    message = page.get_by_text("height is 9 pixels, but must be a positive multiple of 2")
    playwright.expect(message).to_be_visible(timeout=SECONDS)
    playwright.expect(page.locator("#state")).to_contain_text("Nothing was drawn", timeout=SECONDS)
    write(page, "Height (0: as trained)", "8")
    page.click("#draw")
    assert np.array_equal(shown(page), expected(run_directory, 0, height=8))
    page.close()


def test_two_users_at_once_do_not_mix(browser: Any, address: str, run_directory: Path) -> None:
    pages = [open_page(browser, address) for _ in range(2)]
    for seed, page in enumerate(pages, start=1):
        fill(page, Seed=seed)
    for page in pages:
        page.click("#draw")
    for seed, page in enumerate(pages, start=1):
        assert np.array_equal(shown(page), expected(run_directory, seed))
        page.close()


def test_pages_of_the_run_open(browser: Any, address: str) -> None:
    page = open_page(browser, address)
    for title, words in (("mine: run", "the page of the run"), ("mine: report", "its report")):
        with page.expect_popup() as popup:
            page.get_by_role("link", name=title).click()
        playwright.expect(popup.value.get_by_text(words)).to_be_visible(timeout=SECONDS)
        popup.value.close()
    page.close()

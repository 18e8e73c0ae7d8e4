"""The scripts and the notebook of examples/ do what they say, with fewer steps."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def start(place: Path, name: str, *arguments: str) -> str:
    """Run a script in a process of its own, in `place`, and return what it prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert len(files) >= 4 and all(f"[{name}]({name})" in page for name in files)


def test_the_scan_alone_learns_to_look_along_rows_and_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "scan_alone.py"))
    assert names["main"](steps=150) < 0.02  # 0.16 without looking
    assert "step 149" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mixer_is_added(tmp_path: Path) -> None:
    sizes = {"model.name": "DiT-N/4", "model.mixer": "cross", "model.hidden_size": "16", "model.depth": "1"}
    short = {"training.max_steps": "2", "training.batch_size": "4", "training.validation_images": "4"}
    keys = {**sizes, **short, "training.trackers": "[]", "sampling.steps": "1", "sampling.per_class": "1"}
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    start(tmp_path, "add_a_mixer.py", "gspn_dit.train", *words, "--output_dir", "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    drawing = ("--checkpoint", "run", "--classes", "3", "--steps", "1", "--out", "grid.png")
    start(tmp_path, "add_a_mixer.py", "gspn_dit.sample", *drawing)
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_own_images_are_trained_on_and_drawn_wide(tmp_path: Path) -> None:
    for index in range(40):
        place = tmp_path / "photos" / ("dark" if index % 2 else "bright")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 9), (6 * index, 0, 80)).save(place / f"{index}.png")
    words = ["--images", "photos", "--out", "run", "--model", "GSPN-N/4", "--size", "8", "--steps", "2"]
    start(tmp_path, "own_images.py", *words)
    assert [Image.open(tmp_path / "run" / f"{name}.png").size for name in ("bright", "dark")] == [(16, 8)] * 2


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nbclient", "nbformat", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install -e '.[dev]')")
    import nbclient
    import nbformat

    for name, value in {"QUICKSTART_STEPS": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "FD-digits" in json.dumps(outputs[-1])


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    for cell in cells:
        compile("".join(cell["source"]), "quickstart.ipynb", "exec")

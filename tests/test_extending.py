"""docs/extending.md: its examples are executed as they stand, each with registries and a directory of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from fid.scores import METRICS
from gspn_dit.data.sources import SOURCES
from gspn_dit.diffusion import OBJECTIVES
from gspn_dit.models.mixers import MIXERS
from gspn_dit.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
REGISTRIES: dict[str, Any] = {
    "A mixer": (MIXERS, "shift"),
    "An objective": (OBJECTIVES, "robust"),
    "A metric": (METRICS, "brightness"),
    "A kind of data": (SOURCES, "squares"),
    "A task": (TASKS, "recognition"),
}


def blocks_of(section: str) -> list[str]:
    """The Python of a section of the page, block by block."""
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


INTRODUCTION, *PARTS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
SECTIONS = {part.partition("\n")[0]: blocks_of(part) for part in PARTS}
LAUNCHER, TINY_RUN = blocks_of(INTRODUCTION)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of its own, registries put back afterwards, and no state of Accelerate's from other tests."""
    monkeypatch.chdir(tmp_path)
    kept = [(registry, dict(registry)) for registry, _ in REGISTRIES.values()]
    AcceleratorState._reset_state(reset_partial_state=True)
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    for registry, entries in kept:
        registry.clear()
        registry.update(entries)


def test_the_page_has_an_example_of_every_registry() -> None:
    assert list(SECTIONS) == list(REGISTRIES)
    assert all(len(blocks) == 2 for blocks in SECTIONS.values())


@pytest.mark.parametrize("title", REGISTRIES)
def test_an_example_is_registered_and_used(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, name = REGISTRIES[title]
    assert name not in registry
    entry, use = SECTIONS[title]
    module = ModuleType("mine")  # a dataclass looks for the module it is in
    monkeypatch.setitem(sys.modules, "mine", module)
    names = vars(module)
    for code in (TINY_RUN, entry):
        exec(compile(code, f"docs/extending.md, {title}", "exec"), names)
    assert name in registry
    exec(compile(use, f"docs/extending.md, {title}", "exec"), names)  # asserts itself what comes of it


def test_the_launcher_trains_and_samples_with_what_another_module_enters(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "mine.py").write_text(SECTIONS["A mixer"][0], encoding="utf-8")
    monkeypatch.syspath_prepend(str(place))
    model = {"model.name": "DiT-N/4", "model.mixer": "shift", "model.hidden_size": "16", "model.depth": "1"}
    short = {"training.max_steps": "1", "training.batch_size": "4", "training.validation_images": "4"}
    keys = {**model, **short, "training.trackers": "[]", "sampling.steps": "1", "output_dir": "run"}
    train = ["gspn_dit.train", *(word for key, value in keys.items() for word in (f"--{key}", value))]
    sample = [*("gspn_dit.sample", "--checkpoint", "run", "--classes", "3", "--steps", "1", "--out", "grid.png")]
    for words in (train, sample):
        monkeypatch.setattr(sys, "argv", ["with_mine.py", *words])
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        MIXERS.pop("shift", None)
        exec(compile(LAUNCHER, "with_mine.py", "exec"), {"__name__": "__main__"})
    assert (place / "run" / "checkpoints" / "step-00000001").is_dir() and (place / "grid.png").is_file()
    del sys.modules["mine"]


def test_every_file_that_the_table_names_is_there() -> None:
    table = INTRODUCTION[: INTRODUCTION.index("An entry can also")]
    named = [path for path in re.findall(r"`((?:gspn_dit|fid|tests)/[\w/.]*)`", table) if "NAME" not in path]
    assert len(named) >= 8 and all((ROOT / path).exists() for path in named)

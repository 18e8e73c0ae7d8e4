"""README and the tutorials run: every block, in order, with tiny settings, or it is listed with the reason."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn_dit.checkpoint import find_checkpoints
from gspn_dit.config import parse_train_arguments
from gspn_dit.training.dry_run import dry_run
from tests.captioned import write_captioned, write_encoder
from tests.test_docs import ROOT, call, target
from tests.training.conftest import fresh_accelerator  # noqa: F401 (each command is a process of its own elsewhere)

RUN = {
    "training.max_steps": 1,
    "training.batch_size": 4,
    "training.validation_images": 4,
    "training.trackers": "[]",
}
SAMPLES = {"sampling.steps": 1, "sampling.per_class": 1}
MODELS = {
    "classification": {
        "model.backbone_options": '{"widths": [8, 16], "depths": [1, 1], "global_stages": [1], "proxy_channels": 2}'
    },
    "text": {"unet.channels": "[8, 16]", "unet.head_channels": 8, "sampling.max_classes": 2, **SAMPLES},
    "class": {"model.hidden_size": 16, "model.depth": 2, **SAMPLES},
}
SMALLER = {
    "--per-class": "2",
    "--num-samples": "70",
    "--data.image_size": "8",
    "--image-size": "8",
    "--encoder": "ENCODER",
}
"""Values that take the place of a page's own."""
ADDED = {"-m fid.train_features": ["--epochs", "1"], "sample": ["--steps", "1", "--device", "cpu"]}
INSTALLS = "installs packages"
IMAGENET = "needs ImageNet, an autoencoder and GPUs; its flags are checked in test_docs.py"


@dataclass(frozen=True)
class Page:
    """A page whose blocks run."""

    path: str
    prepare: Callable[[Path], object] = Path.exists
    """Makes what the page says that a reader has."""
    listed: dict[str, str] = field(default_factory=dict)
    """Beginnings of commands that do not run here, and why."""
    makes: tuple[str, ...] = ()
    """Files that are there in the end."""


def photos(home: Path, folder: str = "photos") -> None:
    """Dark and bright pictures, 40 of each."""
    for index in range(80):
        place = home / folder / ("bright" if index % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (3 * index, 100, 255 - 3 * index)).save(place / f"{index}.png")


def demo(home: Path) -> None:
    """What `make demo` leaves: one step of its training, and random images for its samples."""
    assert run(["train.py", "--config", "configs/demo.yaml"]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
    np.savez("runs/demo/samples.npz", arr_0=pixels, arr_1=np.arange(70) % 10)
    made = ["--samples", "runs/demo/samples.npz", "--reference", "digits", "--features", "digits"]
    assert run(["gspn-fid", *made, "--out", "runs/demo/report"]) == 0


def captioned(home: Path) -> None:
    """Captioned pictures, and an encoder of eight words where the page has minilm."""
    pytest.importorskip("transformers")
    write_captioned(home / "pictures")
    write_encoder(home / "ENCODER")


def everything(home: Path) -> None:
    """For README: the demo, and a folder of images."""
    demo(home)
    photos(home, "DIR")


README = Page(
    "README.md",
    everything,
    {"make": "minutes; one step stands in for the demo", ". .venv": INSTALLS, "gspn-play": "serves until stopped"},
    ("grid.png", "report/index.html", "digits_report/index.html", "runs/mine/index.html", "runs/python/index.html"),
)
TUTORIALS = (
    Page("docs/tutorials/own_images.md", photos, makes=("grid.png", "wide.png", "report/index.html")),
    Page(
        "docs/tutorials/imagenet.md",
        listed=dict.fromkeys(
            ("accelerate launch", "gspn-encode", "gspn-fid", "python -m gspn_dit.importers"), IMAGENET
        ),
    ),
    Page("docs/tutorials/text_to_image.md", captioned, {"pip install": INSTALLS}, ("grid.png", "texts/manifest.json")),
    Page("docs/tutorials/classification.md", photos, makes=("report/index.html",)),
    Page("docs/tutorials/evaluation.md", demo, makes=("table.md", "noise_report/report.json")),
)


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Every fenced block of a page that a reader would run: its language and its text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return (match.groups() for match in re.finditer(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def shell_lines(block: str) -> list[str]:
    lines = (line.strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run(words: list[str]) -> int:
    """Run a command with smaller settings in this process."""
    words = ["python", *words] if words[0].endswith(".py") else words
    program, arguments = target(words)
    assert program, f"{' '.join(words)}: run it, or list it with the reason"
    for flag, value in SMALLER.items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
    if program in ("train.py", "-m gspn_dit.train"):
        text = any("text" in word for word in arguments)
        kind = "classification" if "classification" in arguments else "text" if text else "class"
        arguments += [word for key, value in (RUN | MODELS[kind]).items() for word in (f"--{key}", str(value))]
        arguments += ["--text.encoder", "ENCODER"] if text else []
        arguments += ["--data.image_size", "8"] if any("own_images" in word for word in arguments) else []
    arguments += ADDED["sample"] if program in ("sample.py", "-m gspn_dit.sample", "-m gspn_dit.generate") else []
    with pytest.MonkeyPatch.context() as patch:
        return call(program, arguments + ADDED.get(program, []), patch)


def run_blocks(page: Page, home: Path) -> dict[str, Any]:
    """Run all blocks of a page in order and return the names of its Python blocks, which they share."""
    page.prepare(home)
    names: dict[str, Any] = {"__name__": "page"}
    for language, block in blocks(page.path):
        if language == "python":
            exec(compile(re.sub(r"(steps(?:=|\": ))\d+", r"\g<1>1", block), page.path, "exec"), names)
            continue
        for line in shell_lines(block):
            if not line.startswith(tuple(page.listed)):
                assert run(shlex.split(line, comments=True)) == 0, line
    assert [path for path in page.makes if not (home / path).exists()] == []
    return names


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like the repository's, in which commands write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: Path(page.path).stem)
def test_a_tutorial_runs(page: Page, home: Path) -> None:
    run_blocks(page, home)


def test_readme_repeats_the_figures_of_the_evidence() -> None:
    """What its tables say of the mixer, and of FD, is in pages that are held to their JSONs."""
    pages = [
        (ROOT / "docs" / name).read_text(encoding="utf-8")
        for name in ("evidence.md", "objectives.md", "quality.md", "text_to_image.md")
    ]
    evidence = pages[0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| mixer C=384 \| (?:gspn|attention) \| .* \|$", evidence, re.MULTILINE)]
    _, speeds, attention, memory = (re.findall(r"[\d.]+(?=×| \|)", row.split("|", 3)[3])[-4:] for row in rows)
    assert "{}×, {}×, {}× and {}× as fast".format(*speeds) in readme
    assert "{}, {}, {} and {} MB; attention {}, {}, {} and {} MB".format(*memory, *attention) in readme
    figures = "".join(pages)
    for ratio in re.findall(r"\d\.\d+ \[[\d., ]+\]", readme):
        assert f"| {ratio} " in figures, f"README.md says {ratio}, which no table repeats"


@pytest.mark.slow
def test_readme_runs(home: Path) -> None:
    names = run_blocks(README, home)
    assert len(list(Path("digits").glob("*.png"))) == 70
    assert all(isinstance(image, Image.Image) for image in names["images"]) and len(names["images"]) == 3
    assert names["y"].shape == names["x"].shape


def test_a_folder_of_images_trains_as_readme_says(home: Path) -> None:
    photos(home, "DIR")
    (line,) = [line for _, block in blocks("README.md") for line in shell_lines(block) if "--data.path DIR" in line]
    assert run(shlex.split(line)) == 0
    assert list(find_checkpoints(home / "runs" / "mine")) == [1]


def test_the_recipe_of_the_tutorial_answers_a_dry_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for _, block in blocks("docs/tutorials/imagenet.md") for line in shell_lines(block)]
    (line,) = [line for line in lines if "--dry-run" in line]
    dry_run(parse_train_arguments(target(shlex.split(line))[1]).config)
    assert "GSPN-B/2, 137,764,956 parameters" in capsys.readouterr().out


def test_every_tutorial_is_run_and_nothing_else_is_listed() -> None:
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert {page.path for page in TUTORIALS} == there
    for page in (README, *TUTORIALS):
        lines = [line for language, block in blocks(page.path) if language == "sh" for line in shell_lines(block)]
        assert all(any(line.startswith(listed) for line in lines) for listed in page.listed)

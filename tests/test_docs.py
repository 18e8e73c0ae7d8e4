"""What README and docs tell to run: every command and flag exists, every link leads somewhere, README's blocks run."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gspn_dit.checkpoint import find_checkpoints
from gspn_dit.config import parse_train_arguments
from gspn_dit.training.dry_run import dry_run
from tests.training.conftest import fresh_accelerator  # noqa: F401 (each command is a process of its own elsewhere)

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cuda/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAM = re.compile(r"^(?:accelerate launch|python|torchrun|mpirun)\b")
LAUNCHERS = {"--config_file": 1, "--nproc-per-node": 1, "--standalone": 0, "--multi_gpu": 0, "--num_processes": 1}
NOT_OURS = {"--config", "--help"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """Every command of a page's shell blocks and inline code, in words, without what follows a comment or a pipe."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in lines:
        if PROGRAM.match(line):
            words = shlex.split(line.replace("[", "").replace("]", "").replace("…", ""), comments=True)
            found.append(words)
    return found


def target(words: list[str]) -> tuple[str, list[str]]:
    """What a command runs, "-m NAME" or a file, and the arguments that this gets; launchers' own are skipped."""
    rest = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
    while rest and rest[0] in LAUNCHERS:
        rest = rest[1 + LAUNCHERS[rest[0]] :]
    if rest[:1] == ["-m"]:
        return f"-m {rest[1]}", rest[2:]
    return (rest[0], rest[1:]) if rest and rest[0].endswith(".py") else ("", [])


DOCUMENTED = [(page.name, *target(words)) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
PROGRAMS = sorted({program for _, program, _ in DOCUMENTED} - {"", "-m pytest"})


def call(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a program in this process as a shell would; return its exit code."""
    monkeypatch.setattr(sys, "argv", [program.removeprefix("-m "), *arguments])
    try:
        if program.startswith("-m "):
            runpy.run_module(program.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_pages_have_commands() -> None:
    assert {"train.py", "sample.py", "-m fid", "-m gspn_dit.generate", "-m gspn_dit.doctor"} <= set(PROGRAMS)
    assert len(PROGRAMS) >= 15


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_documented_command_says_what_it_takes(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And takes every flag that a page gives it."""
    variants: dict[tuple[str, ...], set[str]] = {}
    for _, documented, arguments in DOCUMENTED:
        if documented == program:
            within = ("compare",) if program == "-m fid" and arguments[:1] == ["compare"] else ()
            flags = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            variants.setdefault(within, set()).update(flags - NOT_OURS)
    for within, flags in variants.items():
        assert call(program, [*within, "--help"], monkeypatch) == 0
        shown = capsys.readouterr().out
        assert "usage" in shown.lower()
        assert not {flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", shown)}, program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        there = page.parent / path if path else page
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


OURS = re.compile(  # a path of the repository, but for what a command writes
    r"(?<![\w./:-])(?<!--json )(?<!--out )(?:tests|gspn_dit|fid|benchmarks|configs|docs|cuda)/(?:[\w./*{},-]*[\w*}])?"
)


def patterns(path: str) -> list[str]:
    """The glob patterns of a path with {one,another} and NAME."""
    pieces = [piece[1:-1].split(",") if piece[:1] == "{" else [piece] for piece in re.split(r"(\{.*?\})", path)]
    return ["".join(chosen).replace("NAME", "*") for chosen in itertools.product(*pieces)]


def test_patterns() -> None:
    assert patterns("configs/a_{b,c}_{d,e}.yaml") == [f"configs/a_{each}.yaml" for each in ("b_d", "b_e", "c_d", "c_e")]
    assert OURS.findall("`fid/x.py:3`, (docs/a.md#b), cuda/. --out docs/new.md a/docs/b.md") == [
        *("fid/x.py", "docs/a.md", "cuda/")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    named = {pattern for path in OURS.findall(page.read_text(encoding="utf-8")) for pattern in patterns(path)}
    assert not sorted(pattern for pattern in named if not any(ROOT.glob(pattern)))


# -- README's blocks, with tiny settings -----------------------------------------------------------------------------

SETTINGS = {
    "training.max_steps": 1,
    "training.batch_size": 4,
    "training.validation_images": 4,
    "training.trackers": "[]",
    "sampling.steps": 1,
    "sampling.per_class": 1,
    "model.hidden_size": 16,
    "model.depth": 2,
}
TINY = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
SMALLER = {"--per-class": "2", "--num-samples": "70", "--model.name": "GSPN-N/4", "--data.image_size": "8"}
"""Values that take the place of README's own."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like the repository's, in which commands write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def run_lines(lines: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands of README with smaller settings; each must end well."""
    for words in lines:
        program, arguments = target(words)
        for flag, value in SMALLER.items():
            if flag in arguments:
                arguments[arguments.index(flag) + 1] = value
        if program == "train.py":
            arguments += TINY
        elif program in ("sample.py", "-m gspn_dit.generate"):
            arguments += ["--steps", "1", "--device", "cpu"]
        assert call(program, arguments, monkeypatch) == 0, words


def section(title: str) -> str:
    return README[README.index(f"## {title}\n") :].split("\n## ")[0]


@pytest.mark.slow
def test_the_commands_after_the_demo_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself, `make demo`, takes minutes: one step of it stands in, and random images for its set."""
    assert call("train.py", ["--config", "configs/demo.yaml", *TINY, "--resume", "auto"], monkeypatch) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
    np.savez("runs/demo/samples.npz", arr_0=pixels, arr_1=np.arange(70) % 10)
    made = ["--samples", "runs/demo/samples.npz", "--reference", "digits", "--features", "digits"]
    assert call("-m fid", [*made, "--out", "runs/demo/report"], monkeypatch) == 0
    run_lines(commands(section("Install and try")), monkeypatch)
    assert Path("grid.png").exists() and Path("report/index.html").exists()
    run_lines([words for words in commands(section("Generate and evaluate")) if len(words) > 4], monkeypatch)
    assert len(list(Path("digits").glob("*.png"))) == 70

    pipeline, scan = re.findall(r"```python\n(.*?)```", section("In Python"), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(pipeline.replace("num_inference_steps=50", "num_inference_steps=1"), "README.md", "exec"), names)
    images = names["images"]
    assert isinstance(images, list) and all(isinstance(image, Image.Image) for image in images) and len(images) == 3
    gates = {name: torch.ones(2, 4, 4, 4, 8) for name in ("input_gate", "output_gate")}
    names = {"x": torch.ones(2, 4, 4, 8), "weight_logits": torch.zeros(2, 4, 4, 4, 3, 8), "merge_weight": torch.ones(4)}
    exec(compile(scan, "README.md", "exec"), names | gates | {"__name__": "readme"}, result := {})
    assert result["y"].shape == (2, 4, 4, 8)


def test_a_folder_of_images_trains_as_readme_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(24):
        folder = home / "DIR" / ("bright" if index % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 10), 9 * index).save(folder / f"{index}.png")
    (words,) = [words for words in commands(section("Your own images")) if "DIR" in words]
    run_lines([words], monkeypatch)
    assert list(find_checkpoints(home / "runs" / "mine")) == [1]


def test_the_recipe_of_readme_answers_a_dry_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [words for words in commands(section("ImageNet 256×256 in four commands")) if "--data.path" in words]
    dry_run(parse_train_arguments([*target(words)[1], "--dry-run"]).config)
    assert "GSPN-XL/2, 691,704,260 parameters" in capsys.readouterr().out


# -- docs/architecture.md --------------------------------------------------------------------------------------------

ROWS = re.findall(
    r"^\| .* \| (.*`.*) \|$", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("row", ROWS)
def test_the_architecture_names_what_is_there(row: str) -> None:
    """Paths exist, and a name before a path is defined there."""
    quoted = re.findall(r"`([^`]+)`", row)
    names: list[str] = []
    for word in quoted:
        if "/" not in word:
            names.append(word)
            continue
        path = ROOT / word
        assert path.exists(), word
        for name in names:
            defined = rf"^\s*(?:(?:async )?def|class) {name}\b|^{name}\b.* = |import .*\b{name}\b"
            assert re.search(defined, path.read_text(encoding="utf-8"), re.MULTILINE), f"{name} is not in {word}"
        names = []

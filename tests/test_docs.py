"""What README and docs say: every command and flag exists, every link leads somewhere, Python blocks compile."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cuda/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAM = re.compile(r"^(?:accelerate launch|python|torchrun|mpirun|gspn-\w+)\b")
METADATA = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'^(gspn-\w+) = "([\w.]+):cli"$', METADATA, re.MULTILINE))
LAUNCHERS = {"--config_file": 1, "--nproc-per-node": 1, "--standalone": 0, "--multi_gpu": 0, "--num_processes": 1}
NOT_OURS = {"--config", "--help"}


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
    if words[0] in SCRIPTS:
        return f"-m {SCRIPTS[words[0]].removesuffix('.cli').removesuffix('.__main__')}", words[1:]
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
            module = program.removeprefix("-m ")
            for name in (module, f"{module}.__main__"):  # a shell starts without it, and runpy warns of it
                monkeypatch.delitem(sys.modules, name, raising=False)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_the_installed_commands_rightly_and_its_python_compiles(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    started = {words[0] for words in commands(text) if len(words) > 1}
    assert {word for word in started if word.startswith("gspn-")} <= {*SCRIPTS}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(code, page.name, "exec")


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


def test_the_site_has_every_page() -> None:
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    docs = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(set(docs) - set(listed)) == [], "enter the page in mkdocs.yml"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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

"""The commands: each that an installation puts on the path answers at once under its own name, the rest in silence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read by Python 3.11's tomllib")
ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for top in ("gspn_dit", "fid")
    for path in sorted((ROOT / top).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]
"""What `python -m` starts."""
WITHOUT_OPTIONS = {"gspn_dit.environment"}  # imports nothing of ours, so that a broken installation can be described
HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "sklearn", "torch", "torchvision"}

START = """
import importlib, json, resource, sys
module, function = sys.argv.pop(1).split(":")
sys.argv[0] = "/somewhere/bin/" + sys.argv.pop(1)
try:
    getattr(importlib.import_module(module), function)()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    loaded = sorted({name.split(".")[0] for name in sys.modules})
    print(json.dumps([used.ru_utime + used.ru_stime, loaded]))
"""


def start(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start a command as the script that pip writes does."""
    words = [sys.executable, "-c", START, COMMANDS[command], command, *arguments]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once(command: str) -> None:
    """Within 3 s of processor time (a busy machine's wall clock says nothing), as nothing heavy is imported."""
    done = start(command, "--help")
    shown, _, measured = done.stdout.rstrip().rpartition("\n")
    seconds, modules = json.loads(measured)
    assert done.returncode == 0, done.stderr
    assert shown.startswith(f"usage: {command} [")
    assert seconds <= 3
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_module_brings_no_warning(module: str) -> None:
    """Neither of Python, such as runpy's of a module that its own package imports, nor of what is imported."""
    words = [sys.executable, "-W", "error", "-m", module, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert module in WITHOUT_OPTIONS or done.stdout.lower().startswith("usage: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_one_line_under_the_commands_name(command: str) -> None:
    done = start(command, "--no-such-option")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{command}: error: ")


def test_training_starts_by_no_accident() -> None:
    done = start("gspn-train")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gspn-train: error: nothing says what to train; give --config FILE")


@pytest.mark.parametrize(
    ("command", "typed", "offered"),
    [
        ("gspn-sample", "--guidance-s", "--guidance-scale"),
        ("gspn-generate", "--labels bal", "balanced"),
        ("gspn-train", "--training.batch", "--training.batch_size"),
    ],
)
def test_a_shell_is_told_how_to_complete(command: str, typed: str, offered: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("argcomplete") is None:
        pytest.skip("argcomplete is not installed")
    line, answer = f"{command} {typed}", tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    start(command, **asked, _ARGCOMPLETE_STDOUT_FILENAME=str(answer), _ARGCOMPLETE_IFS="\n")
    assert offered in [word.strip() for word in answer.read_text(encoding="utf-8").split("\n")]

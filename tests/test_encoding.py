"""Text is UTF-8 on every machine: no file of the project is read or written in the locale's encoding."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("gspn_dit", "fid", "benchmarks")


def calls_in_the_locale(text: str) -> list[int]:
    """Lines of calls that read or write text without saying in which encoding; ruff's rule misses untyped paths."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            wrong = "encoding" not in keywords
        elif isinstance(node.func, ast.Name) and node.func.id == "open":
            mode = keywords.get("mode", node.args[1] if len(node.args) > 1 else None)
            binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
            wrong = not binary and "encoding" not in keywords
        else:
            wrong = "encoding" not in keywords and {"text", "universal_newlines"} & keywords.keys() != set()
        lines += [node.lineno] if wrong else []
    return lines


@pytest.mark.parametrize(
    "statement",
    [
        "open(path)",
        "open(path, 'a')",
        "open(path, mode='w')",
        "path.read_text()",
        "path.write_text('é')",
        "subprocess.run(command, text=True)",
    ],
)
def test_every_form_is_seen(statement: str) -> None:
    assert calls_in_the_locale(f"import os\n{statement}\n") == [2]


@pytest.mark.parametrize("statement", ["open(path, 'rb')", "open(path, encoding='utf-8')", "path.read_bytes()"])
def test_bytes_and_named_encodings_pass(statement: str) -> None:
    assert calls_in_the_locale(statement) == []


def test_the_encoding_is_given_everywhere() -> None:
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted(files)
        for line in calls_in_the_locale(file.read_text(encoding="utf-8"))
    ]
    assert not wrong

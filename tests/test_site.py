"""The documentation site: it builds without a warning, and its reference has every public name."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def public_names(path: Path) -> Iterator[str]:
    """The full names of the public functions and classes that a module defines and describes."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        described = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)
        if described and not node.name.startswith("_"):
            yield f"{module}.{node.name}"


def inventory(file: Path) -> set[str]:
    """The names that a site documents, from the inventory that Sphinx and mkdocstrings share."""
    _, _, compressed = file.read_bytes().partition(b"zlib.\n")
    return {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: warnings are errors."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (make docs, or pip install -e '.[docs]')")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(place)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return place


@pytest.mark.slow
def test_the_reference_has_every_public_name(site: Path) -> None:
    modules = [path for top in ("gspn_dit", "fid") for path in (ROOT / top).rglob("*.py") if path.stem != "__main__"]
    names = {name for path in modules for name in public_names(path)}
    assert {"gspn_dit.ops.scan.gspn_scan", "gspn_dit.pipeline.GSPNPipeline", "fid.evaluation.evaluate"} <= names
    assert sorted(names - inventory(site / "objects.inv")) == []


@pytest.mark.slow
def test_pages_of_the_root_are_pages_of_the_site(site: Path) -> None:
    """And lead to one another: no link goes to a Markdown file."""
    for name in ("index", "kernels", "contributing", "changelog", "tutorials/own_images", "reference/ops"):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        assert "<h1" in page and '.md"' not in page and ".md#" not in page
    assert 'href="evidence.html"' in (site / "index.html").read_text(encoding="utf-8")

"""The files about the package agree with one another: version, citation, lock file, image, workflow, command names."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import gspn_dit

tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read by Python 3.11's tomllib")
ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {"cuda12", "cuda13", "deepspeed", "dev", "docs", "playground", "text", "timm"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run_tool(name: str, *arguments: str) -> None:
    """Run a checker that is no Python package of the project; skip the test where it is missing."""
    tool = shutil.which(name)
    if tool is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert yaml.safe_load(read("CITATION.cff"))["version"] == gspn_dit.__version__


def test_readme_has_every_extra() -> None:
    assert set(PROJECT["optional-dependencies"]) == EXTRAS
    table = read("README.md").partition("| extra | for |")[2].partition("\n\n")[0]
    named = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.strip().splitlines()]
    assert {extra for names in named for extra in names} == EXTRAS


# -- CITATION.cff ----------------------------------------------------------------------------------------------------


def test_the_citation_names_the_papers_of_readme() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    cited = {identifier["value"] for work in citation["references"] for identifier in work["identifiers"]}
    assert cited == set(re.findall(r"arXiv:\d{4}\.\d{5}", read("README.md")))
    assert all(work["authors"] and work["title"] for work in citation["references"])


def test_the_citation_is_valid() -> None:
    run_tool("cffconvert", "--validate")


# -- uv.lock ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> list[dict[str, Any]]:
    return tomllib.loads(read("uv.lock"))["package"]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_file_is_of_these_requirements(locked: list[dict[str, Any]]) -> None:
    """What pyproject.toml asks for, by name, range and extra; run `make lock` after a change of it."""
    (own,) = [package for package in locked if package["name"] == "gspn-dit"]
    stated = {(None, line) for line in PROJECT["dependencies"]}
    stated |= {(extra, line) for extra, lines in PROJECT["optional-dependencies"].items() for line in lines}
    wanted = set()
    for extra, line in stated:
        name, _, specifier = re.fullmatch(r"([\w.-]+)(\[\w+\])?(.*)", line).groups()  # type: ignore[union-attr]
        wanted.add((extra, normalised(name), specifier))
    found = set()
    for entry in own["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '(\w+)'", entry.get("marker", ""))
        found.add((extra[1] if extra else None, entry["name"], entry.get("specifier", "")))
    assert found == wanted


def test_the_lock_file_has_the_tested_versions_from_the_public_index(locked: list[dict[str, Any]]) -> None:
    versions: dict[str, set[str]] = {}
    for package in locked:
        versions.setdefault(package["name"], set()).add(package.get("version", ""))
    pins = re.findall(r"^([\w.-]+)==([\w.]+);", read("constraints.txt"), flags=re.MULTILINE)
    different = {name for name, version in pins if version not in versions[normalised(name)]}
    assert len(pins) > 20 and not different
    hosts = set(re.findall(r"https?://([^/\"]+)", read("uv.lock")))
    assert hosts <= {"pypi.org", "files.pythonhosted.org"}


# -- Dockerfile, workflow, issue forms -------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and what they are given."""
    lines = [line for line in read("Dockerfile").replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_copies_what_is_there_and_installs_extras_that_exist() -> None:
    steps = instructions()
    copied = [word for name, words in steps if name == "COPY" for word in words.split()[:-1]]
    assert {"gspn_dit", "fid", "cuda", "configs", "pyproject.toml", "setup.py"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    allowed = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    assert all(any(Path(path).match(pattern) for pattern in allowed) for path in copied)
    (install,) = [words for name, words in steps if name == "RUN" and "pip install" in words]
    (extras,) = re.findall(r"\[([\w,]+)\]", install)
    assert set(extras.split(",")) <= EXTRAS
    (base,) = [words for name, words in steps if name == "FROM"]
    cuda = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-base-ubuntu24\.04", base)
    assert cuda and f"cuda{cuda[1]}" in extras.split(",")


def test_hadolint_finds_nothing() -> None:
    run_tool("hadolint", "Dockerfile")


def test_the_workflow_runs_what_a_change_must_pass() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands and (ROOT / ".ci/run").stat().st_mode & 0o100
    assert {True, "on"} & workflow.keys()  # YAML 1.1 reads "on" as true


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_an_issue_form_is_one(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert content["name"] and content["description"] and content["body"]
    assert all(part["type"] in ("textarea", "input") and part["attributes"]["label"] for part in content["body"])

"""What type checkers see of the public names: the package says by py.typed that it is typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gspn_dit

SNIPPET = """
import gspn_dit
from gspn_dit import {names}

reveal_type(gspn_dit.create_model("GSPN-N/2", 10, 4, 8))
reveal_type(gspn_dit.load_config("config.yaml").training.max_steps)
reveal_type(GSPNPipeline.from_checkpoint("runs/demo")([0]))
gspn_dit.load_config(3)
gspn_dit.nothing
"""


def test_public_names_are_those_that_are_imported_on_first_use() -> None:
    assert sorted(gspn_dit.__all__) == sorted(["__version__", *gspn_dit._HOMES])
    for name in gspn_dit._HOMES:
        assert getattr(gspn_dit, name).__module__.startswith("gspn_dit.")


@pytest.mark.slow
def test_public_names_are_typed(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(SNIPPET.format(names=", ".join(gspn_dit._HOMES)))
    root = Path(__file__).parents[1]  # whose cache knows torch's types
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", str(tmp_path / "user.py")],
        capture_output=True,
        text=True,
        cwd=root,
    )
    lines = [line.partition(".py:")[2].partition(": ")[2] for line in checked.stdout.splitlines()]
    assert lines[:-1] == [
        'note: Revealed type is "gspn_dit.models.base.DiffusionModel"',
        'note: Revealed type is "int"',
        'note: Revealed type is "gspn_dit.pipeline.GSPNPipelineOutput"',
        'error: Argument 1 to "load_config" has incompatible type "int"; expected "str | PathLike[str]"  [arg-type]',
        'error: Module has no attribute "nothing"  [attr-defined]',
    ], checked.stdout + checked.stderr

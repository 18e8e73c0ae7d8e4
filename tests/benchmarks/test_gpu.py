"""The session on a GPU, rehearsed without one: limits, outcomes, the page, kernels compiled beforehand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cache, gpu_steps
from gspn_dit.errors import UserError
from gspn_dit.ops.cuda.binding import problem
from gspn_dit.ops.cuda.host import harness
from gspn_dit.ops.cuda.types import Variant

NOT_NEEDED = ("accelerate", "datasets", "diffusers", "hypothesis", "jsonargparse", "torch_fidelity", "yaml")

needs_compilers = pytest.mark.skipif(
    (harness.compiler() is None or importlib.util.find_spec("cupy") is None) and not os.environ.get("CI"),
    reason="g++ and CuPy's NVRTC build the kernels",
)


def test_a_step_that_hangs_costs_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sleep")  # which takes the step's name for no number, and fails
    failed = gpu.run_step("machine", 5, rehearse=True)
    assert failed["status"] == "failed" and "sleep" in failed["why"]

    real = subprocess.Popen
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, **options: real(["sleep", "60"], **options))
    began = time.monotonic()
    assert gpu.run_step("machine", 0.5, rehearse=True) == {"status": "timed out", "seconds": 0.5}
    assert time.monotonic() - began < 5


def test_a_wrong_result_is_no_done_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    for result, status in (({"right": True}, "done"), ({"bfloat16": {"right": False}}, "wrong")):
        said = ["echo", f"a warning\n{json.dumps(result)}"]
        monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, said=said, **options: real(said, **options))
        assert gpu.run_step("machine", 5, rehearse=False)["status"] == status


def test_every_step_has_a_limit_and_the_first_ones_are_what_all_else_hangs_on() -> None:
    steps = gpu.steps()
    regimes = ("short", "cluster", "wide", "long", "projected")
    assert list(steps)[:6] == ["machine", *(f"correctness, {regime}" for regime in regimes)]
    assert all(5 <= step.seconds <= 120 for step in steps.values())
    assert {"tests", "model, GSPN-XL/2", "model, DiT-XL/2", "ncu", "compute-sanitizer"} <= set(steps)


def test_the_page_has_a_row_of_times() -> None:
    timing = {"best_ms": 0.25, "share_of_copy": 0.61}
    result = {"shape": [1, 2, 3, 4], "forward": timing, "forward_backward": timing, "attention": {"best_ms": 1.5}}
    step = {"status": "done", "seconds": 3, "result": {**result, "estimate": {"a": 0.1, "b": 0.12}}}
    text = gpu.page({"rehearsal": False, "steps": {"times, 1x2x3x4": step, "ncu": {"status": "skipped", "seconds": 0}}})
    assert "| [1, 2, 3, 4] | 0.25 | 0.61 | 0.25 | 0.61 | 1.5 | 0.22 |" in text
    assert "| ncu | skipped | 0 |" in text and "rehearsal" not in text


@pytest.mark.skipif(problem() is None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    with pytest.raises(UserError, match=r"^nothing can be measured on a GPU: \S"):
        gpu_steps.gpu()


@needs_compilers
def test_kernels_compiled_beforehand_lie_where_cupy_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    code = (
        "import torch; from benchmarks.gpu_cache import compile_into_cache; "
        "from gspn_dit.ops.cuda.types import Variant; "
        "[compile_into_cache(Variant('finish', torch.bfloat16, 1, True), 'sm_90') for _ in range(2)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (file,) = tmp_path.glob("*.cubin")
    assert file.read_bytes().find(b"\x7fELF") >= 0


def test_what_is_compiled_beforehand_covers_each_regime() -> None:
    found = gpu_cache.variants("sm_90", gpu_steps.GPU_SHAPES)
    fused = {f"projected_{name}" for name in ("forward", "backward", "join")}
    assert {variant.regime for variant in found} == {*gpu_steps.REGIMES, "finish", *fused}
    assert Variant("short", torch.bfloat16, 4, False) in found


@needs_compilers
@pytest.mark.slow
def test_the_steps_run_where_little_is_installed(tmp_path: Path) -> None:
    """In an environment of the packages that the GPU's machine has; the kernels' PTX runs in the GPU's place."""
    site = tmp_path / "site"
    site.mkdir()
    for file in Path(torch.__file__).parents[1].iterdir():
        if not file.name.lower().startswith(NOT_NEEDED) and file.suffix != ".pth":
            (site / file.name).symlink_to(file)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (python,) = (tmp_path / "venv").glob("bin/python")
    (folder,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    (folder / "needed.pth").write_text(f"{site}\n")
    command = [python, "-m", "benchmarks.gpu", "--rehearse", "--out", tmp_path / "gpu.json"]
    command += ["--only", "machine", "long", "projected", "tests", "1x1024x1024", "GSPN", "ncu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.json").read_text()
    assert "7 of 7 steps done and right" in done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["rehearsal"] and report["steps"]["tests"]["result"]["tests"] > 100
    assert "A rehearsal on a CPU" in (tmp_path / "gpu.md").read_text()

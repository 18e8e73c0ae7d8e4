"""The doctor: what it reports here, that it notices wrong kernels, and the fixes it names."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gspn_dit.ops
from gspn_dit import doctor
from gspn_dit.ops.cpu import binding as cpu
from gspn_dit.ops.cuda import binding as cuda


def run_doctor(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor as a user would, in a directory that is not the checkout."""
    checkout = str(Path(doctor.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": checkout}
    return subprocess.run(
        [sys.executable, "-m", "gspn_dit.doctor", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_json_from_anywhere_and_within_ten_seconds(tmp_path: Path) -> None:
    before = os.times()
    finished = run_doctor(tmp_path, "--json")
    after = os.times()
    assert finished.returncode == 0, finished.stderr
    diagnosis = json.loads(finished.stdout)
    assert diagnosis["ok"] is True
    assert diagnosis["versions"]["python"] == platform.python_version()
    for package in ("torch", "numpy", "diffusers", "accelerate", "datasets", "torch-fidelity", "safetensors"):
        assert diagnosis["versions"][package] == importlib.metadata.version(package)
    assert diagnosis["machine"]["cores"] >= 1
    assert [report["name"] for report in diagnosis["backends"]] == ["reference", "cpu", "cupy"]
    assert [report["works"] for report in diagnosis["backends"]][:2] == [True, True]
    # Processor time, because the wall clock of a busy machine says nothing.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10


def test_report_for_a_reader(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "problem", lambda: "CuPy is not installed")
    monkeypatch.setattr(doctor, "_fix_for_cupy", lambda: "pip install -e '.[cuda13]'")
    monkeypatch.setenv("GSPN_SCAN_BACKEND", "reference")
    with pytest.raises(SystemExit) as finished:
        doctor.main([])
    assert finished.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"torch {torch.__version__.split('+')[0]}" in " ".join(lines)
    assert any(line.startswith("reference works: plain PyTorch") for line in lines)
    assert any(line.startswith(f"cpu works: {cpu.describe()}; forward and gradients within") for line in lines)
    assert "cupy does not work: CuPy is not installed" in lines
    assert "to fix it: pip install -e '.[cuda13]'" in lines
    assert any("GSPN_SCAN_BACKEND=reference stands in" in line for line in lines)
    assert lines[-1] == "The CPU path works."


def test_what_compiles_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = cuda.Toolchain("14.2.0", "13.0", ("sm_90", "sm_100"), "/cache")
    monkeypatch.setattr(cuda, "toolchain", lambda: tools)
    assert doctor.find_toolchain() == dataclasses.asdict(tools)
    lines = [" ".join(line.split()) for line in doctor._format_toolchain(doctor.find_toolchain())]
    assert lines == ["NVRTC 13.0, through CuPy 14.2.0", "architecture sm_90, sm_100", "cache /cache"]
    monkeypatch.setattr(cuda, "toolchain", lambda: dataclasses.replace(tools, architectures=()))
    assert "architecture no GPU here;" in " ".join(doctor._format_toolchain(doctor.find_toolchain())[1].split())


@pytest.mark.parametrize(
    ("of_torch", "installed", "fix"),
    [
        ("13.0", [], "pip install -e '.[cuda13]'"),
        ("12.8", [], "pip install -e '.[cuda12]'"),
        (None, [], "pip install -e '.[cuda13]'"),
        ("13.0", ["cupy-cuda13x"], "pip install 'cupy-cuda13x[ctk]'"),
    ],
)
def test_the_fix_for_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, of_torch: str | None, installed: list[str], fix: str
) -> None:
    def missing() -> cuda.Toolchain:
        raise ModuleNotFoundError("No module named 'cupy'")

    monkeypatch.setattr(cuda, "toolchain", missing)
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.0" if name in (*installed, "torch") else None)
    found = doctor.find_toolchain()
    assert found == {"problem": "ModuleNotFoundError: No module named 'cupy'", "fix": fix}
    lines = [" ".join(line.split()) for line in doctor._format_toolchain(found)]
    assert lines == ["NVRTC not found: ModuleNotFoundError: No module named 'cupy'", f"to fix it: {fix}"]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_kernel_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right = gspn_dit.ops.gspn_scan

    def wrong(*tensors: Any, backend: str, **options: Any) -> torch.Tensor:
        y = right(*tensors, backend=backend, **options)
        return y * factor if backend == "cpu" else y

    monkeypatch.setattr(gspn_dit.ops, "gspn_scan", wrong)
    with pytest.raises(SystemExit) as finished:
        doctor.main(["--json"])
    assert finished.value.code == 1
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["ok"] is False
    reference, of_cpu, _ = diagnosis["backends"]
    assert reference["works"] is True
    assert of_cpu["works"] is False
    assert "differs from the reference" in of_cpu["detail"]


@pytest.mark.parametrize(
    ("of_torch", "gpu", "installed", "expected"),
    [
        (None, False, [], "install a CUDA build of PyTorch"),
        ("13.0", False, [], "run on a machine where `nvidia-smi` lists a GPU"),
        ("13.0", True, [], "pip install -e '.[cuda13]'"),
        ("12.8", True, [], "pip install -e '.[cuda12]'"),
        ("12.8", True, ["cupy-cuda13x"], "pip uninstall -y cupy-cuda13x && pip install -e '.[cuda12]'"),
        ("13.0", True, ["cupy", "cupy-cuda13x"], "pip uninstall -y cupy && pip install -e '.[cuda13]'"),
        ("13.0", True, ["cupy-cuda13x"], None),
    ],
)
def test_the_fix_for_cupy(
    monkeypatch: pytest.MonkeyPatch, of_torch: str | None, gpu: bool, installed: list[str], expected: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(doctor, "installed_version", lambda package: "1.0" if package in installed else None)
    fix = doctor._fix_for_cupy()
    assert fix == expected or (expected is not None and fix is not None and fix.startswith(expected))


def test_a_torch_that_does_not_import(tmp_path: Path) -> None:
    """A broken installation is reported with its reason, without a traceback."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    finished = run_doctor(tmp_path)
    assert finished.returncode == 1
    assert "cannot be imported: ImportError: libcudart.so.12: cannot open shared object file" in finished.stdout
    assert finished.stdout.endswith("The CPU path does not work.\n")
    assert finished.stderr == ""


def test_an_unknown_argument_is_one_line(tmp_path: Path) -> None:
    finished = run_doctor(tmp_path, "--jsn")
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.endswith("doctor: error: unknown argument --jsn; did you mean '--json'?")

"""Facts of the environment, in one place: what a run, the doctor, a report and a benchmark say of it is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from benchmarks.measure import CpuDevice, software
from fid import report
from gspn_dit import doctor, environment
from gspn_dit.ops.cpu import binding as cpu

ROOT = Path(__file__).parents[1]


def test_everyone_says_the_same() -> None:
    facts = environment.machine()
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 2**28 and facts["processor"]
    assert doctor.describe_machine().items() >= facts.items()
    measured = CpuDevice().describe()
    assert {name: measured[name] for name in ("processor", "instruction_sets", "cores")}.items() <= facts.items()
    assert measured["kernels"] == cpu.describe()
    run = environment.describe_run()
    assert run["machine"] == facts
    assert run["versions"]["numpy"] == report.versions()["numpy"] == numpy.__version__
    assert {"python": run["versions"]["python"], "system": facts["platform"]}.items() <= software().items()
    if run["git_commit"]:
        assert run["git_commit"].startswith(software()["commit"].removesuffix("-dirty"))
    assert json.loads(json.dumps(run)) == run


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not say")
def test_instruction_sets_are_those_that_the_kernels_find() -> None:
    found = environment.machine()["instruction_sets"]
    if len(cpu.available_kernels()) > 1:
        assert ("avx2" in found) == ("avx2" in cpu.available_kernels())
        assert ("avx512bw" in found and "avx512dq" in found) == ("avx512" in cpu.available_kernels())


def test_what_is_not_installed_is_none() -> None:
    assert environment.versions(["numpy", "no-such-package"])["no-such-package"] is None


def test_the_machine_is_printed_without_any_package() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "gspn_dit" / "environment.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("platform", "processor", "instructions", "cores", "memory")
    ]
    assert done.stdout.splitlines() == environment.machine_lines(environment.machine())

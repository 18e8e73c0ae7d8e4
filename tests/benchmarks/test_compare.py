"""`python -m benchmarks compare`: timings are matched by name, and slower means beyond the spread."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import compare, timings


def timing(best: float, spread: float = 0.1) -> dict[str, float]:
    return {"best_ms": best, "median_ms": best * (1 + spread), "spread": spread}


def test_timings_are_named_by_what_they_measure_not_by_their_place() -> None:
    first = {"rows": [{"shape": [1, 2], "forward": timing(1.0)}, {"shape": [3, 4], "forward": timing(2.0)}]}
    swapped = {"rows": first["rows"][::-1]}
    assert dict(timings(first)) == dict(timings(swapped))
    assert set(dict(timings(first))) == {"rows[shape [1, 2]]/forward", "rows[shape [3, 4]]/forward"}


def test_slower_means_beyond_the_larger_spread_and_the_tolerance() -> None:
    before = {"a": timing(10.0, 0.1), "b": timing(10.0, 0.02), "c": timing(10.0), "gone": timing(1.0)}
    after = {"a": timing(11.4, 0.02), "b": timing(11.4, 0.02), "c": timing(5.0), "new": timing(1.0)}
    rows = [(name, round(ratio, 9), slower) for name, ratio, slower in compare(before, after, tolerance=0.05)]
    assert rows == [("a", 1.14, False), ("b", 1.14, True), ("c", 0.5, False)]


def test_a_single_run_is_shown_but_not_judged() -> None:
    before, after = {"a": timing(1.0, 0.0) | {"runs": 1}}, {"a": timing(9.0, 0.0) | {"runs": 3}}
    assert compare(before, after, tolerance=0.05) == [("a", 9.0, False)]
    assert compare(before | {"a": timing(1.0, 0.0) | {"runs": 2}}, after, tolerance=0.05) == [("a", 9.0, True)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "compare", *arguments], capture_output=True, text=True, check=False
    )


def test_exit_codes(tmp_path: Path) -> None:
    files = {"fast": {"a": timing(1.0)}, "slow": {"a": timing(2.0)}, "other": {"b": timing(1.0)}}
    machine = {"kernels": "compiled kernels (AVX2)", "instruction_sets": ["avx2"]}
    for name, tree in files.items():
        (tmp_path / name).write_text(json.dumps({"machine": machine, **tree}))
    fast, slow, other = (str(tmp_path / name) for name in files)
    assert run(slow, fast).returncode == 0
    regression = run(fast, slow)
    assert regression.returncode == 1 and "2.00x  SLOWER" in regression.stdout
    nothing = run(fast, other)
    assert nothing.returncode == 2 and "no timing in common" in nothing.stderr
    missing = run(fast, str(tmp_path / "nowhere"))
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1


def result(path: Path, kernels: str | None, sets: list[str] | None) -> str:
    """A result as a benchmark writes it, with what it says of the processor somewhere inside."""
    facts = {"kernels": kernels, "instruction_sets": sets}
    device = {name: value for name, value in facts.items() if value is not None}
    path.write_text(json.dumps({"runs": [{"device": {"cores": 2, **device}, "scan": timing(1.0)}]}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("before", "after", "differ"),
    [
        (("compiled kernels (AVX2)", ["avx2"]), ("compiled kernels (AVX-512)", ["avx2"]), ("(AVX2)", "(AVX-512)")),
        (("compiled kernels (AVX2)", None), ("compiled kernels (AVX-512)", ["avx2"]), ("(AVX2)", "(AVX-512)")),
        (("compiled kernels (AVX2)", ["avx2"]), ("compiled kernels (AVX2)", ["avx2", "fma"]), ("avx2", "avx2 fma")),
        (("compiled kernels (AVX2)", ["avx2"]), ("compiled kernels (AVX2)", ["avx2"]), None),
    ],
)
def test_results_of_other_instruction_sets_are_not_compared(
    tmp_path: Path, before: tuple, after: tuple, differ: tuple[str, str] | None
) -> None:
    paths = [result(tmp_path / "before.json", *before), result(tmp_path / "after.json", *after)]
    done = run(*paths)
    if differ is None:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert f"before.json was measured with {'compiled kernels ' * ('(' in differ[0])}{differ[0]}, " in done.stderr
    assert f"{differ[1]}: another machine is no regression" in done.stderr
    assert run(*paths, "--across-instruction-sets").returncode == 0


KNOWN = ("compiled kernels (AVX2)", ["avx2"])


@pytest.mark.parametrize(
    ("before", "after", "unknown"),
    [
        ((None, None), KNOWN, "before.json"),
        (("compiled kernels (AVX2)", None), KNOWN, "before.json"),
        (KNOWN, ("compiled kernels (AVX2)", []), "after.json"),
        (KNOWN, (None, None), "after.json"),
    ],
)
def test_results_of_unknown_instruction_sets_are_not_compared(
    tmp_path: Path, before: tuple, after: tuple, unknown: str
) -> None:
    paths = [result(tmp_path / "before.json", *before), result(tmp_path / "after.json", *after)]
    done = run(*paths)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
    assert f"{unknown} does not say which instruction sets it was measured with; measure both on one" in done.stderr
    assert run(*paths, "--across-instruction-sets").returncode == 0

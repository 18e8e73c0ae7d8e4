"""Settle in ten minutes on one GPU what no CPU can say: correctness, times, models, beside what was estimated.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json        # or: make gpu
    python -m benchmarks.gpu --rehearse --out runs/gpu.json          # the same steps on a CPU, at tiny sizes

It needs torch, CuPy, numpy, pytest and safetensors. Every step is a process of its own under a time limit, so that one
that hangs costs a minute; the report is written after each, and as a page beside it (`gpu.md`). With the kernels and
estimates that `python -m benchmarks.gpu_cache` left in CUPY_CACHE_DIR nothing is compiled on the GPU's time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gspn_dit.errors import ArgumentParser, UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 590.0
"""Seconds of all steps together."""


@dataclass(frozen=True)
class Step:
    """One step: how long it may take, and what runs in its process."""

    seconds: float
    run: Callable[[Any], dict[str, Any]]


def steps() -> dict[str, Step]:
    """The steps by name, in order: what everything else hangs on comes first."""
    from benchmarks import gpu_steps

    found = {"machine": Step(60, gpu_steps.machine)}
    for regime in gpu_steps.REGIMES:
        found[f"correctness, {regime}"] = Step(60, partial(gpu_steps.correctness, regime=regime))
    found["correctness, projected"] = Step(90, gpu_steps.projected)
    found["tests"] = Step(120, gpu_steps.tests)
    for shape in gpu_steps.TIMED_SHAPES:
        found[f"times, {'x'.join(map(str, shape))}"] = Step(60, partial(gpu_steps.times, shape=shape))
    for name in gpu_steps.MODELS:
        found[f"model, {name}"] = Step(90, partial(gpu_steps.models, name=name))
    for name in ("compute-sanitizer", "ncu"):
        found[name] = Step(60, partial(gpu_steps.tool, name=name))
    return found


def run_step(name: str, seconds: float, rehearse: bool) -> dict[str, Any]:
    """Run a step in a process of its own; return its result, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--step", name, *(["--rehearse"] if rehearse else [])]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"status": "timed out", "seconds": round(seconds, 1)}
    taken = {"seconds": round(time.monotonic() - began, 1)}
    if process.returncode:
        return {"status": "failed", **taken, "why": err.strip()[-2000:]}
    result = json.loads(out.strip().splitlines()[-1])
    right = result.get("right", True) and all(
        part.get("right", True) for part in result.values() if isinstance(part, dict)
    )
    return {"status": "done" if right else "wrong", **taken, "result": result}


def page(report: dict[str, Any]) -> str:
    """Write the report for people, in Markdown."""
    lines = ["# The kernels on a GPU", ""]
    if report["rehearsal"]:
        lines += ["A rehearsal on a CPU with the compiled kernels at tiny sizes: nothing here is a measurement.", ""]
    lines += ["| step | outcome | seconds | what it says |", "| --- | --- | --- | --- |"]
    for name, step in report["steps"].items():
        said = " ".join((step.get("why") or json.dumps(step.get("result", {}))).split()).replace("|", "/")
        lines.append(f"| {name} | {step['status']} | {step['seconds']} | {said[:300]} |")
    columns = ["[B, H, W, C], bfloat16", "forward", "of a copy", "both passes", "of a copy", "attention", "estimate"]
    lines += ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [_times(step["result"]) for step in report["steps"].values() if "estimate" in step.get("result", {})]
    return "\n".join([*lines, "", "Times in milliseconds."]) + "\n"


def _times(result: dict[str, Any]) -> str:
    forward, both = result["forward"], result.get("forward_backward", {})
    attention, estimate = result.get("attention") or {}, result["estimate"]
    cells = [result["shape"], forward.get("best_ms"), forward.get("share_of_copy")]
    cells += [both.get("best_ms"), both.get("share_of_copy"), attention.get("best_ms")]
    cells += [round(sum(estimate.values()), 4) if estimate else None]
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def write(report: dict[str, Any], out: Path) -> None:
    """Write the JSON, and the page beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(report), encoding="utf-8")


def session(options: Any) -> dict[str, Any]:
    """Run all steps within the budget, and write the report after each."""
    from benchmarks.measure import software

    began, out = time.monotonic(), Path(options.out)
    report: dict[str, Any] = {"rehearsal": options.rehearse, "software": software(), "steps": {}}
    for name, step in steps().items():
        left = BUDGET - (time.monotonic() - began)
        if options.only and not any(word in name for word in options.only):
            continue
        if left < 5:
            report["steps"][name] = {"status": "skipped", "seconds": 0, "why": "the time is up"}
        else:
            report["steps"][name] = run_step(name, min(step.seconds, left), options.rehearse)
        print(f"{name}: {report['steps'][name]['status']}, {report['steps'][name]['seconds']} s", flush=True)
        write(report, out)
    return report


def main() -> None:
    """Run the session, or one step of it."""
    parser = ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/gpu.json", help="the report; its page lies beside it")
    parser.add_argument("--rehearse", action="store_true", help="on this CPU, with the kernels' PTX, at tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only steps whose names hold one of these")
    parser.add_argument("--step", metavar="NAME", help="run one step in this process (used by the session itself)")
    options = parser.parse_args()
    if options.step:
        from benchmarks import gpu_steps

        if options.step not in steps():
            raise UserError(f"there is no step '{options.step}'; the steps are {', '.join(steps())}")
        result = steps()[options.step].run(gpu_steps.rehearsal() if options.rehearse else gpu_steps.gpu())
        print(json.dumps(result))
        return
    if not options.rehearse:
        from benchmarks.gpu_steps import gpu

        gpu()  # one line, before any step, where there is no GPU
    report = session(options)
    outcomes = [step["status"] for step in report["steps"].values()]
    print(f"{options.out}: {outcomes.count('done')} of {len(outcomes)} steps done and right")
    sys.exit(0 if all(outcome == "done" for outcome in outcomes) else 1)


if __name__ == "__main__":
    run_cli(main)

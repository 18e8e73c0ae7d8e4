"""What a classifier's accuracy was, by steps and by minutes of a processor.

    python train.py --config configs/fashion_classify.yaml --training.max_steps 20000 --output_dir runs/fashion/long
    python -m benchmarks.learning_curve --run runs/fashion/long --out benchmarks/results/classification_long.json

The run is read, and the time of its training step measured on one thread by the processor's time, so that what else
the machine did while it trained counts for nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import calibration
from benchmarks.markdown import provenance, table
from benchmarks.measure import CpuDevice, software
from benchmarks.output import publish
from benchmarks.study import commit
from gspn_dit.errors import ArgumentParser, UserError, run_cli

ROUNDS = 22
SHOWN = 10
"""Rows of the table, at most."""


def validated(run: Path) -> list[dict[str, Any]]:
    """Return "step", "val_top1" and "val_loss" of each validation of a run, the last of each step."""
    file = run / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"{run} is no run: metrics.jsonl is missing; give the output_dir of a training")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {
        row["step"]: {key: row[key] for key in ("step", "val_top1", "val_loss")} for row in rows if "val_top1" in row
    }
    if not found:
        raise UserError(f"{run} has no validation with a top-1 accuracy; give a run of task classification")
    return [found[step] for step in sorted(found)]


def curve(run: Path) -> dict[str, Any]:
    """Return a run's validations, each with its minutes, and what a step takes."""
    from gspn_dit.config import load_config

    rows, config = validated(run), load_config(run / "config.yaml")
    words = ["--config", str(run / "config.yaml"), "--training.trackers", "[]"]
    with tempfile.TemporaryDirectory() as place:
        taken = calibration.milliseconds_per_step({"run": words}, Path(place), ROUNDS, time.process_time)["run"]
    return {
        "model": config.model.name,
        "batch_size": config.training.batch_size,
        "steps": config.training.max_steps,
        "processor_milliseconds_per_step": taken,
        "curve": [{**row, "processor_minutes": row["step"] * taken / 6e4} for row in rows],
        "commit": commit(run),
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def curve_table(result: dict[str, Any]) -> str:
    """Tabulate a curve: at most `SHOWN` evenly spaced rows, the last one with them."""
    every = -(-len(result["curve"]) // SHOWN)
    shown = result["curve"][::-1][::every][::-1]
    rows = [
        [
            f"{row['step']:,}",
            f"{row['processor_minutes']:.1f}",
            f"{100 * row['val_top1']:.2f}",
            f"{row['val_loss']:.3f}",
        ]
        for row in shown
    ]
    taken = result["processor_milliseconds_per_step"]
    return (
        table(["steps", "minutes of one thread", "top-1, %", "cross-entropy"], rows)
        + f"\n{result['model']}, one seed, averaged weights; {taken:.0f} ms a step of {result['batch_size']} images. "
        + f"Trained at {result['commit']}. {provenance(result)}\n"
    )


def main() -> None:
    """Read a run and print its curve."""
    parser = ArgumentParser(prog="benchmarks.learning_curve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="of task classification")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args()
    publish(curve(options.run), options.out)


if __name__ == "__main__":
    run_cli(main)

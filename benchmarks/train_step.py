"""Where the time of a training step goes, and what the loop adds to forward, backward and optimiser.

    python -m benchmarks.train_step --config configs/demo.yaml --steps 50 --out benchmarks/results/train_step.json

Drawing by sample number, loading the batch, the EMA and the counters are the overhead; figures are medians over steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, run_cli

WARM_UP_STEPS = 5


class Stopwatch:
    """Adds up the seconds spent inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(config_path: str, steps: int) -> dict[str, Any]:
    """Run training steps of a config in a temporary directory and return the split of their time."""
    import dataclasses

    from benchmarks.measure import CpuDevice, milliseconds, software
    from gspn_dit.config import load_config
    from gspn_dit.tasks import create_task
    from gspn_dit.training import loop
    from gspn_dit.training.run_directory import RunDirectory

    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(load_config(config_path), output_dir=folder)
        task = create_task(config)
        trainer = loop.Trainer(config, task, loop.create_accelerator(config), RunDirectory(Path(folder), None))
        watches = {name: Stopwatch() for name in ("forward", "backward", "optimizer")}
        task.loss = watches["forward"].wrap(task.loss)  # type: ignore[method-assign]
        strategy = trainer.state.strategy
        strategy.backward = watches["backward"].wrap(strategy.backward)  # type: ignore[method-assign]
        strategy.step = watches["optimizer"].wrap(strategy.step)  # type: ignore[method-assign]
        rows = []
        for _ in range(WARM_UP_STEPS + steps):
            before = {name: watch.seconds for name, watch in watches.items()}
            began = time.perf_counter()
            trainer.train_step()
            total = time.perf_counter() - began
            parts_of_step = {name: watch.seconds - before[name] for name, watch in watches.items()}
            rows.append({"total": total, **parts_of_step, "overhead": total - sum(parts_of_step.values())})
    rows = rows[WARM_UP_STEPS:]
    shares = [row["overhead"] / row["total"] for row in rows]
    return {
        "config": config_path,
        "steps": steps,
        "timings": {key: milliseconds([row[key] for row in rows]) for key in rows[0]},
        "overhead_share": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "target": "median overhead_share <= 0.05",
        "met": statistics.median(shares) <= 0.05,
        "machine": CpuDevice().describe(),
        "software": software(),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    publish(measure(options.config, options.steps), options.out)


if __name__ == "__main__":
    run_cli(main)

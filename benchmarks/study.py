"""What studies of trainings have in common: cells in processes of their own, facts measured once, intervals of pairs.

A study is many runs of `train.py` whose figures are compared. It can be stopped and started again: what is done is
kept, what was interrupted resumes, and a run that was trained with other settings is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gspn_dit.errors import UserError
from gspn_dit.files import cannot_hold

ROOT = Path(__file__).resolve().parents[1]


def check_jobs_and_places(options: argparse.Namespace) -> None:
    """Raise UserError for --jobs below 1, or a --work or --out that cannot be written to, before hours of trainings."""
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}, but must be at least 1")
    for flag, path in (("--work", options.work), ("--out", options.out)):
        if path is not None and (problem := cannot_hold(path)):
            raise UserError(f"{flag} {problem}")


def call(arguments: Sequence[str], log: Path) -> None:
    """Run Python with these arguments on one thread, in the repository, and append what it prints to a file.

    Raises:
        UserError: it failed; the message names the file.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False, cwd=ROOT)
    if done.returncode:
        raise UserError(f"{' '.join(arguments[:3])} … failed with exit code {done.returncode}; see {log}")


def train(arguments: Sequence[str], run: Path) -> dict[str, Any]:
    """Train a run to its end, unless it is there, and return the last value of each of its metrics.

    Args:
        arguments: of `train.py`, but for the run's directory.
        run: the run's directory; what the training prints goes to `RUN.log` beside it.

    Returns:
        The metrics by name; "step" is the last step, "commit" what the run was trained by.

    Raises:
        UserError: the directory was trained with other settings, or training fails.
    """
    from gspn_dit.config import load_config, parse_train_arguments

    run = run.absolute()
    words = [*arguments, "--output_dir", str(run)]
    config = parse_train_arguments(words).config
    if (run / "config.yaml").exists() and load_config(run / "config.yaml") != config:
        raise UserError(f"{run} was trained with other settings; delete it to train it anew")
    if last_metrics(run).get("step", 0) < config.training.max_steps:
        call(["train.py", *words, "--resume", "auto"], run.with_name(f"{run.name}.log"))
    return {**last_metrics(run), "commit": commit(run)}


def last_metrics(run: Path) -> dict[str, Any]:
    """Return the last value of each metric that a run has logged; empty before the first."""
    file, found = run / "metrics.jsonl", {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        found |= json.loads(line)
    return found


def commit(run: Path) -> str:
    """Return the commit that a run was last started at; "-dirty" behind it if files had been changed."""
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return f"{environment['git_commit'] or 'unknown'}"[:7] + ("-dirty" if environment["git_changes"] else "")


def once(file: Path, measure: Callable[[], Any]) -> Any:
    """Return what a file holds as JSON; where it is not there, measure that first and keep it."""
    if not file.exists():
        found = json.dumps(measure(), indent=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(found, encoding="utf-8")
        partial.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def best_rate(losses: Mapping[float, float]) -> dict[str, Any]:
    """Return the learning rate of the lowest loss, and whether it is the lowest or highest rate of those tried."""
    best = min(losses, key=lambda rate: losses[rate])
    return {"losses": dict(losses), "best": best, "at_an_end": best in (min(losses), max(losses))}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return mean and 95% interval of a handful of values (Student's t)."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = math.nan
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def paired_ratio(rows: Sequence[Mapping[str, Any]], metric: str, variant: str, baseline: str) -> dict[str, float]:
    """Return the geometric mean of variant / baseline over the seeds both have, with its 95% interval.

    Args:
        rows: figures of cells with their "variant" and "seed".
        metric: key of the figure, positive.
        variant: whose figures are divided.
        baseline: by whose.
    """
    tried, known = (
        {row["seed"]: row[metric] for row in rows if row["variant"] == name} for name in (variant, baseline)
    )
    logs = interval([math.log(tried[seed] / known[seed]) for seed in sorted(set(tried) & set(known))])
    return {key: math.exp(value) for key, value in logs.items()} | {"pairs": len(set(tried) & set(known))}


def paired_p(rows: Sequence[Mapping[str, Any]], metric: str, variant: str, baseline: str) -> float:
    """Return the two-sided p-value of a ratio of 1: Student's t over the logarithms that `paired_ratio` averages.

    It is 1 for fewer than two pairs, which show nothing.
    """
    from scipy.stats import ttest_1samp

    tried, known = (
        {row["seed"]: row[metric] for row in rows if row["variant"] == name} for name in (variant, baseline)
    )
    logs = [math.log(tried[seed] / known[seed]) for seed in sorted(set(tried) & set(known))]
    if len(logs) < 2 or not any(logs):
        return 1.0
    return float(ttest_1samp(logs, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for all of them together, in their order (Holm, Scand. J. Statist. 6, 1979).

    The k-th smallest of n is multiplied by n - k + 1; none is below a smaller one's, and none is above 1.
    """
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected

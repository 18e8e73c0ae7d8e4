"""The directory of a run: who may write into it, what it records, and how a resumed run finds its place."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspn_dit.checkpoint import find_checkpoints, find_incomplete, read_manifest, resolve_checkpoint
from gspn_dit.config import Config, flatten, save_config
from gspn_dit.config.yaml_files import read_mapping
from gspn_dit.environment import describe_run
from gspn_dit.errors import UserError
from gspn_dit.locks import is_filled
from gspn_dit.training.post_hoc_ema import remove_snapshots_after

FOLDERS = ("checkpoints", "samples", "report", "ema_snapshots", "ema")
WRITTEN = (
    *("checkpoints/step-*", "samples/step-*.png", "ema_snapshots/step-*", "ema/ema-*", "trackers"),
    *("report/report.json", "report/report.md", "report/index.html", "report/grid.png"),
    *("environment.json", "metrics.jsonl", "index.html", "config.yaml"),
)
"""What a run and its report leave in the directory, and all that `--overwrite` deletes; what proves a run is last."""

_INTERVALS = ("log_every", "checkpoint_every", "sample_every", "validate_every", "ema_snapshot_every", "fd_every")
MAY_DIFFER = (
    *("output_dir", "data.path", "latent.vae", "latent.check", "training.repa_features"),
    *("training.max_steps", *(f"training.{name}" for name in _INTERVALS)),
    *("training.keep_last", "training.keep_every", "training.trackers"),
    *("training.fd_samples", "training.fd_features"),
    *("training.num_processes", "training.cpu_threads", "training.sharding"),
)
"""Config keys that a resumed run may change: paths, what is refused, length and intervals, what is kept and tracked,
how a quick FD is measured, processes and sharding."""


def newest_grid(run: Path) -> Path | None:
    """Return the newest preview of a run, None where there is none."""
    return max((run / "samples").glob("step-*.png"), default=None)


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, and the checkpoint it continues from, if any."""

    path: Path
    checkpoint: Path | None
    ignored: dict[int, str] = field(default_factory=dict)
    """Newer checkpoints that are not complete: step and what is wrong."""

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def begin(self, config: Config, overwrite: bool) -> None:
        """Create or clear the directory, cut the metrics back to the checkpoint, record config and environment."""
        if overwrite:
            _delete_run(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, self.path / "config.yaml")
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error}") from None
        step = read_manifest(self.checkpoint)["step"] if self.checkpoint else 0
        _cut_metrics(self.metrics, step)
        remove_snapshots_after(self.path, step)
        _remove_grids_after(self.path, step)
        self._record_environment(step)
        for ignored, problem in self.ignored.items():
            print(f"checkpoint of step {ignored} is ignored: {problem}; going on from step {step}")

    def _record_environment(self, step: int) -> None:
        """Write what the run started with; a resumed run adds what it continues with under "resumed"."""
        path = self.path / "environment.json"
        environment = describe_run()
        if self.checkpoint is not None and path.exists():
            first = json.loads(path.read_text(encoding="utf-8"))
            first.setdefault("resumed", []).append({"step": step, **environment})
            environment = first
        path.write_text(json.dumps(environment, indent=2), encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


def _delete_run(path: Path) -> None:
    """Delete what a run wrote; what else lies in its folders stays."""
    for pattern in WRITTEN:
        for target in path.glob(pattern):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()
    for name in FOLDERS:
        with contextlib.suppress(OSError):  # not empty, not there, or a link
            (path / name).rmdir()


def _refuse_to_delete(path: Path) -> None:
    """Raise UserError unless all that `--overwrite` would delete is provably of a run: its config says so."""
    written = [target for pattern in WRITTEN for target in path.glob(pattern)]
    keys: set[str] = set()
    with contextlib.suppress(UserError):
        keys = set(read_mapping(path / "config.yaml", lambda key: True))
    if written and not {"output_dir", "seed", "model", "data", "training"} <= keys:
        raise UserError(
            f"output_dir {path} holds {written[0].relative_to(path)}, but no run of this project, whose config.yaml "
            "would prove it; --overwrite deletes runs only, give another output_dir"
        )


def _remove_grids_after(path: Path, step: int) -> None:
    """Delete the sample grids of steps that the run will take again."""
    for grid in path.glob("samples/step-*.png"):
        number = grid.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            grid.unlink()


def open_run_directory(config: Config, resume: str | None, overwrite: bool) -> RunDirectory:
    """Decide where a run starts; nothing is written yet.

    Raises UserError if output_dir holds something and neither `--resume` nor `--overwrite` says what to do with it,
    or if the checkpoint to resume belongs to another config.
    """
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file; give a directory")
    if resume is not None and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    filled = is_filled(path)
    if resume is None:
        if filled and not overwrite:
            raise UserError(
                f"output_dir {path} is not empty; give --resume auto to continue it, --overwrite to start afresh, "
                "or another output_dir"
            )
        _refuse_to_delete(path)
        return RunDirectory(path, None)
    if filled and not (path / "config.yaml").exists():
        raise UserError(f"output_dir {path} is not empty and holds no run to resume; give another output_dir")
    checkpoint = _newest_to_resume(path) if resume == "auto" else _named_to_resume(path, resume, filled)
    if checkpoint is None:
        return RunDirectory(path, None)
    manifest = read_manifest(checkpoint)
    _check_same_run(config, manifest["config"], checkpoint)
    ignored = {step: problem for step, problem in find_incomplete(path).items() if step > manifest["step"]}
    return RunDirectory(path, checkpoint, ignored)


def _newest_to_resume(path: Path) -> Path | None:
    """Return the newest complete checkpoint; raise UserError rather than start afresh over damaged ones."""
    complete, incomplete = find_checkpoints(path), find_incomplete(path)
    later_format = [step for step, problem in incomplete.items() if "format_version" in problem]
    if incomplete and (not complete or later_format):
        step = max(later_format or incomplete)
        raise UserError(
            f"no checkpoint of {path} can be resumed: that of step {step} is not usable, {incomplete[step]}; "
            "restore it, or give --overwrite to start afresh"
        )
    return complete[max(complete)] if complete else None


def _named_to_resume(path: Path, resume: str, filled: bool) -> Path:
    """Return the checkpoint that --resume names; raise UserError if output_dir holds another run, or goes beyond it."""
    checkpoint = resolve_checkpoint(resume)
    manifest, complete = read_manifest(checkpoint), find_checkpoints(path)
    step = manifest["step"]
    if "losses_since_log" not in manifest or "model.safetensors" not in manifest["files"]:
        raise UserError(
            f"--resume {resume} has weights but no training state (it was converted, or averaged afterwards); "
            "give it as training.initialize_from to start from its weights"
        )
    if filled and checkpoint.resolve().parent.parent != path.resolve():
        raise UserError(f"--resume {resume} is not of the run in {path}, which is not empty; give another output_dir")
    if complete and max(complete) > step:
        raise UserError(
            f"--resume {resume} is at step {step}, but {path} goes on to step {max(complete)}; "
            "give another output_dir to branch off"
        )
    return checkpoint


def _check_same_run(config: Config, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise UserError naming the first key that a resumed run may not change."""
    # A key that an older version did not know had the effect of today's default.
    before, now = ({**dict(flatten(Config().to_dict())), **dict(flatten(tree))} for tree in (saved, config.to_dict()))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and key not in MAY_DIFFER:
            raise UserError(
                f"{checkpoint} was trained with {key} = {before.get(key)}, this run has {now.get(key)}; "
                "restore it, or start afresh in another output_dir"
            )


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)

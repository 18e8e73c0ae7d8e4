"""Post-hoc EMA: snapshots of power-function averages, and the average of another length that they add up to.

    python -m gspn_dit.training.ema --sigma-rel 0.1 RUN

writes the weights that an average of this relative length would have had (arXiv 2312.02696, section 3.2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.checkpoint import (
    find_checkpoints,
    load_tensors,
    read_manifest,
    write_checkpoint,
    write_tensors,
)
from gspn_dit.errors import ArgumentParser, UserError
from gspn_dit.files import write_atomically
from gspn_dit.paths import path_argument

SNAPSHOT_FORMAT_VERSION = 1
FOLDER = "ema_snapshots"
MAX_SIGMA_REL = 0.28
"""Relative lengths stay below 12^-1/2, that of the plain mean of all steps."""
OF_ONE_CHECKPOINT = ("format_version", "step", "files")
"""Keys of a manifest that each checkpoint has for itself."""
MAX_PROFILE_ERROR = 0.1
"""Relative error of a profile above which no weights are written: the snapshots are too few, or too short."""


def ema_file_stem(sigma_rel: float) -> str:
    """Return the name of the file of an average of this relative length, without suffix."""
    return f"ema-{sigma_rel:.3f}"


def power_exponent(sigma_rel: float) -> float:
    """Return the exponent γ of the profile with this relative standard deviation (arXiv 2312.02696, appendix C).

    σ_rel = (γ+1)^½ (γ+2)^-1 (γ+3)^-½, which is the largest real root of a cubic in γ.
    """
    inverse_square = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


@dataclass(frozen=True)
class Snapshot:
    """A power-function average on disk."""

    path: Path
    step: int
    sigma_rel: float


def save_snapshot(run_directory: Path, step: int, sigma_rel: float, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Write an average of a step; `dtype` is "float16" or "float32"."""
    stored = {name: tensor.to("cpu", getattr(torch, dtype)) for name, tensor in tensors.items()}
    facts = {"format_version": SNAPSHOT_FORMAT_VERSION, "step": step, "sigma_rel": sigma_rel}
    path = run_directory / FOLDER / f"step-{step:08d}-{ema_file_stem(sigma_rel)}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, stored, write_atomically, {"snapshot": json.dumps(facts)})
    except OSError as error:
        raise UserError(f"cannot save {path}: {error}") from error


def find_snapshots(run_directory: Path) -> list[Snapshot]:
    """Return the snapshots of a run by step; raises UserError for one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in sorted((run_directory / FOLDER).glob("step-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["snapshot"])
            found.append(Snapshot(path, int(facts["step"]), float(facts["sigma_rel"])))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is not a snapshot of an average: {error}; delete it") from None
    return found


def remove_snapshots_after(run_directory: Path, step: int) -> None:
    """Delete the snapshots that a resumed run will write again."""
    for snapshot in find_snapshots(run_directory):
        if snapshot.step > step:
            snapshot.path.unlink()


def profile_products(times: Sequence[float], exponents: Sequence[float], time: float, exponent: float) -> np.ndarray:
    """Return the inner products of profiles with one other: ∫ p_i(τ) p(τ) dτ, where p(τ) = (γ+1) τ^γ / t^(γ+1)."""
    t, g = np.asarray(times, dtype=np.float64), np.asarray(exponents, dtype=np.float64)
    shorter = np.minimum(t, time)
    ratio = (shorter / t) ** g * (shorter / time) ** exponent * shorter / (t * time)
    return (g + 1) * (exponent + 1) / (g + exponent + 1) * ratio


def reconstruction_weights(
    times: Sequence[float], exponents: Sequence[float], time: float, exponent: float
) -> tuple[np.ndarray, float]:
    """Return how to add up snapshots to come closest to another profile, in the least squares of profiles.

    The weights sum to 1, so that what did not change in training does not change here.

    Args:
        times: updates at which each snapshot was taken.
        exponents: γ of each snapshot.
        time, exponent: the profile that is wanted.

    Returns:
        Float64 weights, one per snapshot, and the relative error ‖fit - wanted‖ / ‖wanted‖ of the profile.
    """
    pairs = list(zip(times, exponents, strict=True))
    gram = np.stack([profile_products(times, exponents, t, g) for t, g in pairs])
    wanted = profile_products(times, exponents, time, exponent)
    # Snapshots that lie close together make the system stiff: scaled to unit profiles it is solved to full precision.
    scale = np.sqrt(np.diag(gram))
    sides = np.stack([wanted, np.ones_like(wanted)], axis=1) / scale[:, None]
    fit, ones = np.linalg.lstsq(gram / np.outer(scale, scale), sides, rcond=None)[0].T / scale
    weights = fit + ones * (1 - fit.sum()) / ones.sum()  # the nearest fit that leaves constant weights as they are
    norm = float(profile_products([time], [exponent], time, exponent)[0])
    residual = norm - 2 * weights @ wanted + weights @ gram @ weights
    return weights, float(np.sqrt(max(residual, 0.0) / norm))


def combine(snapshots: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return Σ weight · tensors by name, added up in float64 and rounded to float32; one snapshot is held at a time."""
    total: dict[str, Tensor] = {}
    for weight, tensors in snapshots:
        for name, tensor in tensors.items():
            total.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64)).add_(tensor.double(), alpha=weight)
    return {name: tensor.float() for name, tensor in total.items()}


def reconstruct(snapshots: list[Snapshot], sigma_rel: float, step: int) -> tuple[dict[str, Tensor], float]:
    """Return the average of relative length `sigma_rel` at a step, and the relative error of its profile.

    Snapshots after `step` do not count. The least squares are those of arXiv 2312.02696, appendix C.
    """
    from safetensors.torch import load_file

    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    exponents = [power_exponent(snapshot.sigma_rel) for snapshot in used]
    weights, error = reconstruction_weights([s.step for s in used], exponents, step, power_exponent(sigma_rel))

    def weighted() -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        for snapshot, weight in zip(used, weights, strict=True):
            yield float(weight), load_file(snapshot.path)

    return combine(weighted()), error


def write_reconstruction(
    run_directory: Path, sigma_rel: float, step: int | None, out: Path | None
) -> tuple[Path, float]:
    """Write a checkpoint whose EMA weights are the reconstructed ones; return where, and the profile's error.

    Raises UserError if the run has no snapshots for it, or `out` exists.
    """
    if not run_directory.is_dir():
        raise UserError(f"run directory {run_directory} does not exist")
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise UserError(f"--sigma-rel is {sigma_rel}, but must lie in (0, {MAX_SIGMA_REL}]")
    snapshots, checkpoints = find_snapshots(run_directory), find_checkpoints(run_directory)
    if not snapshots or not checkpoints:
        missing = "checkpoints" if snapshots else "snapshots"
        raise UserError(f"{run_directory} has no {missing} of averages; train with training.ema_sigma_rel: [0.05, 0.1]")
    step = _step_within(snapshots, step)
    out = out or run_directory / "ema" / f"{ema_file_stem(sigma_rel)}-step-{step:08d}"
    if out.exists():
        raise UserError(f"{out} exists; delete it, or give another --out")
    tensors, error = reconstruct(snapshots, sigma_rel, step)
    if error > MAX_PROFILE_ERROR:
        raise UserError(
            f"no sum of the snapshots of {run_directory} up to step {step} comes near --sigma-rel {sigma_rel} "
            f"(profile error {error:.0%}); choose a length nearer to "
            f"{', '.join(f'{x:g}' for x in sorted({s.sigma_rel for s in snapshots}))}, or a step of a snapshot"
        )
    facts = {"sigma_rel": sigma_rel, "updates": step, "post_hoc": True, "profile_error": error}
    _write_like(checkpoints[max(checkpoints)], out, step, tensors, facts)
    return out, error


def _step_within(snapshots: Sequence[Snapshot], step: int | None) -> int:
    """Return a step that snapshots lead up to, that of the newest one for None; raises UserError for another."""
    steps = [snapshot.step for snapshot in snapshots]
    if step is not None and not min(steps) <= step <= max(steps):
        raise UserError(f"--step is {step}, but the snapshots are of steps {min(steps)} to {max(steps)}")
    return max(steps) if step is None else step


def _write_like(checkpoint: Path, out: Path, step: int, averages: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint of averaged weights alone; buffers, and what else is known of the model, are another's."""
    manifest = {key: value for key, value in read_manifest(checkpoint).items() if key not in OF_ONE_CHECKPOINT}
    write_checkpoint(out, step, {"ema": {**load_tensors(checkpoint, "ema"), **averages}}, {**manifest, "ema": facts})


def main() -> None:
    """Parse the command line of `python -m gspn_dit.training.ema`, reconstruct and write."""
    parser = ArgumentParser(
        prog="python -m gspn_dit.training.ema",
        description="Make the average of another length from the snapshots of a run (training.ema_sigma_rel).",
    )
    parser.add_argument("run", metavar="RUN", type=path_argument, help="run directory")
    parser.add_argument("--sigma-rel", type=float, required=True, help="relative length, such as 0.1")
    parser.add_argument("--step", type=int, help="step of the average (default: of the newest snapshot)")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="default: RUN/ema/ema-<sigma_rel>-step-<step>")
    options = parser.parse_args()
    out, error = write_reconstruction(
        Path(options.run), options.sigma_rel, options.step, Path(options.out) if options.out else None
    )
    print(f"average of relative length {options.sigma_rel:g}, profile error {error:.2%}: {out}")
    print(f"use it as a checkpoint: sample.py --checkpoint {out}")

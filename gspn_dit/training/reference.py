"""Reference curves: what finished runs of a shipped config logged, to tell whether one's own run is where it should be.

    python -m gspn_dit.training.reference --config configs/demo.yaml RUN [RUN …]

records the first run's curves and its newest preview, made small, and a band for the loss from all of them, in the
package. A run page draws them behind and beside those of a run of the same settings on the same data, and training ends
by comparing the loss with the band.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gspn_dit.checkpoint import find_checkpoints, read_manifest
from gspn_dit.config import Config, flatten
from gspn_dit.errors import UserError, run_cli
from gspn_dit.training.charts import Curve, read_metrics
from gspn_dit.training.run_directory import MAY_DIFFER, newest_grid

FORMAT_VERSION = 1
FOLDER = Path(__file__).parent / "references"
MEASUREMENTS = {
    "quick_fd": {"sampling.steps", "sampling.sampler", "training.fd_samples", "training.fd_features"},
    "val_": {"training.validation_images"},
}
"""What the names of curves begin with that some settings measure, and nothing else depends on."""
MEASURING = frozenset().union(*MEASUREMENTS.values())
IGNORED = (
    {*MAY_DIFFER, "seed", "training.gradient_accumulation_steps", "training.max_nonfinite_steps"}
    | {f"training.{name}" for name in ("mixed_precision", "tf32", "compile", "activation_checkpointing")}
    | {f"training.{name}" for name in ("ema_sigma_rel", "ema_snapshot_dtype")}
    | {f"sampling.{name}" for name in ("guidance_scale", "guidance_interval", "guidance_channels")}
    | {f"sampling.{name}" for name in ("per_class", "max_classes")}
) - {"latent.vae", "training.max_steps", "training.repa_features", *MEASURING}
"""Settings that should not move the curves, those of speed and precision among them: where they do, one wants to see
it. What data.path names is recognised by the data's fingerprint."""
COMPARED = ("loss", "grad_norm", "val_loss", "val_top", "quick_fd")
"""What the names of the curves that are kept begin with; speed and memory are the machine's."""
LAST_SHARE = 0.2
"""Share of the steps, the last ones, whose loss is compared."""
MOST_GRID_BYTES, PALETTE = 60_000, 128
"""Of the picture of a reference: its file, and its colours."""
DEVIATIONS = 3.0
"""Half the band's width, in standard deviations of the logged losses."""


@dataclass(frozen=True)
class Reference:
    """What finished runs of one config logged."""

    config: str
    """Name of the config's file."""
    seeds: tuple[int, ...]
    """Of the runs; the first one's curves are kept."""
    commit: str
    settings: Mapping[str, Any]
    """By key; see `IGNORED`."""
    fingerprint: str
    """Of the training data."""
    curves: Mapping[str, Curve]
    means: tuple[float, ...]
    """Each run's loss over the last steps."""
    low: float
    high: float
    """The band in which the loss of the last steps is expected."""
    grid: Path | None = None
    """A PNG of what the first run drew last, beside the file of the others."""

    @property
    def name(self) -> str:
        """What a person reads of it."""
        return f"{self.config}, seed {self.seeds[0]}, commit {self.commit[:7]}"

    def fitted(self, config: Mapping[str, Any], fingerprint: str | None) -> Reference | None:
        """Return this with the curves that a run of these settings and data should follow, None if it is another run.

        Args:
            config: what `Config.to_dict` gave, or a checkpoint's manifest holds.
            fingerprint: of the training data.
        """
        differing = differing_keys(settings_of(config), {**settings_of({}), **self.settings})
        if fingerprint != self.fingerprint or differing - MEASURING:
            return None
        spoilt = tuple(name for name, keys in MEASUREMENTS.items() if keys & differing)
        curves = {key: curve for key, curve in self.curves.items() if not key.startswith(spoilt)}
        return dataclasses.replace(self, curves=curves)

    def judge(self, loss: Curve) -> str | None:
        """Say whether a finished run's loss lies within the band; None where too little was logged to tell."""
        steps = int(self.settings["training.max_steps"])
        values = last_losses(loss, steps)
        if not values:
            return None
        mean = statistics.fmean(values)
        within = "within" if self.low <= mean <= self.high else "OUTSIDE"
        return (
            f"loss    {mean:.4g} over the last {round(LAST_SHARE * steps):,} steps, {within} the {self.low:.4g} to "
            f"{self.high:.4g} of the reference: {self.name}"
        )


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that matter, by key, of what `Config.to_dict` gave or a manifest holds."""
    # A key that an older version did not know had the effect of today's default.
    every = {**dict(flatten(Config().to_dict())), **dict(flatten(config))}
    return {key: value for key, value in every.items() if key not in IGNORED}


def differing_keys(some: Mapping[str, Any], others: Mapping[str, Any]) -> set[str]:
    """Return the keys whose values are not the same in both."""
    return {key for key in {*some, *others} if some.get(key) != others.get(key)}


def last_losses(loss: Curve, steps: int) -> list[float]:
    """Return the logged losses, each a mean over the steps since the line before, of the last steps alone."""
    first = (1 - LAST_SHARE) * steps
    return [y for (before, _), (_, y) in itertools.pairwise([(0.0, 0.0), *loss]) if before >= first]


def read_reference(path: Path) -> Reference:
    """Read a reference; raises ValueError for what is none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} has another format_version than {FORMAT_VERSION}")
        held["curves"] = {key: [(x, y) for x, y in curve] for key, curve in held["curves"].items()}
        grid = path.with_suffix(".png")
        held |= {"seeds": tuple(held["seeds"]), "means": tuple(held["means"]), "grid": grid if grid.exists() else None}
        reference = Reference(**held)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no reference: {error}") from error
    if not reference.low < reference.high or not reference.curves.get("loss"):
        raise ValueError(f"{path} has no curve or band of the loss")
    return reference


def find_reference(config: Mapping[str, Any], fingerprint: str | None) -> Reference | None:
    """Return the reference that fits a run, None where there is none; see `Reference.fitted`."""
    for path in sorted(FOLDER.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # a damaged installation shall not end a run
            if fitted := read_reference(path).fitted(config, fingerprint):
                return fitted
    return None


def newest_manifest(run: Path) -> dict[str, Any] | None:
    """Return the manifest of a run's newest complete checkpoint, None where there is none."""
    found = find_checkpoints(run)
    return read_manifest(found[max(found)]) if found else None


def reference_of(run: Path) -> Reference | None:
    """Return the reference of the run in a directory, as its newest checkpoint tells settings and data."""
    manifest = newest_manifest(run) or {}
    return find_reference(manifest.get("config", {}), manifest.get("data", {}).get("fingerprint"))


def record(config: Config, name: str, runs: Sequence[Path]) -> Reference:
    """Make a reference of finished runs of a config; raises UserError for a run that is not finished or another's."""
    settings = settings_of(config.to_dict())
    manifests = [_finished(run, settings) for run in runs]
    losses = [last_losses(read_metrics(run / "metrics.jsonl")["loss"], config.training.max_steps) for run in runs]
    for run, values in zip(runs, losses):
        if len(values) < 2:
            raise UserError(f"{run} logged too little to tell how much its loss varies; lower training.log_every")
    pooled = list(itertools.chain(*losses))
    mean, width = statistics.fmean(pooled), DEVIATIONS * statistics.stdev(pooled)
    metrics = read_metrics(runs[0] / "metrics.jsonl")
    kept = {key: curve for key, curve in metrics.items() if key.startswith(COMPARED) and key != "quick_fd_samples"}
    return Reference(
        config=name,
        seeds=tuple(manifest["config"]["seed"] for manifest in manifests),
        commit=_commit(runs[0]),
        settings=settings_of(manifests[0]["config"]),
        fingerprint=manifests[0]["data"]["fingerprint"],
        curves={key: [(x, _rounded(y)) for x, y in curve] for key, curve in kept.items()},
        means=tuple(_rounded(statistics.fmean(values)) for values in losses),
        low=_rounded(mean - width),
        high=_rounded(mean + width),
    )


def _finished(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a run's last checkpoint; raises UserError if these are not its settings."""
    manifest = newest_manifest(run)
    if manifest is None or manifest["step"] < settings["training.max_steps"]:
        step = manifest["step"] if manifest else 0
        raise UserError(f"{run} is at step {step} of {settings['training.max_steps']}; let it end by --resume auto")
    own = settings_of(manifest["config"])
    for key in sorted(differing_keys(own, settings) - MEASURING):
        raise UserError(f"{run} has {key} = {own.get(key)}, but the config has {settings.get(key)}; train it anew")
    return manifest


def _commit(run: Path) -> str:
    """Return the commit that a run was trained with; raises UserError where there is none to name."""
    path = run / "environment.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not facts.get("git_commit") or facts.get("git_changes") or facts.get("resumed"):
        raise UserError(f"{run} was not trained in one go by a committed state of the source; train it anew")
    return facts["git_commit"]


def _rounded(value: float) -> float:
    """Return a number with five digits that count, so that files stay small."""
    return float(f"{value:.5g}")


def to_json(reference: Reference) -> str:
    """Return what `read_reference` reads, a line for each setting and curve."""
    values = {"format_version": FORMAT_VERSION, **vars(reference)}
    del values["grid"]

    def lines(value: object) -> str:
        if not isinstance(value, Mapping):
            return json.dumps(value)
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(each)}" for key, each in value.items()) + "\n }"

    return "{\n" + ",\n".join(f' "{key}": {lines(value)}' for key, value in values.items()) + "\n}\n"


def small_picture(path: Path) -> bytes:
    """Return a picture as a PNG of at most `MOST_GRID_BYTES`: of a palette, and smaller where that is not enough."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    for share in (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4):
        size = (max(1, round(share * picture.width)), max(1, round(share * picture.height)))
        memory = io.BytesIO()
        picture.resize(size, Image.Resampling.BOX).quantize(PALETTE).save(memory, "png", optimize=True)
        if memory.tell() <= MOST_GRID_BYTES:
            return memory.getvalue()
    raise UserError(f"{path} is too large for a reference; lower sampling.per_class or sampling.max_classes")


def main() -> None:
    """Record the runs that the command line names."""
    from gspn_dit.config import load_config
    from gspn_dit.errors import ArgumentParser
    from gspn_dit.files import write_whole
    from gspn_dit.paths import path_argument

    parser = ArgumentParser(description="Record finished runs of a config as the reference of later ones.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=path_argument, help="run directories")
    parser.add_argument("--config", type=path_argument, required=True, metavar="FILE", help="the config they follow")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="default: in the package, by --config's name")
    options = parser.parse_args()
    file = Path(options.config)
    out = Path(options.out) if options.out else FOLDER / f"{file.stem}.json"
    reference = record(load_config(file), file.name, [Path(run) for run in options.runs])
    grid = newest_grid(Path(options.runs[0]))
    picture = small_picture(grid) if grid is not None else None
    write_whole(out, to_json(reference).encode())
    out.with_suffix(".png").unlink(missing_ok=True)
    if picture is not None:
        write_whole(out.with_suffix(".png"), picture)
    print(f"{out}: {reference.name}; the loss is expected within {reference.low:.4g} to {reference.high:.4g}")


if __name__ == "__main__":
    run_cli(main)

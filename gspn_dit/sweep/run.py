"""A sweep from its options to its report: rounds of drawing and scoring, the choice, and its score of fresh images."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fid.extraction import extract_all
from fid.images import Reference, read_reference
from fid.intervals import frechet, strata_of
from fid.moments import Gaussian, Moments
from fid.quick import QuickScorer, load_scorer
from gspn_dit.checkpoint import read_manifest, resolve_checkpoint
from gspn_dit.chosen import FILE, FORMAT_VERSION
from gspn_dit.diffusion import CHUNK
from gspn_dit.environment import describe_run
from gspn_dit.errors import UserError
from gspn_dit.files import cannot_hold, sha256_of, write_atomically
from gspn_dit.locks import Lock, is_filled
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.processes import agree, compute_exactly, drawing_job, tell
from gspn_dit.sample import parse_classes
from gspn_dit.sample_sets import check_same_settings, draw_labels
from gspn_dit.sweep.drawing import Drawing, FeatureFiles, Weights
from gspn_dit.sweep.halving import Candidate, Rung, grid, plan, survivors
from gspn_dit.sweep.page import PAGE, page
from gspn_dit.text_sampler import is_text_checkpoint

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

FEATURES, AVERAGES = "features", "averages"
MAY_DIFFER = ("checkpoint", "vae", "environment")
"""Settings that a resumed sweep may change: they name places and machines."""
RESULTS = ("complete", "results", "chosen", "default", "budget")


def run(options: argparse.Namespace) -> None:
    """Sweep in this process or with those that were launched beside it; raises UserError."""
    out = Path(options.out)

    def check() -> None:
        check_place(out, options.resume, options.overwrite)

    with drawing_job(options, CHUNK, check) as (state, device, lock):
        _run_alone(options, out, state, device, lock)


def check_place(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError if a sweep cannot go to a directory."""
    if problem := cannot_hold(out):
        raise UserError(f"--out {problem}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    if not is_filled(out):
        return
    if not (out / FILE).is_file():
        raise UserError(f"--out {out} is not empty and holds no sweep; give another")
    if not (resume or overwrite):
        raise UserError(f"--out {out} holds a sweep; give --resume to continue it, --overwrite to replace it")


def _run_alone(
    options: argparse.Namespace, out: Path, state: PartialState, device: str | torch.device, lock: Lock
) -> None:
    compute_exactly()
    if is_text_checkpoint(options.checkpoint):
        raise UserError(f"{options.checkpoint} draws by prompt; sweeps are for models that draw by class")
    checkpoint = resolve_checkpoint(options.checkpoint)
    weights = Weights(checkpoint, options.weights, out / AVERAGES, options.vae, device)
    weights.check(options.ema)
    pipeline = weights.pipeline(None)
    _fill_in(options, pipeline)
    latent = pipeline.latent
    data = (pipeline.manifest.get("data") or {}).get("name", "")
    scorer = load_scorer(options.features, data, latent.image_size, latent.image_channels, "--features")
    reference = read_reference(options.reference, latent.image_size)
    default = _default(pipeline)
    candidates = grid(options.guidance_scales, options.guidance_intervals, options.ema, options.sampling_shifts)
    candidates = list(dict.fromkeys([*candidates, default]))
    if len(candidates) < 2:
        raise UserError(f"there is nothing to choose from: {candidates[0].describe()} alone; give more settings to try")
    settings = _settings(options, checkpoint, pipeline, scorer, reference, candidates, default)
    stored = _read(out) if options.resume else None
    if stored is not None:
        check_same_settings(out, {key: stored[key] for key in stored if key not in RESULTS}, settings)
    agree(state, settings, MAY_DIFFER)
    if stored is not None and stored["complete"]:
        tell(state, f"{out} is complete; {summary(stored, out)}")
        return
    if state.is_main_process:
        if stored is None:
            _clear(out)
        write_json(out / FILE, {**settings, "complete": False})
    state.wait_for_everyone()
    call = {key: options.__dict__[key] for key in ("num_inference_steps", "sampler", "seed")}
    labels = draw_labels("balanced", options.seed, 2 * options.num_samples, options.class_ids)
    drawing = Drawing(weights, FeatureFiles(out / FEATURES), scorer, labels, call, scorer.feature_dim, state, lock)
    real = _gaussian(reference, scorer, str(device)) if state.is_main_process else None
    found = Halving(drawing, candidates, candidates.index(default), settings, real).run()
    if state.is_main_process:
        lock.check()
        _finish(out, {**settings, "complete": True, **found}, weights)
    state.wait_for_everyone()
    tell(state, summary(_read(out), out))


def _fill_in(options: argparse.Namespace, pipeline: GSPNPipeline) -> None:
    """Take from the checkpoint what was not given; raises UserError for what does not go with it."""
    sampling, objective = pipeline.manifest["config"]["sampling"], pipeline.objective
    if options.num_inference_steps is None:
        options.num_inference_steps = sampling["steps"]
    options.sampler = objective.resolve_sampler(options.sampler or sampling["sampler"], options.num_inference_steps)
    for shift in options.sampling_shifts:
        objective.with_sampling_shift(shift)
    if objective.second_time and set(options.guidance_scales) != {1.0}:
        raise UserError(
            f"objective {objective.config.name} has learnt its guidance; give --guidance-scales 1, and other settings "
            "to choose from"
        )
    options.class_ids = parse_classes(options.classes, pipeline.class_names)
    options.num_samples = CHUNK * math.ceil(options.num_samples / CHUNK)


def _default(pipeline: GSPNPipeline) -> Candidate:
    """Return how the checkpoint's own run drew its previews."""
    sampling = pipeline.manifest["config"]["sampling"]
    if pipeline.objective.second_time or sampling["guidance_scale"] == 1:
        return Candidate()
    low, high = sampling["guidance_interval"]
    return Candidate(float(sampling["guidance_scale"]), (float(low), float(high)))


def _settings(
    options: argparse.Namespace,
    checkpoint: Path,
    pipeline: GSPNPipeline,
    scorer: QuickScorer,
    reference: Reference,
    candidates: Sequence[Candidate],
    default: Candidate,
) -> dict[str, Any]:
    """Return all that the choice is a function of, for a reader; raises UserError for too few images."""
    least = scorer.feature_dim + 1
    images = reference.images
    for count, whose in ((options.num_samples, "--num-samples"), (len(images), f"the reference {images.source}")):
        if count < least:
            raise UserError(f"{whose} is {count} images, but {scorer.name} needs at least {least}")
    rounds = plan(len(candidates), options.num_samples, least, options.factor, CHUNK)
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": str(checkpoint),
        "step": read_manifest(checkpoint)["step"],
        "weights": options.weights,
        "weights_sha256": sha256_of(checkpoint / f"{options.weights}.safetensors"),
        "vae": options.vae,
        "latent": {key: value for key, value in pipeline.latent.spec().items() if key != "vae"},
        "sampling_shift": pipeline.objective.sampling_shift if pipeline.objective.flows else None,
        "sampler": options.sampler,
        "num_inference_steps": options.num_inference_steps,
        "seed": options.seed,
        "classes": options.classes,
        "num_images": options.num_samples,
        "score_name": scorer.name,
        "feature_net": {"source": scorer.net.source, "sha256": scorer.net.sha256},
        "reference": {"source": images.source, "n": len(images)},
        "tried": [candidate.to_dict() for candidate in candidates],
        "default_number": candidates.index(default),
        "factor": options.factor,
        "rounds": [{"candidates": rung.candidates, "images": rung.images} for rung in rounds],
        "environment": {key: describe_run()[key] for key in ("versions", "git_commit", "git_changes", "machine")},
    }


def _gaussian(reference: Reference, scorer: QuickScorer, device: str) -> Gaussian:
    (found,), _ = extract_all(reference.images, [scorer.net], device=device, title="reference")
    return Gaussian.fit(found.moments["features"])


class Halving:
    """The rounds of a sweep; the first process scores, and tells the others who stays.

    Args:
        drawing: makes the features.
        candidates, default: what is tried, and the number of the run's own setting, which stays to the end.
        settings: of the sweep.
        real: of the reference; None in the other processes.
    """

    def __init__(
        self,
        drawing: Drawing,
        candidates: Sequence[Candidate],
        default: int,
        settings: Mapping[str, Any],
        real: Gaussian | None,
    ) -> None:
        self.drawing, self.candidates, self.default, self.settings = drawing, candidates, default, settings
        self.real = real
        self.rounds = [Rung(**rung) for rung in settings["rounds"]]
        self.scores: list[dict[int, float]] = []
        """Of each round, by candidate."""

    def run(self) -> dict[str, Any]:
        """Return what is written beside the settings; {} in the other processes."""
        kept = list(range(len(self.candidates)))
        state = self.drawing.state
        for number, rung in enumerate(self.rounds, 1):
            share = f"{len(kept)} settings, {rung.images:,} images of each"
            tell(state, f"round {number} of {len(self.rounds)}: {share}")
            self.scores.append(self._score(kept, range(rung.images // CHUNK)))
            following = self.rounds[number].candidates if number < len(self.rounds) else 1
            kept = survivors(self.scores[-1], following)
            if number < len(self.rounds) and self.default not in kept:
                kept = [*kept, self.default]
        count = self.settings["num_images"] // CHUNK
        looked_at = list(dict.fromkeys([kept[0], self.default]))
        tell(state, f"fresh images: {len(looked_at)} settings, {self.settings['num_images']:,} images of each")
        fresh = self._score(looked_at, range(count, 2 * count))
        return self._results(kept[0], fresh) if state.is_main_process else {}

    def _score(self, numbers: Sequence[int], chunks: range) -> dict[int, float]:
        from accelerate.utils import broadcast_object_list

        self.drawing.draw(self.candidates, numbers, chunks)
        found: list[Any] = [None]
        if self.real is not None:
            found = [{number: self._distance(number, chunks) for number in sorted(numbers)}]
        broadcast_object_list(found)
        return found[0]

    def _distance(self, number: int, chunks: range) -> float:
        """Return the Fréchet distance of a candidate's images; NaN where some are not finite."""
        assert self.real is not None
        features = self.drawing.files.read(number, chunks)
        if not bool(features.isfinite().all()):
            return math.nan
        return self.real.frechet_distance(Gaussian.fit(Moments.of(features)))

    def _interval(self, number: int) -> dict[str, Any] | None:
        assert self.real is not None
        count, score = self.settings["num_images"], self.scores[-1][number]
        if math.isnan(score):
            return None
        features = self.drawing.files.read(number, range(count // CHUNK))
        return frechet(features, self.real, score, strata_of(self.drawing.labels[:count]))

    def _results(self, chosen: int, fresh: Mapping[int, float]) -> dict[str, Any]:
        last = self.scores[-1]
        if math.isnan(last[chosen]):
            raise UserError("no setting gives finite samples: the weights have diverged; take an earlier checkpoint")
        rows: list[dict[str, Any]] = []
        for number in range(len(self.candidates)):
            scores = [_finite(of_round[number]) for of_round in self.scores if number in of_round]
            interval = self._interval(number) if number in last else None
            rows.append({"scores": scores, "interval": interval})
        drawn = sum(self.rounds[len(row["scores"]) - 1].images for row in rows)
        images = drawn + len(fresh) * self.settings["num_images"]
        whole = len(self.candidates) * self.settings["num_images"]
        return {
            "results": rows,
            "chosen": self._described(chosen, fresh),
            "default": self._described(self.default, fresh),
            "budget": {"images": images, "images_of_full_grid": whole, "share": images / whole},
        }

    def _described(self, number: int, fresh: Mapping[int, float]) -> dict[str, Any]:
        """Return all that `gspn_dit.generate` has to be told of a candidate, its score and that of fresh images."""
        candidate, settings, weights = self.candidates[number], self.settings, self.drawing.weights
        place = weights.place(candidate.ema)
        stem = settings["weights"] if candidate.ema is None else "ema"
        shift = candidate.sampling_shift if candidate.sampling_shift is not None else settings["sampling_shift"]
        return {
            "number": number,
            "guidance_scale": candidate.guidance_scale,
            "guidance_interval": list(candidate.guidance_interval),
            "sampling_shift": shift,
            "sampler": settings["sampler"],
            "num_inference_steps": settings["num_inference_steps"],
            "checkpoint": str(place),
            "weights": stem,
            "weights_sha256": sha256_of(place / f"{stem}.safetensors"),
            "score": _finite(self.scores[-1][number]),
            "fresh_score": _finite(fresh[number]),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(out: Path) -> dict[str, Any] | None:
    file = out / FILE
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; give --overwrite to start afresh") from None


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _clear(out: Path) -> None:
    for name in (FEATURES, AVERAGES):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (FILE, PAGE):
        (out / name).unlink(missing_ok=True)


def _finish(out: Path, sweep: dict[str, Any], weights: Weights) -> None:
    """Write the page, then the results, and delete what nobody needs any more."""
    write_atomically(out / PAGE, page(sweep).encode())
    write_json(out / FILE, sweep)
    shutil.rmtree(out / FEATURES, ignore_errors=True)
    needed = Path(sweep["chosen"]["checkpoint"])
    for place in (out / AVERAGES).glob("*"):
        if place != needed:
            shutil.rmtree(place, ignore_errors=True)


def summary(sweep: dict[str, Any] | None, out: Path) -> str:
    """Return the choice for a terminal, with the command that takes it."""
    assert sweep is not None
    name, chosen, default, budget = (sweep[key] for key in ("score_name", "chosen", "default", "budget"))
    rows = []
    for title, found in (("chosen", chosen), ("default", default)):
        candidate = Candidate.of(sweep["tried"][found["number"]])
        scores = f"{name} {_figure(found['score'])}, of fresh images {_figure(found['fresh_score'])}"
        rows.append((title, f"{candidate.describe()}: {scores}"))
    rows.append(("budget", f"{budget['images']:,} images, {budget['share']:.0%} of the full grid"))
    rows.append(("use it", f"python -m gspn_dit.generate --sweep {out} … (weights: {chosen['checkpoint']})"))
    return "\n".join(f"{title:<9}{text}" for title, text in rows)

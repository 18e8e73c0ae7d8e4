"""Generate an evaluation set by class, in one process or many, and resume where an interrupted run stopped.

    accelerate launch -m gspn_dit.generate --checkpoint runs/NAME --protocol adm-50k --out samples.npz

Image i and its label depend on (seed, i). The set is cut into chunks by index; process r of W makes every W-th of the
missing ones, each of which is on disk whole or not at all. So the set is the same bit by bit however many processes
made it and however often they were killed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gspn_dit.chosen import chosen_options, provenance, read_sweep
from gspn_dit.errors import ArgumentParser, LocalUserError, UserError, run_cli
from gspn_dit.files import is_npz, sha256_of
from gspn_dit.locks import Lock, refuse_if_held
from gspn_dit.paths import path_argument
from gspn_dit.processes import agree, compute_exactly, drawing_job, tell
from gspn_dit.protocols import PROTOCOLS, apply_protocol, check_model, preferred_samplers
from gspn_dit.sample import parse_classes
from gspn_dit.sampling_options import (
    add_sampling_options,
    check_guided_channels,
    check_sampling_options,
)

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor

    from gspn_dit.pipeline import GSPNPipeline
    from gspn_dit.sample_sets import SampleSet


QUEUE = 2
"""Chunks that may wait to be written while further ones are computed."""
LINE_SECONDS = 30
"""Between two lines of progress where there is no terminal."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, fill in what the protocol says, and check what can be checked without the checkpoint.

    Raises UserError.
    """
    parser = ArgumentParser(
        description="Generate an evaluation set: a folder of PNG files, or an .npz file (arr_0 uint8 NHWC, arr_1).",
        formatter_class=argparse.HelpFormatter,
    )
    add_sampling_options(
        parser, guidance_scale=1.0, otherwise="the protocol's, or ", checkpoint="the one that --sweep chose"
    )
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR|FILE.npz",
                        help="a folder of PNGs, or an .npz file")  # fmt: skip
    parser.add_argument("--protocol", metavar="NAME", help=f"fixes what an evaluation asks for: {', '.join(PROTOCOLS)}")
    parser.add_argument("--num-samples", type=int, metavar="N", help="images; needed unless the protocol says it")
    parser.add_argument("--labels", choices=("uniform", "balanced"),
                        help="drawn at random by (seed, index), or the classes in turn (default: uniform)")  # fmt: skip
    parser.add_argument("--sweep", type=path_argument, metavar="DIR",
                        help="sample as this sweep chose, and say so; see python -m gspn_dit.sweep")  # fmt: skip
    parser.add_argument("--tf32", action="store_true", help="let NVIDIA GPUs round matrix products to TF32")
    parser.add_argument("--resume", action="store_true", help="continue --out, or start it")
    parser.add_argument("--overwrite", action="store_true", help="replace the set that --out holds")
    options = parser.parse_args(arguments)
    if options.sweep is not None:
        options = _as_chosen(parser, arguments, options.sweep)
    if options.checkpoint is None:
        raise UserError("the following arguments are required: --checkpoint, or --sweep, which chose one")
    apply_protocol(options)
    _check(options)
    return options


def _as_chosen(parser: ArgumentParser, arguments: Sequence[str] | None, directory: str) -> argparse.Namespace:
    """Return the options with what a sweep chose in place of defaults; raises UserError for what contradicts it."""
    sweep = read_sweep(directory)
    chosen = chosen_options(sweep)
    parser.set_defaults(checkpoint=sweep["chosen"]["checkpoint"], **chosen)
    options = parser.parse_args(arguments)
    for key, value in chosen.items():
        given = getattr(options, key)
        if (tuple(given) if isinstance(given, list) else given) != value:
            raise UserError(
                f"--{key.replace('_', '-')} {given} contradicts the sweep {directory}, which chose {value}; leave one "
                "of them out"
            )
    options.chosen = {"weights_sha256": sweep["chosen"]["weights_sha256"], "checkpoint": sweep["chosen"]["checkpoint"]}
    options.provenance = provenance(sweep, directory)
    return options


def _check(options: argparse.Namespace) -> None:
    from gspn_dit.sample_sets import check_place

    check_sampling_options(options, "num_samples")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    refuse_if_held(Path(options.out), "--out")
    check_place(options.out, options.resume, options.overwrite)


def run(options: argparse.Namespace) -> None:
    """Generate what the options ask for, in this process or with those that were launched beside it.

    Raises UserError, before anything is written unless the disk or the model fails on the way.
    """
    from gspn_dit.diffusion import CHUNK
    from gspn_dit.sample_sets import check_place

    def check() -> None:
        check_place(options.out, options.resume, options.overwrite)

    with drawing_job(options, CHUNK, check) as (state, device, lock):
        _run_alone(options, state, device, lock)


def _run_alone(options: argparse.Namespace, state: PartialState, device: str | torch.device, lock: Lock) -> None:
    from gspn_dit.checkpoint import resolve_checkpoint
    from gspn_dit.diffusion import CHUNK
    from gspn_dit.pipeline import GSPNPipeline
    from gspn_dit.sample_sets import MAY_DIFFER, check_same_settings, draw_labels, open_set, read_settings

    compute_exactly(options.tf32)
    checkpoint = resolve_checkpoint(options.checkpoint)
    pipeline = GSPNPipeline.from_checkpoint(checkpoint, options.weights, device, options.vae)
    if options.guide_checkpoint:
        pipeline.guide_with(options.guide_checkpoint)
    pipeline.set_progress_bar_config(disable=True)  # this command counts images, not steps
    classes = parse_classes(options.classes, pipeline.class_names)
    settings = _settings(options, checkpoint, pipeline)
    labels = draw_labels(options.labels, options.seed, options.num_samples, classes)
    output = open_set(options.out, labels, CHUNK)
    stored = None if options.overwrite else read_settings(options.out)
    if stored is not None:
        check_same_settings(options.out, stored, settings)
    agree(state, settings, MAY_DIFFER)  # and all have read the place before one of them changes it
    if stored is not None and output.is_complete():
        tell(state, f"{options.out} is complete: {options.num_samples:,} images")
        return
    try:
        if state.is_main_process:
            output.begin(settings, options.overwrite)
        state.wait_for_everyone()
        _generate(options, pipeline, output, _missing(state, output), state, lock)
        state.wait_for_everyone()
        if state.is_main_process:
            _require_all(output)
            lock.check()
            output.finish()
    except OSError as error:
        raise LocalUserError(
            f"--out {options.out} cannot be written: {error}; what is there is kept, continue with --resume"
        ) from None
    tell(state, f"{options.num_samples:,} images: {options.out}")


def _guide_settings(checkpoint: str | None) -> dict[str, str]:
    """Return what is noted of the weaker model that guides, nothing without one."""
    from gspn_dit.checkpoint import resolve_checkpoint

    if checkpoint is None:
        return {}
    guide = resolve_checkpoint(checkpoint)
    return {"guide_checkpoint": str(guide), "guide_sha256": sha256_of(guide / "ema.safetensors")}


def _settings(options: argparse.Namespace, checkpoint: Path, pipeline: GSPNPipeline) -> dict[str, Any]:
    """Return everything that the images are a function of, for a reader; raises UserError where it is out of range."""
    from gspn_dit.diffusion import CHUNK, STEP_NOISE
    from gspn_dit.environment import describe_run
    from gspn_dit.sample_sets import FORMAT_VERSION

    objective, latent, manifest = pipeline.objective, pipeline.latent, pipeline.manifest
    check_guided_channels(options.guidance_channels, latent.channels, "--guidance-channels")
    image_size, latent_spec = latent.size * latent.factor, latent.spec()
    check_model(options.protocol, image_size, len(pipeline.class_names))
    if options.sampler is None:
        preferred = preferred_samplers(options.protocol)
        options.sampler = next((name for name in preferred if name in objective.samplers), None)
    options.sampler = objective.resolve_sampler(options.sampler, options.steps)
    shift = objective.with_sampling_shift(options.sampling_shift).sampling_shift
    weights_sha256 = sha256_of(checkpoint / f"{options.weights}.safetensors")
    if options.sweep is not None and weights_sha256 != options.chosen["weights_sha256"]:
        raise UserError(
            f"--checkpoint {options.checkpoint} has other weights than the sweep {options.sweep} chose; leave it out, "
            f"which stands for {options.chosen['checkpoint']}"
        )
    environment = describe_run()
    return {
        "format_version": FORMAT_VERSION,
        "protocol": options.protocol,
        "num_images": options.num_samples,
        "image_size": image_size,
        "image_format": "npz" if is_npz(options.out) else "png",
        "uint8": "truncate",
        "labels": options.labels,
        "classes": options.classes,
        "seed": options.seed,
        "sampler": options.sampler,
        **({"step_noise": STEP_NOISE} if options.sampler in objective.stochastic_samplers else {}),
        "num_inference_steps": options.steps,
        "training_shift": objective.training_shift,
        **({"sampling_shift": shift} if objective.flows else {}),
        "guidance_scale": options.guidance_scale,
        "guidance_interval": list(options.guidance_interval),
        "guidance_channels": "all" if options.guidance_channels is None else options.guidance_channels,
        **_guide_settings(options.guide_checkpoint),
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "weights": options.weights,
        "weights_sha256": weights_sha256,
        **({"sweep": options.provenance} if options.sweep is not None else {}),
        "model": manifest["model"],
        "objective": manifest["config"]["objective"],
        "vae": latent_spec.pop("vae", None),
        "latent": latent_spec,
        "training_data": manifest.get("data"),
        "class_names": pipeline.class_names,
        "chunk_size": CHUNK,
        "dtype": "float32",
        "tf32": options.tf32,
        "environment": {
            **{key: environment[key] for key in ("versions", "git_commit", "git_changes", "machine")},
            "device": _device_name(pipeline.device),
        },
    }


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _missing(state: PartialState, output: SampleSet) -> list[int]:
    """Return the chunks to make, as the main process sees them."""
    import torch
    from accelerate.utils import broadcast

    wanted = torch.zeros(output.num_chunks, dtype=torch.int32, device=state.device)
    if state.is_main_process:
        wanted[output.missing()] = 1
    return broadcast(wanted).nonzero().flatten().tolist()


def _require_all(output: SampleSet) -> None:
    if lost := output.missing():
        raise UserError(
            f"{len(lost)} chunks that another process made are not in {output.path}; it must lie on a file system "
            "that all machines share"
        )


def _generate(
    options: argparse.Namespace,
    pipeline: GSPNPipeline,
    output: SampleSet,
    missing: list[int],
    state: PartialState,
    lock: Lock,
) -> None:
    """Make this process's share of the missing chunks; each is decoded and written while the next one is computed."""
    rounds = [missing[start : start + state.num_processes] for start in range(0, len(missing), state.num_processes)]
    sizes = [sum(len(output.indices(chunk)) for chunk in chunks) for chunks in rounds]
    progress = Progress(len(output.labels), sum(sizes), state)
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(max_workers=1) as writer, progress:
        for chunks, size in zip(rounds, sizes, strict=True):
            if state.process_index < len(chunks):
                chunk = chunks[state.process_index]
                latents = _make(options, pipeline, output, chunk)
                if len(waiting) == QUEUE:
                    waiting.popleft().result()
                waiting.append(writer.submit(_decode_and_write, pipeline, output, chunk, latents, lock))
            progress.advance(size)
        for written in waiting:
            written.result()


def _make(options: argparse.Namespace, pipeline: GSPNPipeline, output: SampleSet, chunk: int) -> Tensor:
    """Compute the latents of a chunk, [n, C, h, w]."""
    indices = output.indices(chunk)
    with _images_named(indices):
        latents = pipeline(
            output.labels[indices.start : indices.stop].tolist(),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            guidance_interval=tuple(options.guidance_interval),
            guidance_channels=options.guidance_channels,
            sampler=options.sampler,
            sampling_shift=options.sampling_shift,
            seed=options.seed,
            first_index=indices.start,
            output_type="latent",
        ).images
    assert not isinstance(latents, (list, np.ndarray))
    return latents


def _decode_and_write(pipeline: GSPNPipeline, output: SampleSet, chunk: int, latents: Tensor, lock: Lock) -> None:
    with _images_named(output.indices(chunk)):
        images = pipeline.decode(latents)
    lock.check()
    output.write(chunk, images)


@contextlib.contextmanager
def _images_named(indices: range) -> Iterator[None]:
    """Tell which images a mistake is about; one process alone meets it."""
    try:
        yield
    except UserError as error:
        raise LocalUserError(f"images {indices.start}-{indices.stop - 1}: {error}") from None


class Progress:
    """Images done, images/s and time left: a bar in a terminal, else a line now and then; main process only."""

    def __init__(self, total: int, missing: int, state: PartialState) -> None:
        from tqdm import tqdm

        self.active, self.total, self.done, self.made = state.is_main_process, total, total - missing, 0
        self.started = self.told = time.perf_counter()
        terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=self.done, unit="image", dynamic_ncols=True) if terminal else None
        before = f", {self.done:,} are there already" if self.done else ""
        processes = f" in {state.num_processes} processes" if state.num_processes > 1 else ""
        tell(state, f"generating {total:,} images{processes}{before}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, images: int) -> None:
        """Count images that all processes together have made."""
        self.made += images
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(images)
        elif self.active and now - self.told >= LINE_SECONDS:
            rate = self.made / (now - self.started)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            print(f"{self.done:,} of {self.total:,} images, {rate:.3g} images/s, {left} left", flush=True)
            self.told = now


def main() -> None:
    """Parse, then run."""
    run(parse_arguments())


def cli() -> None:
    """The command `gspn-generate`."""
    run_cli(main, "what is there is kept; continue with --resume")


if __name__ == "__main__":
    cli()

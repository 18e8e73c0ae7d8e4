"""The command line of `sample.py`: class-conditional grids, PNG files and .npz sets from a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.errors import ArgumentParser, UserError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without the checkpoint; raises UserError."""
    parser = ArgumentParser(prog="sample.py", description="Draw images by class from a checkpoint.")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run directory or one checkpoint")
    parser.add_argument("--classes", default="all", help="ids, ranges and names: 0-9, or 3,7,cat; or all")
    parser.add_argument("--per-class", type=int, default=8, metavar="N", help="images per class")
    parser.add_argument("--order", choices=("grouped", "interleaved"), default="grouped",
                        help="order of the labels: 000111… or 010101…")  # fmt: skip
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="1 is no guidance")
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                        help="times t (1 is noise, 0 data) at which guidance acts")  # fmt: skip
    parser.add_argument("--guidance-channels", default="all", metavar="all|N",
                        help="guide the first N channels alone, as DiT's published figures do with 3")  # fmt: skip
    parser.add_argument("--guide-checkpoint", metavar="DIR", help="guide away from this weaker model (autoguidance) "
                        "instead of the model without class")  # fmt: skip
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--sampler", help="velocity: euler or heun; epsilon: ddpm, ddim, dpm++ or unipc; "
                        "by default the first of the checkpoint's objective")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--vae", metavar="NAME_OR_DIR", help="where the autoencoder of the latents lies now, if moved")
    parser.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    parser.add_argument("--out", metavar="FILE", help="write a grid with a row per class to this PNG")
    parser.add_argument("--save-images", metavar="DIR", help="write every image to DIR/<index>-<class id>.png")
    parser.add_argument("--save-npz", metavar="FILE", help="write arr_0 (uint8 NHWC) and arr_1 (labels)")
    parser.add_argument("--overwrite", action="store_true", help="write into a --save-images folder that is not empty")
    options = parser.parse_args(arguments)
    for name in ("per_class", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}, but must lie in [0, 2^63)")
    options.guidance_channels = parse_guidance_channels(options.guidance_channels)
    if not (options.out or options.save_images or options.save_npz):
        raise UserError("nothing to write: give --out FILE, --save-images DIR or --save-npz FILE")
    _check_outputs(options)
    return options


def _check_outputs(options: argparse.Namespace) -> None:
    for flag, file in (("--out", options.out), ("--save-npz", options.save_npz)):
        if file and Path(file).is_dir():
            raise UserError(f"{flag} {file} is a directory; give a file")
    folder = options.save_images
    if folder and Path(folder).is_dir() and any(Path(folder).iterdir()) and not options.overwrite:
        raise UserError(f"--save-images {folder} is not empty; give --overwrite to add to it and replace")
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"--save-images {folder} is a file; give a directory")


def parse_guidance_channels(text: str) -> int | None:
    """Turn "all" into None and "3" into 3; raises UserError for anything else."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--guidance-channels is {text}, but must be all or a number of at least 1")
    return int(text)


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """Turn "0-9", "3,7,cat" or "all" into class ids in the order given; raises UserError for an unknown class."""
    from gspn_dit.pipeline import resolve_class

    if text == "all":
        return list(range(len(class_names)))
    if text in class_names:  # a name may hold commas
        return [resolve_class(text, class_names)]
    ids: list[int] = []
    for word in (part.strip() for part in text.split(",")):
        low, dash, high = word.partition("-")
        if word not in class_names and dash and low.isdecimal() and high.isdecimal():
            first, last = resolve_class(int(low), class_names), resolve_class(int(high), class_names)
            if first > last:
                raise UserError(f"the range of classes {word} is empty; give it as {high}-{low}")
            ids.extend(range(first, last + 1))
        else:
            ids.append(resolve_class(word, class_names))
    return ids


def run(options: argparse.Namespace) -> None:
    """Generate and write what the options ask for; nothing is written unless every image is finite."""
    from tqdm import tqdm

    from gspn_dit.pipeline import GSPNPipeline

    device = choose_device(options.device)
    pipeline = GSPNPipeline.from_checkpoint(options.checkpoint, options.weights, device, options.vae)
    if options.guide_checkpoint:
        pipeline.guide_with(options.guide_checkpoint)
    pipeline.set_progress_bar_config(disable=True)  # this command counts images, not steps
    classes = parse_classes(options.classes, pipeline.class_names)
    labels = [label for label in classes for _ in range(options.per_class)]
    if options.order == "interleaved":
        labels = classes * options.per_class
    with tqdm(total=len(labels), unit="image", disable=None) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        try:
            images = pipeline(
                labels,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                guidance_interval=tuple(options.guidance_interval),
                guidance_channels=options.guidance_channels,
                sampler=options.sampler,
                seed=options.seed,
                output_type="np",
                on_chunk=show,
            ).images
        except ValueError as error:
            raise UserError(str(error)) from None
    try:
        _write(options, images, labels, pipeline.class_names)
    except OSError as error:
        raise UserError(f"cannot write the images: {error}") from None


def choose_device(name: str | None) -> str:
    """Return the device of that name, or the accelerator if there is one; raises UserError for one not here."""
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator()
        return str(accelerator) if accelerator and torch.accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def _write(options: argparse.Namespace, images: Any, labels: list[int], class_names: list[str]) -> None:
    import numpy as np
    from PIL import Image

    from gspn_dit.files import write_atomically
    from gspn_dit.grid import class_grid, save_png

    for file in filter(None, (options.out, options.save_npz)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if options.out:
        save_png(class_grid(images, labels, class_names), options.out)
        print(f"grid of {len(images)} images: {options.out}")
    if options.save_images:
        folder = Path(options.save_images)
        folder.mkdir(parents=True, exist_ok=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            pixels = image[:, :, 0] if image.shape[2] == 1 else image
            save_png(Image.fromarray(pixels), folder / f"{index:06d}-{label}.png")
        print(f"{len(images)} images: {folder}")
    if options.save_npz:
        ids = np.asarray(labels, dtype=np.int64)
        write_atomically(options.save_npz, lambda file: np.savez(file, arr_0=images, arr_1=ids))
        print(f"{len(images)} images: {options.save_npz}")

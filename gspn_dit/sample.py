"""The command line of `sample.py` and `gspn-sample`: grids, PNG files and .npz sets from a checkpoint."""

from __future__ import annotations

import argparse
import json
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn_dit.class_names import resolve_class
from gspn_dit.errors import ArgumentParser, UserError, advise_on_memory, run_cli
from gspn_dit.files import cannot_hold, is_npz
from gspn_dit.paths import path_argument
from gspn_dit.sampling_options import (
    add_sampling_options,
    check_sampling_options,
    choose_device,
    memory_advice,
    parse_size,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without the checkpoint; raises UserError."""
    parser = ArgumentParser(
        description="Draw images by class, or by prompt, from a checkpoint.",
        formatter_class=argparse.HelpFormatter,
    )
    add_sampling_options(parser, guidance_scale=2.0, classes="all", weights="ema", steps=50)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="draw this instead of classes; can be given several times (images refined in stages: "
                        "gspn_dit.generate_highres, in Python)")  # fmt: skip
    parser.add_argument("--prompts", type=path_argument, metavar="FILE",
                        help="prompts, one a line, or a metadata.jsonl whose texts are taken")  # fmt: skip
    parser.add_argument("--per-class", type=int, default=8, metavar="N",
                        help="images per class or prompt (default: 8)")  # fmt: skip
    parser.add_argument("--size", metavar="HxW",
                        help="height and width of the images in pixels (default: as trained)")  # fmt: skip
    parser.add_argument("--order", choices=("grouped", "interleaved"), default="grouped",
                        help="order of the labels: 000111… or 010101… (default: grouped)")  # fmt: skip
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="write a grid with a row per class to this PNG"
    )
    parser.add_argument("--save-images", type=path_argument, metavar="DIR",
                        help="write every image to DIR/<index>-<class id>.png")  # fmt: skip
    parser.add_argument("--save-npz", type=path_argument, metavar="FILE",
                        help="write arr_0 (uint8 NHWC) and arr_1 (labels)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="write into a --save-images folder that is not empty")
    options = parser.parse_args(arguments)
    check_sampling_options(options, "per_class")
    if not (options.out or options.save_images or options.save_npz):
        raise UserError("nothing to write: give --out FILE, --save-images DIR or --save-npz FILE")
    options.prompt += _read_prompts(options.prompts) if options.prompts else []
    if any(not prompt.strip() for prompt in options.prompt):
        raise UserError("--prompt is empty; say what to draw")
    if options.prompt and (options.classes != "all" or options.guide_checkpoint):
        raise UserError("--prompt does not go with --classes or --guide-checkpoint; leave one of them out")
    try:
        options.size = parse_size(options.size, "--size") if options.size else (None, None)
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_outputs(options)
    return options


def _read_prompts(file: str) -> list[str]:
    """Return the prompts of a file, one a line, or the key `text` of each line's object."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [str(json.loads(line)["text"]) if file.endswith(".jsonl") else line for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--prompts {file} cannot be read: {error}") from None
    if not prompts:
        raise UserError(f"--prompts {file} holds no prompt; write one a line")
    return prompts


def _check_outputs(options: argparse.Namespace) -> None:
    """Look at all outputs before anything is drawn: hours later it would be lost."""
    for flag, file in (("--out", options.out), ("--save-npz", options.save_npz)):
        if file and Path(file).is_dir():
            raise UserError(f"{flag} {file} is a directory; give a file")
    kind = mimetypes.guess_type(options.out)[0] if options.out else None
    if kind not in (None, "image/png"):
        raise UserError(f"--out {options.out}: the grid is a PNG; give a name that ends in .png")
    if options.save_npz and not is_npz(options.save_npz):
        raise UserError(f"--save-npz {options.save_npz}: give a name that ends in .npz")
    folder = options.save_images
    if folder and Path(folder).is_dir() and any(Path(folder).iterdir()) and not options.overwrite:
        raise UserError(f"--save-images {folder} is not empty; give --overwrite to add to it and replace")
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"--save-images {folder} is a file; give a directory")
    for place in filter(None, (options.out, options.save_npz, folder)):
        if problem := cannot_hold(place):
            raise UserError(f"cannot write the images: {problem}")


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """Turn "0-9", "3,7,cat" or "all" into class ids in the order given; raises UserError for an unknown class."""
    if text == "all":
        return list(range(len(class_names)))
    if text in class_names:  # a name may hold commas
        return [resolve_class(text, class_names)]
    ids: list[int] = []
    for word in (part.strip() for part in text.split(",")):
        low, dash, high = word.partition("-")
        if word not in class_names and dash and low.isdecimal() and high.isdecimal():
            ids.extend(_class_range(int(low), int(high), class_names))
        else:
            ids.append(resolve_class(word, class_names))
    return ids


def _class_range(low: int, high: int, class_names: Sequence[str]) -> list[int]:
    """Return the ids low … high; raises UserError where classes are named by such numbers, and have other ids."""
    if low > high:
        raise UserError(f"the range of classes {low}-{high} is empty; give it as {high}-{low}")
    named = [(int(name), own) for own, name in enumerate(class_names) if name.isdecimal() and low <= int(name) <= high]
    others = [own for number, own in named if number != own]
    if others:
        raise UserError(
            f"the range of classes {low}-{high} is ambiguous: the class named {class_names[others[0]]} has the id "
            f"{others[0]}; give names one by one, such as {','.join(class_names[own] for _, own in sorted(named)[:5])}"
        )
    return list(range(resolve_class(low, class_names), resolve_class(high, class_names) + 1))


def run(options: argparse.Namespace) -> None:
    """Generate and write what the options ask for; nothing is written unless every image is finite."""
    from gspn_dit.diffusion import CHUNK

    device = choose_device(options.device)
    with advise_on_memory(f"{memory_advice(CHUNK, device)}; nothing was written"):
        images, labels, class_names = _generate(options, device)
    try:
        _write(options, images, labels, class_names)
    except OSError as error:
        raise UserError(f"cannot write the images: {error}") from None


def _generate(options: argparse.Namespace, device: str) -> tuple[Any, list[int], list[str]]:
    """Return images, uint8 [n, H, W, C], their class ids, and the names of all classes; or prompts for classes."""
    from tqdm import tqdm

    from gspn_dit.pipeline import GSPNPipeline
    from gspn_dit.text_sampler import is_text_checkpoint

    if options.prompt:
        return _generate_by_prompt(options, device)
    if is_text_checkpoint(options.checkpoint):
        raise UserError(f"{options.checkpoint} draws by prompt, not by class; give --prompt TEXT or --prompts FILE")

    pipeline = GSPNPipeline.from_checkpoint(options.checkpoint, options.weights, device, options.vae)
    if options.guide_checkpoint:
        pipeline.guide_with(options.guide_checkpoint)
    pipeline.set_progress_bar_config(disable=True)  # this command counts images, not steps
    classes = parse_classes(options.classes, pipeline.class_names)
    labels = [label for label in classes for _ in range(options.per_class)]
    if options.order == "interleaved":
        labels = classes * options.per_class
    if pipeline.objective.second_time and options.guidance_scale != 1:
        print(f"guidance is part of what this model has learnt: --guidance-scale {options.guidance_scale:g} is ignored")
        options.guidance_scale = 1.0
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
                sampling_shift=options.sampling_shift,
                seed=options.seed,
                height=options.size[0],
                width=options.size[1],
                output_type="np",
                on_chunk=show,
            ).images
        except ValueError as error:
            raise UserError(str(error)) from None
    return images, labels, pipeline.class_names


def _generate_by_prompt(options: argparse.Namespace, device: str) -> tuple[Any, list[int], list[str]]:
    from tqdm import tqdm

    from gspn_dit.diffusion import Guidance
    from gspn_dit.text_sampler import TextSampler

    drawer = TextSampler.from_checkpoint(options.checkpoint, options.weights, device, options.vae)
    numbers = [number for number in range(len(options.prompt)) for _ in range(options.per_class)]
    if options.order == "interleaved":
        numbers = list(range(len(options.prompt))) * options.per_class
    guidance = Guidance(options.guidance_scale, tuple(options.guidance_interval), options.guidance_channels)
    prompts = [options.prompt[number] for number in numbers]
    with tqdm(total=len(prompts), unit="image", disable=None) as bar:
        try:
            images = drawer.draw(
                prompts,
                options.steps,
                guidance,
                options.sampler,
                options.seed,
                on_chunk=lambda done: bar.update(done - bar.n),
                sampling_shift=options.sampling_shift,
                height=options.size[0],
                width=options.size[1],
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    return images, numbers, options.prompt


def _write(options: argparse.Namespace, images: Any, labels: list[int], class_names: list[str]) -> None:
    import numpy as np

    from gspn_dit.files import write_atomically
    from gspn_dit.grid import class_grid, save_png, to_pil

    for file in filter(None, (options.out, options.save_npz)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if options.out:
        save_png(class_grid(images, labels, class_names), options.out)
        print(f"grid of {len(images)} images: {options.out}")
    if options.save_images:
        folder = Path(options.save_images)
        folder.mkdir(parents=True, exist_ok=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            save_png(to_pil(image), folder / f"{index:06d}-{label}.png")
        if options.prompt:
            rows = [{"file_name": f"{index:06d}-{n}.png", "text": class_names[n]} for index, n in enumerate(labels)]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(folder / "metadata.jsonl", lines.encode())
        print(f"{len(images)} images: {folder}")
    if options.save_npz:
        ids = np.asarray(labels, dtype=np.int64)
        captions: dict[str, Any] = (
            {"captions": np.asarray([class_names[label] for label in labels])} if options.prompt else {}
        )
        write_atomically(options.save_npz, lambda file: np.savez(file, arr_0=images, arr_1=ids, **captions))
        print(f"{len(images)} images: {options.save_npz}")


def cli() -> None:
    """The command `gspn-sample`."""
    run_cli(lambda: run(parse_arguments()), "what was written is whole")


if __name__ == "__main__":
    cli()

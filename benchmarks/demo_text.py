"""A grid of emoji by caption and design, drawn by a run of configs/demo_text.yaml.

    python -m benchmarks.demo_text --run runs/demo_text --data data/emoji --out runs/demo_text/grid.png

A row for each design and a column for each emoji, all of them seen in training; then (caption, design) pairs that were
held out, each seen in other company alone, and below them the real pictures of those pairs. The columns of these two
rows have captions of their own, other than those of the rows above; all are printed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gspn_dit.data.images import evenly_spaced
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.grid import class_grid, save_png
from gspn_dit.text_sampler import TextSampler

COLUMNS = 10


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a split's metadata; raises UserError where prepare.emoji did not write one."""
    try:
        return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{folder} is no split of python -m gspn_dit.prepare.emoji: {error}") from None


def some(items: list[Any]) -> list[Any]:
    """Return at most `COLUMNS` of the items, evenly spaced."""
    return [items[index] for index in evenly_spaced(len(items), COLUMNS)]


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks.demo_text", description="Draw a grid of emoji by caption and design.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory or checkpoint")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="what prepare.emoji wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the PNG file")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="1 is no guidance")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    options = parser.parse_args()
    train, pairs = (read_rows(options.data / split) for split in ("train", "pairs"))
    styles = sorted({row["style"] for row in train})
    by_emoji: dict[str, dict[str, str]] = defaultdict(dict)
    for row in train:
        by_emoji[row["code"]][row["style"]] = row["text"]
    columns = some([texts for _, texts in sorted(by_emoji.items()) if len(texts) == len(styles)])
    held_out = some(pairs)
    if not columns or not held_out:
        raise UserError(f"{options.data} has no emoji in all designs, or no held-out pairs; prepare several designs")
    prompts = [texts[style] for style in styles for texts in columns] + [row["text"] for row in held_out]
    sampler = TextSampler.from_checkpoint(options.run)
    drawn = sampler.draw(prompts, options.steps, Guidance(options.guidance_scale))
    real = [np.asarray(Image.open(options.data / "pairs" / row["file_name"]).convert("RGB")) for row in held_out]
    labels = [number for number in range(len(styles)) for _ in columns]
    labels += [len(styles)] * len(held_out) + [len(styles) + 1] * len(held_out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(class_grid(np.concatenate([drawn, real]), labels, [*styles, "held-out pairs", "real"]), options.out)
    print(f"columns: {'; '.join(next(iter(texts.values())).rpartition(', ')[0] for texts in columns)}")
    print(f"held-out pairs: {'; '.join(row['text'] for row in held_out)}")
    print(f"grid of {len(drawn)} images: {options.out}")


if __name__ == "__main__":
    run_cli(main)

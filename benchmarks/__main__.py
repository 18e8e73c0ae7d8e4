"""Run the benchmarks whose results are committed, and compare two results.

    python -m benchmarks run scan_cpu train_step
    python -m benchmarks compare benchmarks/results/scan_cpu.json /tmp/scan_cpu.json

`compare` looks at every timing that both files hold under one name, and exits with 1 if any is slower than before by
more than the spread of either run and a tolerance. Timings of a single run have no spread: they are shown, not judged.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn_dit.errors import ArgumentParser, UserError, run_cli

RESULTS = Path(__file__).parent / "results"
ONE_RATE = ["benchmarks.one_rate", "--jobs", "2"]
ABLATIONS = [*ONE_RATE, "--data", "digits", "--steps", "288"]
RIVALS_BLOCK = ["benchmarks.block", "--kept", "3", "--data", "fashion", "--seconds", "40"]
BLOCK_1024 = ["benchmarks.block", "--kept", "3", "--data", "emoji-1024", "--seconds", "90", "--work", "runs/block_1024"]
COMMANDS: dict[str, list[str]] = {
    "ablations": [
        *(*ABLATIONS, "--baseline", "gspn", "--variants", "gspn", "no-positions", "own-weights", "window-2"),
        *("two-directions", "gspn-block", "--out"),
    ],
    "ablations_block": [
        *(*ABLATIONS, "--baseline", "gspn-block", "--variants", "gspn-block", "gspn-block-adaln-zero"),
        *("gspn-block-no-long-skips", "--out"),
    ],
    "backbones": ["benchmarks.backbones", "--out"],
    "block": [
        *("benchmarks.block", "--data", "fashion", "fashion-256", "--seconds", "fashion=40", "fashion-256=50"),
        *("--kept", "10", "--out"),
    ],
    "block_1024": [*BLOCK_1024, "--base", "gspn2", "--out"],
    "block_1024_attention": [*BLOCK_1024, "--base", "attention-tuned", "--out"],
    "block_1024_conv": [*BLOCK_1024, "--base", "conv-tuned", "--out"],
    "block_1024_linear": [*BLOCK_1024, "--base", "linear-tuned", "--out"],
    "block_attention": [*RIVALS_BLOCK, "--base", "attention-lpu", "--out"],
    "block_conv": [*RIVALS_BLOCK, "--base", "conv", "--out"],
    "block_linear": [*RIVALS_BLOCK, "--base", "linear", "--out"],
    "block_rates": [
        *("benchmarks.block", "--data", "fashion", "--seconds", "fashion=40", "--work", "runs/block_rates"),
        *("--own-rates", "no norm, no skip", "norm before the scan", "norm of each direction", "no lpu"),
        *("stem convolution for lpu", "U-shape", "U-shape without long skips", "U-shape with lpu"),
        *("U-shape with adaLN", "published block, norm and skip"),
        *("published block, norm and skip, no long skips", "--out"),
    ],
    "classification_emoji": ["benchmarks.classification", "--data", "emoji", "--out"],
    "classification_long": ["benchmarks.learning_curve", "--run", "runs/fashion/long", "--out"],
    "classification_fashion": ["benchmarks.classification", "--data", "fashion", "--out"],
    "cost": [
        *("benchmarks.cost", "--size", "T", "--contenders", "attention", "attention-tuned", "conv-tuned"),
        *("linear-tuned", "neighbourhood", "gspn2", "gspn-u", "gspn-published", "--seconds", "1300", "--out"),
    ],
    "cuda_traffic": ["benchmarks.cuda_traffic", "--out"],
    "demo": ["benchmarks.demo_quality", "--out"],
    "digits_one_step": [
        *("benchmarks.few_step", "--distilled", "runs/digits_one_step", "--picture", "docs/few_step.png", "--out"),
    ],
    "few_step": [
        *("benchmarks.few_step", "--seconds", "120", "--recipes", "velocity", "flow_map, from scratch"),
        *("mean_flow, from scratch", "flow_map, half + half", "mean_flow, half + half", "--out"),
    ],
    "few_step_emoji": [
        *("benchmarks.few_step", "--data", "emoji", "--root", "data/emoji_classes"),
        *("--features", "runs/emoji_judge", "--runs", "runs/few_step_emoji", "--seconds", "150"),
        *("--recipes", "velocity", "flow_map, from scratch", "flow_map, half + half"),
        *("--picture", "docs/few_step_emoji.png", "--out"),
    ],
    "highres": ["benchmarks.highres", "--out"],
    "memory": ["benchmarks.memory", "--out"],
    "mixers": ["benchmarks.mixers", "--widths", "384", "--seconds", "540", "--out"],
    "mixers_wide": [
        *("benchmarks.mixers", "--widths", "1152", "--sides", "16", "32", "64", "--seconds", "300", "--out"),
    ],
    "quality": ["benchmarks.quality", "--preset", "small", "--beside", "benchmarks/results/quality.json", "--out"],
    "quality_1024": ["benchmarks.quality", "--preset", "searched", "--work", "runs/fair_1024", "--out"],
    "quality_4096": ["benchmarks.quality", "--preset", "longest", "--work", "runs/fair_4096", "--out"],
    "quality_claims": ["benchmarks.quality", "--preset", "claims", "--work", "runs/fair_claims", "--out"],
    "quality_curve": [
        *("benchmarks.quality", "--preset", "small", "--data", "fashion", "--budgets", "1", "4", "16"),
        *("--drop", "options", "equal-steps", "--work", "runs/fair_curve", "--out"),
    ],
    "quality_digits": [*ONE_RATE, "--data", "digits", "--seconds", "30", "--out"],
    "quality_fashion": [*ONE_RATE, "--data", "fashion", "--seconds", "120", "--out"],
    "quality_fashion_latents": [*ONE_RATE, "--data", "fashion-latents", "--seconds", "120", "--out"],
    "quality_fashion_block": [
        *(*ONE_RATE, "--data", "fashion", "--steps", "335", "--seeds", "1", "--baseline", "gspn-block"),
        *("--variants", "gspn-block", "gspn-block-no-long-skips", "--out"),
    ],
    "quality_sizes": ["benchmarks.quality", "--preset", "sizes", "--work", "runs/sizes", "--out"],
    "recipes": ["benchmarks.recipes", "--seconds", "18", "--out"],
    "recipes_emoji": [
        *("benchmarks.recipes", "--data", "emoji", "--root", "data/emoji_classes", "--seconds", "45"),
        *("--features", "runs/emoji_judge", "--work", "runs/recipes_emoji", "--out"),
    ],
    "resolution": [
        *("benchmarks.resolution", "--study", "benchmarks/results/quality_fashion.json"),
        *("benchmarks/results/quality_fashion_block.json", "--picture", "docs/resolution.png", "--out"),
    ],
    "scan_cpu": ["benchmarks.scan", "--device", "cpu", "--repeats", "7", "--json"],
    "second_look_1024": [
        *("benchmarks.second_look", "--study", "benchmarks/results/quality_1024.json", "--work", "runs/fair_1024"),
        *("--data", "emoji-1024", "--nets", "runs/emoji64/features.safetensors", "inception", "--reference", "1000"),
        "--out",
    ],
    "sizes": [
        *("benchmarks.resolution", "--fair", "benchmarks/results/quality_sizes.json", "--work", "runs/sizes"),
        *("--data", "emoji-sizes", "--least", "18", "--larger", "2=data/emoji64_classes", "4=data/emoji128_classes"),
        "--out",
    ],
    "text_quality": [
        *("benchmarks.text_quality", "--data", "data/emoji_food", "--table", "data/emoji_food_texts"),
        *("--seconds", "480", "--search-steps", "900"),
        *("--images", "160", "--grid", "docs/text_quality.png", "--out"),
    ],
    "text_to_image": ["benchmarks.text_to_image", "--out"],
    "train_step": ["benchmarks.train_step", "--steps", "50", "--out"],
}
"""What makes benchmarks/results/NAME.json, but for the file's name at the end."""
NAMING_KEYS = ("shape", "dtype", "directions", "name", "model", "mixer", "tokens", "variant", "what")
"""Keys of a list's entry that name it; entries are matched by them and not by their place."""


@dataclass(frozen=True)
class Timing:
    """Best milliseconds of a run, and how far its median lay above, as a share: infinite where it was timed once."""

    best_ms: float
    spread: float


def timings(tree: Any, name: str = "") -> Iterator[tuple[str, Timing]]:
    """Yield every timing ("best_ms" beside "spread") of a result under the path that leads to it."""
    if isinstance(tree, dict):
        if "best_ms" in tree and "spread" in tree:
            yield name, Timing(tree["best_ms"], math.inf if tree.get("runs") == 1 else tree["spread"])
        for key, value in tree.items():
            yield from timings(value, f"{name}/{key}" if name else key)
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from timings(value, f"{name}[{_entry_name(value) or place}]")


def _entry_name(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    return ", ".join(f"{key} {entry[key]}" for key in NAMING_KEYS if key in entry)


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[tuple[str, float, bool]]:
    """Return (name, after / before, whether that is a regression) of the timings that both have; worst first."""
    old, new = dict(timings(before)), dict(timings(after))
    rows = []
    for name in old.keys() & new.keys():
        ratio = new[name].best_ms / old[name].best_ms
        rows.append((name, ratio, ratio > 1 + max(old[name].spread, new[name].spread) + tolerance))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def instruction_sets(tree: Any) -> tuple[str, list[str]] | None:
    """Return the scan's kernels that a result was measured with and the processor's instruction sets, if it says."""
    if isinstance(tree, dict):
        if isinstance(tree.get("kernels"), str):
            return tree["kernels"], tree.get("instruction_sets", [])
        tree = list(tree.values())
    found = (instruction_sets(entry) for entry in tree) if isinstance(tree, list) else ()
    return next((pair for pair in found if pair is not None), None)


def refuse_other_instructions(options: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise UserError for different or unknown instruction sets: what differs may be the machine, not the code."""
    if options.across_instruction_sets:
        return
    (old, old_sets), (new, new_sets) = (instruction_sets(tree) or ("", []) for tree in (before, after))
    if not old or not new or (old == new and not (old_sets and new_sets)):
        unknown = options.after if old and old_sets else options.before
        raise UserError(
            f"{unknown} does not say which instruction sets it was measured with; measure both on one machine, "
            "or give --across-instruction-sets"
        )
    if old == new:
        old, new = " ".join(old_sets), " ".join(new_sets)
    if old != new:
        raise UserError(
            f"{options.before} was measured with {old}, {options.after} with {new}: another machine is no regression; "
            "measure both on one, or give --across-instruction-sets"
        )


def _read(path: str) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a result: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a result of a benchmark: it holds a {type(tree).__name__}")
    return tree


def _run(names: list[str]) -> None:
    for name in names:
        command = [sys.executable, "-m", *COMMANDS[name], str(RESULTS / f"{name}.json")]
        print(" ".join(command[1:]), flush=True)
        if code := subprocess.run(command, check=False).returncode:
            raise UserError(f"the benchmark '{name}' failed with exit code {code}")


def _compare(options: Any) -> None:
    before, after = _read(options.before), _read(options.after)
    refuse_other_instructions(options, before, after)
    rows = compare(before, after, options.tolerance)
    if not rows:
        raise UserError(f"{options.before} and {options.after} have no timing in common")
    for name, ratio, slower in rows:
        print(f"{ratio:6.2f}x  {'SLOWER  ' if slower else '        '}{name}")
    slower_ones = sum(slower for *_, slower in rows)
    print(f"{slower_ones} of {len(rows)} timings are slower than before beyond the spread")
    sys.exit(1 if slower_ones else 0)


def main() -> None:
    """Dispatch to run or compare."""
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run benchmarks and write benchmarks/results/NAME.json")
    run.add_argument("names", nargs="+", choices=tuple(COMMANDS), metavar="NAME", help=", ".join(COMMANDS))
    against = commands.add_parser("compare", help="compare two results, flag what became slower")
    against.add_argument("before")
    against.add_argument("after")
    against.add_argument("--tolerance", type=float, default=0.05, help="share that counts as equal beside the spread")
    against.add_argument(
        "--across-instruction-sets",
        action="store_true",
        help="compare results of different or unknown instruction sets too",
    )
    options = parser.parse_args()
    if options.command == "run":
        _run(options.names)
    else:
        _compare(options)


if __name__ == "__main__":
    run_cli(main)

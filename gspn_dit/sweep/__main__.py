"""Choose guidance, its interval, the length of the EMA and the sampling shift of a checkpoint by successive halving.

    accelerate launch -m gspn_dit.sweep --checkpoint runs/NAME --reference REFERENCE --features inception --out sweep

Image i of every setting has the same class and noise. What is drawn is kept, so an interrupted sweep resumes with the
same bits, in however many processes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.locks import refuse_if_held
from gspn_dit.paths import path_argument
from gspn_dit.sampling_options import check_guidance, check_sampling_shift

OWN = "own"
LONGEST = 0.28
"""Relative length of an average, as in training.ema_sigma_rel."""


def parse_interval(text: str) -> tuple[float, float]:
    """Turn "LOW,HIGH" into two times."""
    low, _, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no interval; give it as LOW,HIGH, such as 0,0.8") from None


def parse_own(text: str) -> float | None:
    """Turn "own" into None, anything else into a number."""
    try:
        return None if text == OWN else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number; give own, or a number such as 0.1") from None


def build_parser() -> ArgumentParser:
    """The arguments of `python -m gspn_dit.sweep`."""
    parser = ArgumentParser(
        description="Choose how a checkpoint is sampled by a small fixed set of images.",
        formatter_class=argparse.HelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=path_argument, metavar="DIR", help="run directory or one checkpoint")
    add("--reference", required=True, type=path_argument, help="real images, as of python -m fid")
    add("--features", type=path_argument, metavar="NET",
        help="a bundled net, a file of fid.train_features, or inception (default: the data's bundled one)")  # fmt: skip
    add("--out", required=True, type=path_argument, metavar="DIR", help="directory of the sweep")
    add("--guidance-scales", type=float, nargs="+", default=[1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 4], metavar="W",
        help="(default: ten from 1 to 4)")  # fmt: skip
    add("--guidance-intervals", type=parse_interval, nargs="+", default=[(0.0, 1.0)], metavar="LOW,HIGH",
        help="times at which guidance acts (default: 0,1)")  # fmt: skip
    add("--ema", type=parse_own, nargs="+", default=[None], metavar="own|LENGTH",
        help="relative lengths of the EMA, made from the run's snapshots (default: own)")  # fmt: skip
    add("--sampling-shifts", type=parse_own, nargs="+", default=[None], metavar="own|S", help="(default: own)")
    add("--num-samples", type=int, default=2048, metavar="N",
        help="images of a setting in the last round, rounded up to a multiple of 64 (default: 2048)")  # fmt: skip
    add("--factor", type=int, default=4, help="what a round divides the settings by (default: 4)")
    add("--classes", default="all", help="ids, ranges and names, taken in turn (default: all)")
    add("--weights", choices=("ema", "model"), default="ema", help="the checkpoint's own (default: ema)")
    add("--vae", type=path_argument, metavar="NAME_OR_DIR", help="where the autoencoder lies now, if moved")
    add("--steps", type=int, dest="num_inference_steps", help="(default: those of the checkpoint's previews)")
    add("--sampler", help="(default: that of the checkpoint's previews)")
    add("--seed", type=int, default=0, help="of noise (default: 0)")
    add("--device", help="cpu, cuda, … (default: the accelerator if there is one, else cpu)")
    add("--resume", action="store_true", help="continue --out, or start it")
    add("--overwrite", action="store_true", help="replace the sweep that --out holds")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, and check what can be checked without the checkpoint; raises UserError."""
    options = build_parser().parse_args(arguments)
    for name, least in (("num_samples", 2), ("factor", 2), ("num_inference_steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = "--steps" if name == "num_inference_steps" else f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {value}, but must be at least {least}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}, but must lie in [0, 2^63)")
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    for length in options.ema:
        if length is not None and not 0 < length <= LONGEST:
            raise UserError(f"--ema is {length}, but must be own or lie in (0, {LONGEST}]")
    try:
        for scale in options.guidance_scales:
            for interval in options.guidance_intervals:
                check_guidance(scale if math.isfinite(scale) else math.inf, interval, None)
        for shift in options.sampling_shifts:
            check_sampling_shift(shift, "--sampling-shifts")
    except ValueError as error:
        raise UserError(str(error)) from None
    refuse_if_held(Path(options.out), "--out")
    return options


def main() -> None:
    """Parse, then import what sweeping needs."""
    options = parse_arguments()
    from gspn_dit.sweep.run import check_place, run

    check_place(Path(options.out), options.resume, options.overwrite)
    run(options)


def cli() -> None:
    """The command `gspn-sweep`."""
    run_cli(main, "what is there is kept; continue with --resume")


if __name__ == "__main__":
    cli()

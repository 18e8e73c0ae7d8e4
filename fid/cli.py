"""The command line of `python -m fid`; nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspn_dit.errors import ArgumentParser

if TYPE_CHECKING:
    from typing import Any


def build_parser() -> ArgumentParser:
    """The arguments of `python -m fid`."""
    parser = ArgumentParser(
        prog="python -m fid", description="Score generated images against real ones and write a report."
    )
    parser.add_argument(
        "--samples",
        required=True,
        help="generated images: a directory of PNGs (flat, or one sub-folder per class), or an NPZ "
        "(arr_0 uint8 NHWC, optionally arr_1 class ids)",
    )
    parser.add_argument(
        "--reference",
        required=True,
        help="real images: 'digits', an image folder, a data set saved with save_to_disk, a directory of PNGs, or "
        "an NPZ; a set with a validation split also gives the real images' own scores",
    )
    parser.add_argument(
        "--features",
        default="digits",
        help="feature net: 'digits' (bundled) or a file that fid.train_features wrote",
    )
    parser.add_argument("--out", required=True, help="directory of the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")
    parser.add_argument("--batch-size", type=int, default=256, help="images per forward pass of the feature net")
    parser.add_argument("--device", default="cpu", help="where the feature net runs: cpu, cuda, cuda:1, …")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subsets that KID draws")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, evaluate, print the scores."""
    options = build_parser().parse_args(arguments)
    from fid.images import require_samples
    from fid.report import prepare_directory

    prepare_directory(options.out, options.overwrite)  # both again in `evaluate`, seconds of imports later
    require_samples(options.samples)
    from fid.evaluation import evaluate

    report = evaluate(
        options.samples,
        options.reference,
        options.features,
        options.out,
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        device=options.device,
        seed=options.seed,
    )
    print(_summary(report))
    print(f"report: {options.out}")


def _summary(report: dict[str, Any]) -> str:
    from fid.report import score_rows

    return "\n".join(f"{name:<46}{'  '.join(cells)}" for name, *cells in score_rows(report))

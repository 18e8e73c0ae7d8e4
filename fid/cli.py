"""The command line of `python -m fid`; nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspn_dit.errors import ArgumentParser, UserError, advise_on_memory, run_cli
from gspn_dit.paths import path_argument
from gspn_dit.protocols import INCEPTION, PROTOCOLS, find_protocol

if TYPE_CHECKING:
    from typing import Any

INCEPTION_BATCH_SIZE = 64


def build_parser() -> ArgumentParser:
    """The arguments of `python -m fid`."""
    parser = ArgumentParser(
        formatter_class=argparse.HelpFormatter,  # the defaults are in the words below
        description="Score generated images against real ones and write a report; `python -m fid compare REPORT …` "
        "puts reports side by side.",
    )
    parser.add_argument(
        "--samples",
        required=True,
        type=path_argument,
        help="generated images: a directory of PNGs (<index>-<class id>.png, one sub-folder per class, or flat), or "
        "an NPZ (arr_0 uint8 NHWC, optionally arr_1 class ids)",
    )
    parser.add_argument(
        "--reference",
        required=True,
        type=path_argument,
        help="real images: 'digits', an image folder, a data set saved with save_to_disk, a directory of PNGs, or "
        "an NPZ, ADM's with mu and sigma too; a set with a validation split also gives the real images' own scores",
    )
    parser.add_argument("--protocol", help=f"net and every setting under a name: {', '.join(PROTOCOLS)}")
    parser.add_argument(
        "--features",
        type=path_argument,
        help="without --protocol: 'digits', a file that fid.train_features wrote, or a run of task classification",
    )
    parser.add_argument(
        "--also",
        type=path_argument,
        nargs="+",
        default=(),
        metavar="NET",
        help="further feature extractors for a Fréchet distance each, in the same pass: files, digits or inception",
    )
    parser.add_argument(
        "--paired",
        action="store_true",
        help="without --protocol: image i of --samples is a reconstruction of image i of --reference; PSNR and SSIM",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="directory of the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")
    parser.add_argument(
        "--weights", type=path_argument, help="file of the Inception net, if not at torch-fidelity's usual place"
    )
    parser.add_argument(
        "--allow-unknown-weights", action="store_true", help="take another Inception net; no score is called FID then"
    )
    parser.add_argument(
        "--dinov2", type=path_argument, metavar="DIR", help="local directory of a DINOv2 model, for FD-DINOv2 as well"
    )
    parser.add_argument(
        "--clip", type=path_argument, metavar="DIR", help="local directory of a CLIP, for the CLIP score and retrieval"
    )
    parser.add_argument(
        "--texts", type=path_argument, metavar="DIR", help="encoded captions (prepare.encode_text), for their retrieval"
    )
    parser.add_argument(
        "--held-out", type=path_argument, help="real images that are scored as if they were samples, for comparison"
    )
    parser.add_argument(
        "--cache", type=path_argument, metavar="DIR", help="where a protocol's features of real images are kept"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep no features of real images")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: 256, Inception 64)")
    parser.add_argument(
        "--device", default="cpu", help="where the nets run: cpu (default), cuda (each process its own), cuda:1, …"
    )
    parser.add_argument("--seed", type=int, help="of KID's subsets, without --protocol (default: 0)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, evaluate, print the scores."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["compare"]:
        from fid.compare import main as compare

        return compare(arguments[1:])
    options = build_parser().parse_args(arguments)
    if options.protocol and options.features:
        raise UserError(f"--protocol {options.protocol} brings its own feature extractor; leave --features out")
    if options.protocol and options.paired:
        raise UserError(f"--protocol {options.protocol} says itself whether images are paired; leave --paired out")
    if options.protocol and options.seed is not None:
        raise UserError(f"--protocol {options.protocol} brings its own seed; leave --seed out")

    protocol = find_protocol(options.protocol) if options.protocol else None
    from fid.images import require_samples
    from fid.report import prepare_directory

    prepare_directory(options.out, options.overwrite)  # both again in `evaluate`, seconds of imports later
    require_samples(options.samples)
    from fid.cache import default_directory
    from fid.evaluation import BATCH_SIZE, evaluate

    cache = None if options.no_cache else options.cache
    if protocol is not None and not options.no_cache and cache is None:
        cache = default_directory()
        if cache is None and os.environ.get("RANK", "0") == "0":
            print("features of real images are not kept: no home directory can be written; --cache DIR keeps them")
    large = protocol is not None and protocol.features == INCEPTION
    batch_size = options.batch_size if options.batch_size is not None else INCEPTION_BATCH_SIZE if large else BATCH_SIZE
    with advise_on_memory(f"--batch-size is {batch_size}; lower it; no report was written"):
        report = evaluate(
            options.samples,
            options.reference,
            options.features or "digits",
            options.out,
            protocol=options.protocol,
            weights=options.weights,
            allow_unknown_weights=options.allow_unknown_weights,
            dinov2=options.dinov2,
            clip=options.clip,
            texts=options.texts,
            also=tuple(options.also),
            paired=options.paired,
            held_out=options.held_out,
            cache=cache,
            overwrite=options.overwrite,
            batch_size=batch_size,
            device=options.device,
            seed=options.seed or 0,
            show_progress=True,
        )
    if report:
        print(_summary(report))
        print(f"report: {options.out}")


def _summary(report: dict[str, Any]) -> str:
    from fid.page import score_rows

    return "\n".join(f"{name:<46}{'  '.join(cells)}" for name, *cells in score_rows(report))


def cli() -> None:
    """The command `gspn-fid`."""
    run_cli(main, "no report was written")

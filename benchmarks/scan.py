"""Time the scan: share of memory bandwidth, ratio to the reference, to attention and to other mixers, scaling, memory.

    python benchmarks/scan.py --device cpu --json benchmarks/results/scan_cpu.json

Every share is the fewest bytes the scan can move (cuda/README.md) per second, over the bytes per second of a
`copy_` of float32 timed in turn with it, best run against best run. On a machine that others use, the share per
processor second (of all threads; set OMP_WAIT_POLICY=passive, so that waiting costs none) is steadier, but lower: two
threads of `copy_` that never run at once do not compete for memory. Nothing is printed unless the kernels agree with
the float64 reference first.

`mixers` compares whole mixers, their linear maps and the scan's logits and gates included, timed in turn: the scan by
its fused kernels and through memory, attention, linear attention, convolution.

Peak extra memory is how far the resident memory of a fresh process rises during one forward and backward above what it
held with the inputs in place. y and the five gradients are the same tensors for every backend, and at the peak all of
them are there: 22 times the size of x for four directions and per-channel weights. `memory_ratio` compares what a
backend needs beyond them; `memory_ratio_with_results` compares the whole rise, which no backend can bring below the
results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import scan_cases
from benchmarks.output import publish
from gspn_dit.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument(
        "--repeats",
        type=int,
        default=None,
        help="runs per figure; default 15 (fewer, but 5 or more, where they take long), 3 with --quick",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the report to FILE, or to standard output"
    )
    arguments = parser.parse_args()
    repeats = arguments.repeats or (3 if arguments.quick else 15)
    if arguments.device == "cuda":
        from benchmarks import scan_cuda

        report = scan_cuda.run(arguments.quick, repeats)
    else:
        report = scan_cases.run(arguments.device, arguments.quick, repeats)
    publish(report, None if arguments.json == "-" else arguments.json)


if __name__ == "__main__":
    run_cli(main)

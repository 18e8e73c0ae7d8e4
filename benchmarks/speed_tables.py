"""Tables and a plot of speed and memory: of mixers, of a block's activations, and of what the CUDA kernels move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import provenance, short, table

Result = dict[str, Any]


def mixers_table(result: Result) -> str:
    """Tabulate `benchmarks.mixers`: what was to be shown, then exponents and times against attention."""
    verdict = {True: "yes", False: "no", None: "not measured"}
    shown = [
        [row["target"], row["bound"], "" if row["value"] is None else short(row["value"]), verdict[row["met"]]]
        for row in result["targets"]
    ]
    names = result["times_faster_than_attention"]
    tokens = list(next(iter(names.values())))
    rows = [
        [name, variant, f"{slope:.3f}", *(_times(names[name][count].get(variant)) for count in tokens)]
        for name, exponents in result["exponents"].items()
        for variant, slope in exponents.items()
    ]
    heads = [f"{int(count):,} tokens" for count in tokens]
    targets = table(["to be shown", "bound", "measured", "met"], shown) + "\n"
    some = any(row["value"] is not None for row in result["targets"])
    return (
        (targets if some else "")
        + table(["forward + backward", "mixer", "exponent", *heads], rows)
        + "\nTimes as fast as attention, by number of tokens.\n\n"
        + table(["memory of forward + backward, MB", "mixer", *heads], _memory_rows(result, tokens))
        + f"\n{provenance(result)}\n"
    )


def _memory_rows(result: Result, tokens: Sequence[str]) -> list[list[str]]:
    """Return a row for each variant of each module: by how much memory rises at its peak, at each size."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for cell in result["cells"]:
        if cell.get("peak_extra_bytes"):
            peaks = found.setdefault((cell["name"], cell["variant"]), {})
            peaks[str(cell["tokens"])] = f"{cell['peak_extra_bytes'] / 1e6:,.0f}"
    return [[*names, *(peaks.get(count, "") for count in tokens)] for names, peaks in found.items()]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{short(ratio)}×"


def memory_table(result: Result) -> str:
    """Tabulate `benchmarks.memory`: a block's activations and time, and a step's peak, in three ways."""
    block, step = result["block"], result["step"]
    shape, saved, time = block["shape"], block["saved_bytes"], block["forward_backward"]
    where = f"a block of {shape['channels']} channels, {shape['batch']} × {shape['height']} × {shape['width']} tokens"
    recomputed = f"{saved['recomputed'] / 1e6:.1f} MB ({saved['ratio']:.2f} ×)"
    rows = [
        [f"saved by {where}, {shape['dtype']}", f"{saved['plain'] / 1e6:.1f} MB", recomputed, "its input"],
        ["forward + backward of that block", "1", f"{time['ratio_of_medians']:.2f} ×", ""],
        [
            f"peak of a {step['model']} step, batch {step['batch']}, {step['dtype']}, with AdamW",
            *(f"{size:.1f} GB" for size in step["peak_gigabytes"].values()),
        ],
    ]
    head = ["", "plain autograd", "recomputed (default)", "`activation_checkpointing: true`"]
    return table(head, rows) + f"\n{provenance(result)}\n"


def cuda_traffic_table(result: Result) -> str:
    """Tabulate `benchmarks.cuda_traffic`: bytes moved over the fewest possible, and by which kernels."""
    rows = [
        [row["arch"], str(row["shape"]), *(f"{part['bytes_ratio']:.2f} {part['regime']}" for part in both)]
        for row in result["rows"]
        for both in [(row["forward"], row["backward"])]
    ]
    head = ["architecture", "[B, H, W, C], G = C", "forward", "backward"]
    sums = [
        [
            row["sums"],
            str(row["forward_elements"]),
            f"{row['share_beyond_tolerance']:.1%}",
            short(row["largest_error_over_tolerance"]),
        ]
        for row in result["sums"]
    ]
    sums_head = ["sums in memory", "elements forwards", "y off by more than its rounding", "largest error, in those"]
    fused = result["projected"]
    return (
        table(head, rows)
        + "\n"
        + table(sums_head, sums)
        + f"\n{result['dtype']}, four directions. The fused projected scan at {fused['shape']}, P = "
        + f"{fused['proxy_channels']}: {fused['elements']['forward']:.1f} elements per token and channel forwards, "
        + f"{fused['elements']['backward']:.1f} backwards. "
        + f"Commit {result['software']['commit']}.\n"
    )


def plot_mixers(result: Result, figure: Any) -> None:
    """Draw how many times as fast as attention the scans are, by tokens."""
    names = result["times_faster_than_attention"]
    variants = dict.fromkeys(key for sizes in names.values() for ratios in sizes.values() for key in ratios)
    rows = math.ceil(len(names) / 3)
    figure.set_figheight(3.2 * rows)
    axes = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat
    for axis, (name, sizes) in zip(axes, names.items(), strict=False):
        for number, variant in enumerate(variants):
            line = {int(tokens): ratios[variant] for tokens, ratios in sizes.items() if variant in ratios}
            axis.loglog(list(line), list(line.values()), f"C{number}", marker="o", label=variant)
        axis.set(xlabel="tokens", title=name)
        axis.set_xticks([int(tokens) for tokens in sizes], [f"{int(tokens):,}" for tokens in sizes])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.axes[0].set(ylabel="times as fast as attention")

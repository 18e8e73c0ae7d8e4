"""Table and plot of what models draw beyond the training size."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.markdown import mean_and_interval, provenance, ratio_and_interval, short, table
from benchmarks.resolution import REAL
from benchmarks.study import interval, paired_ratio

Result = dict[str, Any]


def resolution_table(result: Result) -> str:
    """Tabulate `benchmarks.resolution`: every model at every size, means where it was trained with several seeds."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault((row["model"], row["scale"]), []).append(row)
    rows = [
        [model, f"{scale}×", str(own[0]["images"]), *(_seeds(own, key) for key in ("crop_fd", "class_agreement"))]
        for (model, scale), own in groups.items()
    ]
    setting = result["setting"]
    return (
        table(["model", "size", "images", "FD of crops", "class agreement"], rows)
        + f"\n{setting['crops']} crops of {result['size']}² pixels at each size, {setting['steps']} steps, guidance "
        + f"{setting['guidance_scale']}. {_real_sizes(result)}{provenance(result)}\n"
        + _paired_sizes(result)
    )


def _real_sizes(result: Result) -> str:
    """Say which crops are compared with those of real images of the same size."""
    own = [f"{row['scale']}×" for row in result["rows"] if row["model"] == REAL and row["scale"] > 1]
    return f"At {' and '.join(own)} crops are compared with crops of real images of that size. " if own else ""


def _paired_sizes(result: Result) -> str:
    """Tabulate, by size, the FD of scans over each rival's where both were trained with several seeds."""
    several = {row["model"] for row in result["rows"] if row.get("seed")}
    by_scale: dict[int, list[Result]] = {}
    for row in result["rows"]:
        if row["model"] in several:
            by_scale.setdefault(row["scale"], []).append({**row, "variant": row["model"]})
    contenders = {name: CONTENDERS.get(name.split(",")[0]) for name in sorted(several)}  # a comma: how it was drawn
    ours = {name: contender.ours for name, contender in contenders.items() if contender is not None}
    pairs = [(own, rival) for own, rival in itertools.product(ours, ours) if ours[own] and not ours[rival]]
    ratios = [
        [*pair, *(ratio_and_interval(paired_ratio(rows, "crop_fd", *pair)) for rows in by_scale.values())]
        for pair in pairs
    ]
    head = ["ours", "rival", *(f"FD of crops ÷ rival's, {scale}×" for scale in by_scale)]
    return f"\n{table(head, ratios)}" if ratios else ""


def _seeds(rows: list[Result], key: str) -> str:
    values = [row[key] for row in rows]
    if len(values) > 1:
        return mean_and_interval(interval(values))
    return short(values[0]) if key == "crop_fd" else f"{values[0]:.2f}"


def plot_resolution(result: Result, figure: Any) -> None:
    """Draw both figures against the size."""
    for axis, key, label in zip(
        figure.subplots(1, 2), ("crop_fd", "class_agreement"), ("FD of crops", "class agreement"), strict=True
    ):
        models: dict[str, dict[int, list[float]]] = {}
        for row in result["rows"]:
            models.setdefault(row["model"], {}).setdefault(row["scale"], []).append(row[key])
        for model, found in models.items():
            line = {scale: statistics.fmean(values) for scale, values in found.items()}
            if len(line) == 1:
                axis.axhline(*line.values(), color="black", linewidth=0.8, linestyle="--", label=model)
            else:
                axis.plot(list(line), list(line.values()), marker="o", label=model)
        axis.set(xlabel=f"size, over {result['size']}×{result['size']} pixels", ylabel=label, xscale="log")
        axis.set_xticks(list(line), [f"{scale}×" for scale in line])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axis.legend(fontsize="small")

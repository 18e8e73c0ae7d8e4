"""Tables and plots of studies of quality."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.markdown import mean_and_interval, plural, provenance, ratio_and_interval, short, table
from benchmarks.scoring import METRICS
from benchmarks.study import paired_ratio

RATIO = "paired_ratio_to_"

Result = dict[str, Any]

# -- at one learning rate --------------------------------------------------------------------------------------------


def baseline_of(summary: Result) -> str:
    """Return the variant that a budget's ratios divide by."""
    return next(key for key in summary if key.startswith(RATIO)).removeprefix(RATIO)


def quality_table(result: Result) -> str:
    """Tabulate a study of `benchmarks.one_rate`: every variant under every budget."""
    rows = []
    for budget, summary in result["budgets"].items():
        baseline = baseline_of(summary)
        for variant, means in summary["means"].items():
            cells = [cell for cell in result["cells"] if (cell["budget"], cell["variant"]) == (budget, variant)]
            ratios = summary[RATIO + baseline].get(variant)
            rows.append(
                [
                    budget,
                    variant,
                    f"{cells[0]['parameters']:,}",
                    f"{cells[0]['steps']:,}",
                    short(statistics.fmean(cell["training_seconds"] for cell in cells)),
                    *(ratio_and_interval(ratios[metric]) if ratios else "1" for metric in ("fd", "val_loss")),
                    *(mean_and_interval(means[metric]) for metric in METRICS),
                ]
            )
    head = ["budget", "model", "parameters", "steps", "seconds", f"FD ÷ {baseline}", f"loss ÷ {baseline}"]
    seeds, setting = len({cell["seed"] for cell in result["cells"]}), result["setting"]
    commits = ", ".join(sorted({cell["commit"] for cell in result["cells"]}))
    judge = result["cells"][0]["judge_validation_accuracy"]
    return (
        table([*head, *METRICS.values()], rows)
        + f"\n{plural(seeds, 'paired seed')}, {setting['samples']:,} samples each, {setting['steps']} steps, guidance "
        + f"{setting['guidance_scale']}, {setting['jobs']} at a time on one thread each. The judge of classes is right "
        + f"on {judge:.3f} of held-out images. {_without_first_seed(result)}Trained at {commits}. "
        + f"{provenance(result)}\n"
    )


def _without_first_seed(result: Result) -> str:
    """Say the FD ratios of the seeds on which no choice was made; nothing where few seeds are left."""
    found = []
    for budget, summary in result["budgets"].items():
        baseline = baseline_of(summary)
        own = [cell for cell in result["cells"] if cell["budget"] == budget and cell["seed"] > 0]
        for variant in summary[RATIO + baseline] if len({cell["seed"] for cell in own}) > 1 else ():
            ratio = ratio_and_interval(paired_ratio(own, "fd", variant, baseline))
            found.append(f"{variant} {ratio} ({budget})")
    return f"FD ÷ {baseline} without seed 0: {', '.join(found)}. " if found else ""


def plot_quality(result: Result, figure: Any) -> None:
    """Draw FDs, of each seed and with intervals, and the paired ratios, with a line where models are equal."""
    axes = dict(zip(("mean", "fd", "val_loss"), figure.subplots(1, 3, sharey=True), strict=True))
    variants = list(dict.fromkeys(cell["variant"] for cell in result["cells"]))
    for number, (budget, summary) in enumerate(result["budgets"].items()):
        ratios, colour = summary[RATIO + baseline_of(summary)], f"C{number}"
        places = {variant: place + 0.2 * number for place, variant in enumerate(variants)}
        own = [cell for cell in result["cells"] if cell["budget"] == budget]
        axes["mean"].plot(
            [cell["fd"] for cell in own], [places[cell["variant"]] for cell in own], ".", c=colour, alpha=0.3
        )
        _points(axes["mean"], {name: found["fd"] for name, found in summary["means"].items()}, places, colour, budget)
        for metric in ("fd", "val_loss"):
            _points(axes[metric], {name: found[metric] for name, found in ratios.items()}, places, colour, budget)
    for metric in ("fd", "val_loss"):
        axes[metric].axvline(1, color="black", linewidth=0.8)
        axes[metric].set(xlabel=f"{METRICS[metric]} ÷ {baseline_of(summary)}, 95%", title="left of 1 is better")
    axes["mean"].set(xlabel="FD, mean and 95%", title=f"{result['data']}, size {result['size']}")
    axes["mean"].set_yticks(range(len(variants)), variants)
    axes["mean"].invert_yaxis()
    axes["mean"].legend(fontsize="small")
    for axis in axes.values():
        axis.grid(True, axis="x", alpha=0.3)


def _points(axis: Any, found: dict[str, Any], places: dict[str, float], colour: str, label: str) -> None:
    """Draw means with their 95% intervals."""
    means = [interval["mean"] for interval in found.values()]
    errors = [[abs(interval["mean"] - interval[end]) for interval in found.values()] for end in ("low", "high")]
    axis.errorbar(means, [places[name] for name in found], xerr=errors, fmt="o", c=colour, capsize=3, label=label)

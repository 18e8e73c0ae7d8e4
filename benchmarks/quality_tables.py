"""Tables and plots of studies of quality: each model at its own best, or all at one learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contest import DRIFT
from benchmarks.markdown import mean_and_interval, plural, provenance, ratio_and_interval, short, table
from benchmarks.protocol import KINDS, UNWANTED
from benchmarks.scoring import METRICS
from benchmarks.study import paired_ratio

RATIO = "paired_ratio_to_"

Result = dict[str, Any]

# -- each at its own best --------------------------------------------------------------------------------------------


def fair_table(result: Result) -> str:
    """Tabulate `benchmarks.quality`: ratios of ours to each rival, what each found, and what the study did without."""
    tokens = {name: f"{name}, {found['tokens']:,} tokens" for name, found in result["data"].items()}
    ratios = [
        [
            *(tokens[row["data"]], f"{row['budget']}×, {row['kind']}", row["ours"], row["rival"]),
            *(_ratio(row[metric]) for metric in ("fd", "val_loss")),
            *(short(row["p_holm"], 2), str(row["diverged"])),
        ]
        for row in result["comparisons"]
    ]
    head = ["data", "budget", "ours", "rival", "FD ÷ rival's", "loss ÷ rival's", "p (Holm)", "diverged"]
    points = [_point(result, tokens, point) for point in result["curves"]]
    return f"{table(head, ratios)}\n{table(_POINT_HEAD, points)}\n{_conditions(result)}\n"


def _conditions(result: Result) -> str:
    setting, protocol, of = result["setting"], result["protocol"], result["data"]
    moved = ", ".join(name for name, found in of.items() if not found["time_held"])
    commits = ", ".join(sorted({cell["commit"] for found in of.values() for cell in found["cells"]}))
    dropped = ", ".join(f"{part['part']} ({name})" for name, found in of.items() for part in found["plan"]["dropped"])
    seconds = ", ".join(f"{found['seconds']:g} s ({name})" for name, found in of.items())
    samples = ", ".join(f"{found['samples']:,} samples ({name})" for name, found in of.items())
    nets = ", ".join(f"{_told_net(found['net'])} ({name})" for name, found in of.items() if "net" in found)
    without = [any(UNWANTED["options"](part["part"]) for part in found["plan"]["dropped"]) for found in of.values()]
    searched = "learning rates" if all(without) else "learning rates and options"
    return (
        f"Size {protocol['size']}, {plural(protocol['seeds'], 'paired seed')}, {searched} chosen on "
        f"{plural(protocol['search_seeds'], 'other')} by validation loss. {samples}, {setting['steps']} steps, "
        f"guidance {setting['guidance_scale']}. "
        + (f"FD is by the features of {nets}. " if nets else "")
        + f"A budget of 1× is, of the processor's time, {seconds}. "
        + (f"A step's time moved by more than 5 % on {moved}. " if moved else "")
        + _told_unequal(of)
        + (f"Dropped: {dropped}. " if dropped else "")
        + f"Trained at {commits}. {_machines(of)}"
    )


def _told_unequal(of: dict[str, Result]) -> str:
    """Say whose trainings took more or less of the clock, beside the first contender's, than was measured before."""
    told = []
    for name, found in of.items():
        shares = unequal_times(found)
        told += [f"{variant} {100 * share:+.0f} % ({name})" for variant, share in shares.items() if abs(share) > DRIFT]
    words = "By the clock, other work included, trainings at equal time took, beside the first model's: "
    return f"{words}{', '.join(told)}. " if told else ""


def unequal_times(found: Result) -> dict[str, float]:
    """Return by what share the clock's time of a step of each contender, over the first's, differs from what was
    measured before: the median over its trainings at equal time, so that other work beside one of them counts little.
    """
    share: dict[str, float] = {}
    for key, milliseconds in found["milliseconds_per_step"].items():
        variant = key.split()[0]
        cells = [cell for cell in found["cells"] if cell["variant"] == variant and not cell["diverged"]]
        cells = [cell for cell in cells if any(role.endswith(KINDS[0]) for role in cell["for"])]
        if cells:
            taken = statistics.median(1e3 * cell["training_seconds"] / cell["steps"] for cell in cells)
            share[variant] = taken / milliseconds
    first = next(iter(share.values()), 1.0)
    return {variant: value / first - 1 for variant, value in share.items()}


def _told_net(net: Result) -> str:
    """Name a feature extractor: its architecture where it is known, and the first digits of its hash."""
    return f"{net.get('architecture', net['score'])} {net['sha256'][:8]}"


def _machines(of: dict[str, Result]) -> str:
    """Say where the figures come from: once where it is the same for all data sets, or for each."""
    by_place: dict[str, list[str]] = {}
    for name, found in of.items():
        by_place.setdefault(provenance(found), []).append(name)
    if len(by_place) == 1:
        return next(iter(by_place))
    return " ".join(f"{', '.join(names)}: {place}" for place, names in by_place.items())


_POINT_METRICS = {name: title for name, title in METRICS.items() if name != "val_loss"}
_POINT_HEAD = [
    "data",
    "budget",
    "model",
    "learning rate",
    "steps",
    "seconds by the clock",
    "seeds",
    *_POINT_METRICS.values(),
]


def _point(result: Result, tokens: dict[str, str], point: Result) -> list[str]:
    """Return the row of a contender at a budget; a rate is marked where the best one tried lay at an end."""
    found, role = result["data"][point["data"]], f"{point['budget']}×, {point['kind']}"
    rates = found["search"][point["variant"]]["rates"]
    rate = rates[max((budget for budget in rates if int(budget) <= point["budget"]), key=int)]
    cells = [cell for cell in found["cells"] if cell["variant"] == point["variant"] and role in cell["for"]]
    steps = {cell["steps"] for cell in cells}
    seconds = [cell["training_seconds"] for cell in cells if not cell["diverged"]]
    return [
        *(tokens[point["data"]], role, point["variant"], f"{rate['best']:g}{'' if rate['inside'] else ' (at an end)'}"),
        *(", ".join(f"{count:,}" for count in sorted(steps)), short(statistics.fmean(seconds)) if seconds else ""),
        str(point["seeds"]),
        *(_mean(point.get(metric)) for metric in _POINT_METRICS),
    ]


def _known(found: Result | None) -> Result | None:
    """Return an interval with NaN where JSON has null."""
    return None if found is None else {key: math.nan if value is None else value for key, value in found.items()}


def _ratio(found: Result | None) -> str:
    known = _known(found)
    return "no pair" if known is None else ratio_and_interval(known)


def _mean(found: Result | None) -> str:
    known = _known(found)
    return "" if known is None else mean_and_interval(known)


_PLOTTED = {"fd": "FD", "val_loss": "loss"}


def plot_fair(result: Result, figure: Any) -> None:
    """Draw FD and loss: ratios by data set where there are several, and means against several budgets of one."""
    budgets: dict[str, set[int]] = {name: set() for name in result["data"]}
    for point in result["curves"]:
        if point["kind"] == "equal time":
            budgets[point["data"]].add(point["budget"])
    curves = [(name, metric) for name, found in budgets.items() if len(found) > 1 for metric in _PLOTTED]
    ratios = list(_PLOTTED) if len(budgets) > 1 or not curves else []
    axes = figure.subplots(1, len(ratios) + len(curves), squeeze=False)[0]
    for axis, metric in zip(axes, ratios, strict=False):
        _plot_ratios(result, axis, metric)
        axis.set(title=f"{_PLOTTED[metric]} ÷ rival's, 95%, below 1 scans are better")
    for (name, metric), axis in zip(curves, axes[len(ratios) :], strict=True):
        _plot_curves(result, axis, name, metric)
        axis.set(title=f"{_PLOTTED[metric]}, mean and 95%: {name}, {result['data'][name]['tokens']:,} tokens")
    for axis in axes:
        axis.grid(True, alpha=0.3)
        axis.title.set_fontsize("small")
        if axis.get_legend_handles_labels()[0]:  # none where no pair is finite
            axis.legend(fontsize="small")


def together(results: Sequence[Result]) -> Result:
    """Return several results of `benchmarks.quality` as one, for a picture of all."""
    return {
        "data": {name: found for result in results for name, found in result["data"].items()},
        "comparisons": [row for result in results for row in result["comparisons"]],
        "curves": [point for result in results for point in result["curves"]],
    }


def _plot_ratios(result: Result, axis: Any, metric: str) -> None:
    """Draw the ratio of ours to each rival, at the largest budget at equal time of each data set, by its tokens."""
    own = [row for row in result["comparisons"] if row["kind"] == "equal time" and row[metric] is not None]
    largest = {name: max((row["budget"] for row in own if row["data"] == name), default=0) for name in result["data"]}
    own = [row for row in own if row["budget"] == largest[row["data"]]]
    places = _places({name: result["data"][name]["tokens"] for name in largest})
    of_data = {name: [_pair(row) for row in own if row["data"] == name] for name in places}
    for pair in dict.fromkeys(map(_pair, own)):
        rows = [row for row in own if _pair(row) == pair]
        beside = [of_data[row["data"]].index(pair) - (len(of_data[row["data"]]) - 1) / 2 for row in rows]
        at = [places[row["data"]] + 0.16 * shift for row, shift in zip(rows, beside, strict=True)]
        _bars(axis, at, [_known(row[metric]) or {} for row in rows], pair, linestyle="none")
    axis.axhline(1, color="black", linewidth=0.8)
    names = [f"{name}, {result['data'][name]['tokens']:,} tokens" for name in places]
    axis.set_xticks(list(places.values()), names, rotation=20, ha="right")
    axis.tick_params(axis="x", labelsize="x-small")


def _pair(row: Result) -> str:
    return f"{row['ours']} ÷ {row['rival']}"


def _places(tokens: Mapping[str, int]) -> dict[str, float]:
    """Return where data sets lie on an axis of the logarithm of their tokens, those of as many tokens side by side."""
    places: dict[str, float] = {}
    for name in sorted(tokens, key=lambda name: tokens[name]):
        place = math.log2(tokens[name])
        places[name] = max([place, *(other + 1 for other in places.values())])
    return places


def _plot_curves(result: Result, axis: Any, name: str, metric: str) -> None:
    """Draw each contender's means of a metric against the seconds of training, on one data set at equal time."""
    own = [point for point in result["curves"] if point["data"] == name and point["kind"] == "equal time"]
    unit = result["data"][name]["seconds"]
    for variant in dict.fromkeys(point["variant"] for point in own):
        points = [point for point in own if point["variant"] == variant and point.get(metric)]
        _bars(
            axis,
            [point["budget"] * unit for point in points],
            [_known(point[metric]) or {} for point in points],
            variant,
        )
    axis.set(xlabel="seconds of training", xscale="log", yscale="log")
    seconds = sorted({point["budget"] * unit for point in own})
    axis.set_xticks(seconds, [f"{one:g}" for one in seconds])
    axis.tick_params(axis="x", which="minor", labelbottom=False)


def _bars(axis: Any, places: list[float], found: list[Result], label: str, linestyle: str = "solid") -> None:
    """Draw means with their 95% intervals, as a line or alone."""
    errors = [[abs(one["mean"] - one[end]) for one in found] for end in ("low", "high")]
    means = [one["mean"] for one in found]
    axis.errorbar(places, means, yerr=errors, marker="o", capsize=3, label=label, linestyle=linestyle)


def second_look_table(result: Result) -> str:
    """Tabulate `benchmarks.second_look`: the same ratios by other feature extractors, a table for each data set."""
    return "\n".join(_look_table(name, found) for name, found in result["data"].items())


def _look_table(name: str, found: Result) -> str:
    scores = list(dict.fromkeys(row["score"] for row in found["comparisons"]))
    pairs: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in found["comparisons"]:
        pairs.setdefault((row["kind"], row["ours"], row["rival"]), {})[row["score"]] = _ratio(row["ratio"])
    rows = [[*names, *(ratios[score] for score in scores)] for names, ratios in pairs.items()]
    setting = found["setting"]
    nets = ", ".join(f"{_told_net(net)} (FD-{net['score']})" for net in found["nets"] if "architecture" in net)
    return (
        table([name, "ours", "rival", *(f"{score} ÷ rival's" for score in scores)], rows)
        + f"\n{found['tokens']:,} tokens, the same {setting['samples']:,} samples of every seed "
        + f"and {setting['reference']:,} real images. "
        + (f"Features of {nets}. " if nets else "")
        + f"{provenance(found)}\n"
    )


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

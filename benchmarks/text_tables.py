"""Tables of docs/text_to_image.md: quality and distillation of `benchmarks.text_quality`, times of `text_to_image`."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import mean_and_interval, plural, provenance, ratio_and_interval, short, table
from benchmarks.text_judge import METRICS, SETS

Result = dict[str, Any]
TITLES = dict(zip(SETS, ("seen captions", "held-out pairs", "unseen captions"), strict=True))
SHOWN_AS = {"non-finite steps": "non-finite steps, in float32"}
"""Targets that say less in a result than a reader needs."""


def text_quality_table(result: Result) -> str:
    """Tabulate `benchmarks.text_quality`: scores of both mixers on the three sets, ratios, and the distillation."""
    parts = []
    budgets = result["budgets"]
    one = len({str(summary) for summary in budgets.values()}) == 1
    for budget, summary in list(budgets.items())[: 1 if one else None]:
        rows = [
            [_described(name, metric, result), *_scores(summary, name, metric)] for name in SETS for metric in METRICS
        ]
        rows.append(
            ["validation loss", *_values(summary, "val_loss"), ratio_and_interval(summary["ratios"]["val_loss"])]
        )
        head = ["equal time and equal steps" if one else budget, "scans", "attention", "÷, or difference"]
        parts.append(table(head, rows))
    return "\n".join([*parts, _setting(result), *([_distillation(result)] if result["distillation"] else [])])


def _described(name: str, metric: str, result: Result) -> str:
    among = {"retrieval": 1, "retrieval10": 10, "picture10": 10}.get(metric)
    if among is None:
        return f"{TITLES[name]}, {METRICS[metric]}"
    real = result["real"][name].get(metric, 1.0)
    return f"{TITLES[name]}, {METRICS[metric]} (chance {among / result['images'][name]:.3f}, real {real:.3f})"


def _values(summary: Result, key: str) -> list[str]:
    return [mean_and_interval(means[key]) for means in summary["means"].values()]


def _scores(summary: Result, name: str, metric: str) -> list[str]:
    key = f"{metric}_{name}"
    ratio, difference = summary["ratios"].get(key), summary["differences"].get(key)
    told = ratio_and_interval(ratio) if ratio else _signed(difference)
    return [*_values(summary, key), told]


def _signed(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _setting(result: Result) -> str:
    rates, setting = result["rates"], result["setting"]
    cells = {cell["variant"]: cell for cell in result["cells"] if cell["budget"] == "equal time"}
    tried = ", ".join(f"{float(rate):g}" for rate in next(iter(rates.values()))["losses"])
    runs = " and ".join(
        f"{cells[mixer]['steps']:,} steps in {short(cells[mixer]['processor_seconds'])} s at {found['best']:g} "
        f"with {mixer}"
        f"{', at an end of those tried' if found['at_an_end'] else ''}"
        for mixer, found in rates.items()
    )
    times = " and ".join(f"{short(value)} ms" for value in result["processor_milliseconds_per_step"].values())
    commits = ", ".join(sorted({cell["commit"] for cell in result["cells"]}))
    return (
        f"{plural(len(setting['seeds']), 'paired seed')}, means with 95 % intervals; FD is FD-lite0-pca16 and no FID. "
        f"Of a planned {short(setting['seconds'])} s of a processor a run: {runs}, the best of {tried} after "
        f"{setting['search_steps']} steps of another seed, whose double did not diverge; a step takes {times}. "
        f"{setting['sampler_steps']} steps of sampling, guidance {setting['guidance_scale']}. "
        f"Trained at {commits}. {provenance(result)}\n"
    )


def _distillation(result: Result) -> str:
    """Tabulate what the student and its control reach of their teacher."""
    found = result["distillation"]
    teacher, runs = found["teacher"], found["runs"]
    names = {"student": "distilled scans", "two steps": "control: the same, after two steps"}
    rows = [["teacher (attention)", f"{teacher['steps']:,}", *(short(teacher[f"fd_{name}"]) for name in SETS), "1"]]
    for who, title in names.items():
        fds = [short(runs[who][f"fd_{name}"]) for name in SETS]
        rows.append([title, f"{runs[who]['steps']:,}", *fds, f"{found['fd_ratios'][who]['train']:.3f}"])
    head = ["", "steps", *(f"FD, {TITLES[name]}" for name in SETS), "÷ teacher, seen"]
    targets: dict[str, Any] = found["targets"]
    shown = [
        [SHOWN_AS.get(name, name), short(value), short(bound), "yes" if value <= bound else "no"]
        for name, (value, bound) in targets.items()
    ]
    return (
        table(head, rows)
        + f"\nThe student trained for {short(found['processor_seconds'])} s, its teacher for "
        + f"{short(teacher['processor_seconds'])} s.\n\n"
        + table(["to be shown", "measured", "at most", "met"], shown)
    )


def text_to_image_table(result: Result) -> str:
    """Tabulate `benchmarks.text_to_image`: both layers by width and grid."""
    cells: dict[tuple[int, int, int], dict[str, Result]] = {}
    for entry in result["entries"]:
        height, width, channels = entry["shape"]
        cells.setdefault((channels, height, width), {})[entry["mixer"]] = entry
    rows = []
    for (channels, height, width), pair in cells.items():
        ratio = pair["attention"]["best_ms"] / pair["gspn"]["best_ms"]
        times, sizes = ([write(pair[mixer]) for mixer in ("attention", "gspn")] for write in (_time, _size))
        rows.append([str(channels), f"{height}×{width}", *times, f"{short(ratio)}×", *sizes])
    head = ["width", "tokens", "attention", "scans", "ratio", "memory, attention", "memory, scans"]
    whole = ""
    if "ratio" in result:
        whole = (
            "Attention at a 16384×8192 image's grids is extrapolated with the square of the tokens; over all 70 layers "
            f"the ratio is then {result['ratio']['value']:g}×. The paper's own figure gives "
            f"{result['ratio']['published_whole_image_on_an_A100']}× for the whole image on an A100, without steps or "
            "exact shape: the two are not alike. "
        )
    loads = [entry["load_average"] for entry in result["entries"] if "load_average" in entry]
    busy = f"Load average {min(loads):.1f} to {max(loads):.1f}. " if loads else ""
    grown = " and ".join(
        f"{found['attention']:.2f} with attention, {found['gspn']:.2f} with scans at width {width}"
        for width, found in result.get("exponents", {}).items()
    )
    power = f"Between the two largest square grids time grows with the tokens to the power of {grown}. "
    return table(head, rows) + f"\n{power if grown else ''}{whole}{busy}{provenance(result)}\n"


def _time(entry: Result) -> str:
    seconds = entry["best_ms"] / 1e3
    if seconds >= 3600:
        text = f"{seconds / 3600:.1f} h"
    else:
        text = f"{short(seconds)} s" if seconds >= 1 else f"{1e3 * seconds:,.0f} ms"
    return f"{text} (extrapolated)" if entry["extrapolated"] else text


def _size(entry: Result) -> str:
    return f"{entry['extra_bytes'] / 1e6:,.0f} MB" if entry.get("extra_bytes") else ""

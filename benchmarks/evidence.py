"""Tables and plots of docs/evidence.md, and tables of other pages, made from the results that are committed.

    python -m benchmarks.evidence

Rewrites what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` on a page from benchmarks/results/NAME.json,
prints it, and draws docs/evidence_NAME.png. No figure there is typed by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.backbones import backbones_table
from benchmarks.classification import classification_table
from benchmarks.highres import highres_table
from benchmarks.learning_curve import curve_table
from benchmarks.markdown import mean_and_interval, plural, provenance, ratio_and_interval, short, table
from benchmarks.scoring import METRICS
from benchmarks.speed_tables import cuda_traffic_table, memory_table, mixers_table, plot_mixers
from benchmarks.study import paired_ratio
from benchmarks.text_tables import text_quality_table, text_to_image_table
from gspn_dit.errors import ArgumentParser, UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
README, EVIDENCE, SCALE, KERNELS = "README.md", "docs/evidence.md", "docs/scale.md", "cuda/README.md"
OBJECTIVES, CLASSIFICATION = "docs/objectives.md", "docs/classification.md"
TEXT = "docs/text_to_image.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
RATIO = "paired_ratio_to_"
NOT_MEASURED = "Not measured yet.\n"

Result = dict[str, Any]


# -- tables ----------------------------------------------------------------------------------------------------------


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


def resolution_table(result: Result) -> str:
    """Tabulate `benchmarks.resolution`: every model at every size."""
    rows = [
        [row["model"], f"{row['scale']}×", str(row["images"]), short(row["crop_fd"]), f"{row['class_agreement']:.2f}"]
        for row in result["rows"]
    ]
    setting = result["setting"]
    return (
        table(["model", "size", "images", "FD of crops", "class agreement"], rows)
        + f"\n{setting['crops']} crops of {result['size']}² pixels at each size, {setting['steps']} steps, guidance "
        + f"{setting['guidance_scale']}. {provenance(result)}\n"
    )


def demo_table(result: Result) -> str:
    """Tabulate `benchmarks.demo_quality`: the demo's samples beside real held-out images."""
    scores, own = result["scores"], result["held_out"]
    words = {"class_agreement": "class agreement", "n": "images"}
    kept = [name for name in scores if name.startswith(("FD-", "IS-")) or name in ("precision", "recall", *words)]
    rows = [[words.get(name, name), *(_score(part[name]) for part in (scores, own))] for name in kept]
    run, setting = result["run"], result["setting"]
    return (
        table(["score", "samples", "real, held out"], rows)
        + f"\n{run['steps']:,} steps in {run['processor_seconds']:.0f} s of processor time on one thread, "
        + f"{setting['steps']} steps of sampling, guidance {setting['guidance_scale']}; {result['machine']['cores']} "
        + f"cores, torch {result['versions']['torch']}, commit {result['git_commit'][:7]}.\n"
    )


def digits_one_step_table(result: Result) -> str:
    """Tabulate `benchmarks.few_step --distilled`: a model of few steps beside the packaged one that it started from."""
    rows = [
        [
            cell["recipe"],
            str(cell["sampling_steps"]),
            *(short(cell[key]) for key in ("fd", "fd_ratio", "class_agreement", "recall")),
        ]
        for cell in result["cells"]
    ]
    speed = ", ".join(
        f"{way}: {one['images_per_second']:,.0f} ± {one['spread']:.0%}" for way, one in result["speed"].items()
    )
    setting = result["setting"]
    return (
        table(["model", "steps", "FD", "FD ÷ that of 50 steps", "class agreement", "recall"], rows)
        + f"\nOne seed, {setting['samples']:,} samples each, guidance {setting['guidance_scale']}. Images per second "
        + f"of the processor's time, by objective and steps: {speed}. {provenance(result)}\n"
    )


def few_step_table(result: Result) -> str:
    """Tabulate `benchmarks.few_step`: what was to be shown, FD by number of steps, and what drawing takes."""
    setting, found = result["setting"], result["summary"]
    agreement = "class_agreement" in result["cells"][0]
    shown = [
        [row["target"], row["bound"], f"{short(row['value'])} ({row['recipe']})", "yes" if row["met"] else "no"]
        for row in result["targets"]
    ]
    rows = [
        [
            recipe,
            str(next(cell["steps"] for cell in result["cells"] if cell["recipe"] == recipe)),
            count,
            mean_and_interval(of_steps["fd"]),
            ratio_and_interval(of_steps["fd_ratio"]),
            *([f"{of_steps['class_agreement']['mean']:.3f}"] if agreement else []),
        ]
        for recipe, by_steps in found.items()
        for count, of_steps in by_steps.items()
    ]
    speed = [[way, f"{one['images_per_second']:,.0f}", f"{one['spread']:.0%}"] for way, one in result["speed"].items()]
    seeds = len({cell["seed"] for cell in result["cells"]})
    head = ["recipe", "training steps", "steps", "FD", "FD ÷ velocity's in 50"]
    head += ["class agreement"] if agreement else []
    return (
        table(["to be shown", "bound", "best of equal training time", "met"], shown)
        + f"\n{table(head, rows)}\n{table(['objective, steps', 'images per second', 'spread'], speed)}"
        + f"\n{setting['model']}, {plural(seeds, 'paired seed')}, {setting['seconds']:g} s of one thread for equal "
        + f"training time, {setting['samples']:,} samples each, guidance {setting['guidance_scale']} (a velocity model "
        + f"is called twice a step). Trained at {', '.join(sorted({cell['commit'] for cell in result['cells']}))}. "
        + f"{provenance(result)}\n"
    )


def _score(value: Any) -> str:
    if isinstance(value, dict):
        return f"{short(value['mean'])} ± {short(value['std'], 2)}"
    return f"{value:,}" if isinstance(value, int) else short(value)


def recipes_table(result: Result) -> str:
    """Tabulate `benchmarks.recipes`: every recipe at its own best learning rate, beside the baseline."""
    names = list(next(iter(result["means"].values())))
    rows = []
    for recipe, means in result["means"].items():
        ratio = result["fd_over_baseline"].get(recipe)
        cell = next(cell for cell in result["cells"] if cell["variant"] == recipe)
        tried = ", ".join(f"{float(rate):g}" for rate in sorted(result["rates"][recipe]["losses"], key=float))
        of_means = [mean_and_interval(means[name]) for name in names]
        shown = ratio_and_interval(ratio) if ratio else "1"
        rows.append([recipe, f"{cell['rate']:g} of {tried}", f"{cell['steps']:,}", shown, *of_means])
    head = ["recipe", "learning rate", "steps", "FD ÷ baseline", *(METRICS[name] for name in names)]
    seeds, load = len({cell["seed"] for cell in result["cells"]}), result["machine"]["load"][0]
    guidance = result["setting"]["guidance_scale"]
    return (
        table(head, rows)
        + f"\n{result['seconds']} seconds of the processor for each training, {plural(seeds, 'paired seed')}, "
        + f"{result['setting']['samples']:,} samples each, {result['setting']['steps']} steps, "
        + ("no guidance" if guidance == 1 else f"guidance {guidance:g}")
        + "; rates "
        + f"chosen with another seed; other work beside it (load {load:.1f}). "
        + f"Trained at {result['cells'][0]['commit']}. "
        + f"{provenance(result)}\n"
    )


# -- plots -----------------------------------------------------------------------------------------------------------


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


def plot_resolution(result: Result, figure: Any) -> None:
    """Draw both figures against the size."""
    for axis, key, label in zip(
        figure.subplots(1, 2), ("crop_fd", "class_agreement"), ("FD of crops", "class agreement"), strict=True
    ):
        models: dict[str, dict[int, float]] = {}
        for row in result["rows"]:
            models.setdefault(row["model"], {})[row["scale"]] = row[key]
        for model, line in models.items():
            if len(line) == 1:
                axis.axhline(*line.values(), color="black", linewidth=0.8, linestyle="--", label=model)
            else:
                axis.plot(list(line), list(line.values()), marker="o", label=model)
        axis.set(xlabel="times the training size", ylabel=label, xscale="log")
        axis.set_xticks(list(line), [f"{scale}×" for scale in line])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    axis.legend(fontsize="small")


# -- the pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Where a result is shown, and how: benchmarks/results/NAME.json, drawn as docs/evidence_NAME.png."""

    page: str
    write: Callable[[Result], str]
    plot: Callable[[Result, Any], None] | None = None


STUDIES = {
    "mixers": Study(EVIDENCE, mixers_table, plot_mixers),
    "mixers_wide": Study(EVIDENCE, mixers_table, plot_mixers),
    "quality_digits": Study(EVIDENCE, quality_table, plot_quality),
    "quality_fashion": Study(EVIDENCE, quality_table, plot_quality),
    "quality_fashion_latents": Study(EVIDENCE, quality_table, plot_quality),
    "ablations": Study(EVIDENCE, quality_table, plot_quality),
    "ablations_block": Study(EVIDENCE, quality_table, plot_quality),
    "quality_fashion_block": Study(EVIDENCE, quality_table),
    "resolution": Study(EVIDENCE, resolution_table, plot_resolution),
    "digits_one_step": Study(OBJECTIVES, digits_one_step_table),
    "few_step": Study(OBJECTIVES, few_step_table),
    "few_step_emoji": Study(OBJECTIVES, few_step_table),
    "demo": Study(README, demo_table),
    "memory": Study(SCALE, memory_table),
    "cuda_traffic": Study(KERNELS, cuda_traffic_table),
    "recipes": Study(OBJECTIVES, recipes_table),
    "recipes_emoji": Study(OBJECTIVES, recipes_table),
    "backbones": Study(CLASSIFICATION, backbones_table),
    "classification_fashion": Study(CLASSIFICATION, classification_table),
    "classification_emoji": Study(CLASSIFICATION, classification_table),
    "classification_long": Study(CLASSIFICATION, curve_table),
    "highres": Study(TEXT, highres_table),
    "text_quality": Study(TEXT, text_quality_table),
    "text_to_image": Study(TEXT, text_to_image_table),
}


def read_results(directory: Path) -> dict[str, Result]:
    """Read the results of the studies that have been run."""
    files = {name: directory / f"{name}.json" for name in STUDIES}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def rewritten(page: str, text: str, results: dict[str, Result]) -> str:
    """Return a page's text with what stands between its markers rewritten; UserError for a study without a place."""
    own = [name for name, study in STUDIES.items() if study.page == page]
    if sorted(name for _, name, _ in BLOCK.findall(text)) != sorted(own):
        raise UserError(f"{page} must have one place <!-- begin NAME --> … <!-- end NAME --> each for {', '.join(own)}")

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        return found[1] + (STUDIES[name].write(results[name]) if name in results else NOT_MEASURED) + found[3]

    return BLOCK.sub(fill, text)


def draw(results: dict[str, Result], directory: Path) -> None:
    """Write evidence_NAME.png of every result that has a plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, result in results.items():
        plot = STUDIES[name].plot
        if plot is None:
            continue
        variants = {cell.get("variant") for cell in result.get("cells", [])}
        height = 1.6 + 0.45 * len(variants) if plot is plot_quality else 3.6
        figure = pyplot.figure(figsize=(10, height), layout="constrained")
        plot(result, figure)
        figure.savefig(directory / f"evidence_{name}.png", dpi=90)
        pyplot.close(figure)


def main() -> None:
    """Rewrite the pages, print their tables, draw the plots."""
    parser = ArgumentParser(prog="benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--no-plots", action="store_true", help="only the tables")
    options = parser.parse_args()
    results = read_results(RESULTS)
    for page in dict.fromkeys(study.page for study in STUDIES.values()):
        text = rewritten(page, (ROOT / page).read_text(encoding="utf-8"), results)
        (ROOT / page).write_text(text, encoding="utf-8")
        for found in BLOCK.finditer(text):
            print(found[0])
    if not options.no_plots:
        draw(results, ROOT / "docs")


if __name__ == "__main__":
    run_cli(main)

"""Tables of the studies of recipes and of few steps."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import mean_and_interval, plural, provenance, ratio_and_interval, short, table
from benchmarks.scoring import METRICS

Result = dict[str, Any]


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

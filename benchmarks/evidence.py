"""Tables and plots of docs/evidence.md, and tables of other pages, made from the results that are committed.

    python -m benchmarks.evidence

Rewrites what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` on a page from benchmarks/results/NAME.json,
prints it, and draws docs/evidence_NAME.png. No figure there is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.backbones import backbones_table
from benchmarks.block_tables import block_table, cost_table, rates_table
from benchmarks.classification import classification_table
from benchmarks.highres import highres_table
from benchmarks.learning_curve import curve_table
from benchmarks.markdown import short, table
from benchmarks.quality_tables import fair_table, plot_fair, plot_quality, quality_table, second_look_table, together
from benchmarks.recipe_tables import digits_one_step_table, few_step_table, recipes_table
from benchmarks.resolution_tables import plot_resolution, resolution_table
from benchmarks.speed_tables import cuda_traffic_table, memory_table, mixers_table, plot_mixers
from benchmarks.text_tables import text_quality_table, text_to_image_table
from gspn_dit.errors import ArgumentParser, UserError, run_cli

ROOT = Path(__file__).resolve().parent.parent
README, EVIDENCE, SCALE, KERNELS = "README.md", "docs/evidence.md", "docs/scale.md", "cuda/README.md"
OBJECTIVES, CLASSIFICATION = "docs/objectives.md", "docs/classification.md"
TEXT, QUALITY = "docs/text_to_image.md", "docs/quality.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"

Result = dict[str, Any]


# -- tables ----------------------------------------------------------------------------------------------------------


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


def _score(value: Any) -> str:
    if isinstance(value, dict):
        return f"{short(value['mean'])} ± {short(value['std'], 2)}"
    return f"{value:,}" if isinstance(value, int) else short(value)


# -- the pages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Where a result is shown, and how: benchmarks/results/NAME.json, drawn as docs/evidence_NAME.png."""

    page: str
    write: Callable[[Result], str]
    plot: Callable[[Result, Any], None] | None = None
    beside: tuple[str, ...] = ()
    """Other results of `benchmarks.quality` in the same picture."""


STUDIES = {
    "quality": Study(QUALITY, fair_table, plot_fair, beside=("quality_1024", "quality_4096")),
    "second_look": Study(QUALITY, second_look_table),
    "block": Study(QUALITY, block_table),
    "block_1024": Study(QUALITY, block_table),
    "block_1024_attention": Study(QUALITY, block_table),
    "block_1024_conv": Study(QUALITY, block_table),
    "block_1024_linear": Study(QUALITY, block_table),
    "block_attention": Study(QUALITY, block_table),
    "block_conv": Study(QUALITY, block_table),
    "block_linear": Study(QUALITY, block_table),
    "block_rates": Study(QUALITY, rates_table),
    "quality_1024": Study(QUALITY, fair_table),
    "second_look_1024": Study(QUALITY, second_look_table),
    "quality_4096": Study(QUALITY, fair_table),
    "quality_curve": Study(QUALITY, fair_table, plot_fair),
    "quality_sizes": Study(QUALITY, fair_table),
    "sizes": Study(QUALITY, resolution_table, plot_resolution),
    "cost": Study(QUALITY, cost_table),
    "mixers": Study(EVIDENCE, mixers_table, plot_mixers),
    "mixers_wide": Study(EVIDENCE, mixers_table, plot_mixers),
    "quality_claims": Study(EVIDENCE, fair_table),
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
        plot, beside = STUDIES[name].plot, [results[other] for other in STUDIES[name].beside if other in results]
        if plot is None:
            continue
        variants = {cell.get("variant") for cell in result.get("cells", [])}
        height = 1.6 + 0.45 * len(variants) if plot is plot_quality else 3.6
        figure = pyplot.figure(figsize=(10, height), layout="constrained")
        plot(together([result, *beside]) if beside else result, figure)
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

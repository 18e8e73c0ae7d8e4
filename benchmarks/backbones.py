"""Sizes of the classification models beside what is published of them and of their peers, and what their recipes take.

    python -m benchmarks.backbones --out benchmarks/results/backbones.json

Nothing is run: parameters and multiply-adds are counted, and memory is what a dry run of the recipe says.
"""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import table
from benchmarks.output import publish
from benchmarks.study import ROOT
from gspn_dit.errors import ArgumentParser, run_cli

SIZE = 224
PUBLISHED = {
    # Millions of parameters, 10⁹ multiply-adds at 224×224, top-1 on ImageNet-1K in %.
    "gspn_tiny": (30, 5.3, 83.0),
    "gspn_small": (50, 9.0, 83.8),
    "gspn_base": (89, 15.9, 84.3),
    "gspn2_tiny": (24, 4.2, 83.0),
    "gspn2_small": (50, 9.2, 84.4),
    "gspn2_base": (89, 14.2, 84.6),
}
"""Of arXiv 2501.12381 and, for the second three, arXiv 2512.07884, whose architectures this project had to guess."""
PEERS = {
    "Swin (2103.14030)": ((29, 4.5, 81.3), (50, 8.7, 83.0), (88, 15.4, 83.5)),
    "ConvNeXt (2201.03545)": ((29, 4.5, 82.1), (50, 8.7, 83.1), (89, 15.4, 83.8)),
    "VMamba (2401.10166)": ((22, 5.6, 82.2), (44, 11.2, 83.5), (89, 15.4, 83.9)),
    "MambaOut (2405.07992)": ((27, 4.5, 82.7), (48, 9.0, 84.1), (85, 15.8, 84.2)),
    "MambaVision (2407.08083)": ((32, 4.4, 82.3), (50, 7.5, 83.3), (98, 15.0, 84.2)),
}
"""Published figures of others, T, S and B."""
GPUS = 8


def count() -> dict[str, Any]:
    """Return parameters and multiply-adds of every preset, and what the recipes take."""
    import torch

    from benchmarks.measure import software
    from gspn_dit.config import load_config
    from gspn_dit.models.backbones import BACKBONES, create_backbone
    from gspn_dit.training.dry_run import estimate

    models = []
    for name, preset in BACKBONES.items():
        with torch.device("meta"):
            model = create_backbone(name)
        size = preset.image_size[0]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        own = {"name": name, "size": size, "parameters": parameters, "multiply_adds": model.multiply_adds(size, size)}
        models.append({**own, "published": PUBLISHED.get(name)})
    recipes = []
    for path in sorted((ROOT / "configs").glob("imagenet1k_*.yaml")):
        config = load_config(path)
        figures = estimate(config, GPUS)
        recipes.append(
            {
                "recipe": path.name,
                "steps": config.training.max_steps,
                "batch": config.training.batch_size,
                "flop": figures.training_flops * config.training.max_steps * config.training.batch_size,
                "micro_batch": figures.micro_batch,
                "memory_bytes": figures.memory.total,
                "checkpoint_bytes": figures.checkpoint_bytes,
            }
        )
    return {"gpus": GPUS, "models": models, "recipes": recipes, "peers": PEERS, "software": software()}


def backbones_table(result: dict[str, Any]) -> str:
    """Tabulate sizes, published figures and peers, then what the recipes take."""
    rows = []
    for model in result["models"]:
        published = model["published"]
        rows.append(
            [
                f"`{model['name']}`",
                f"{model['parameters'] / 1e6:.2f}M",
                f"{model['multiply_adds'] / 1e9:.2f}" + ("" if model["size"] == SIZE else f" at {model['size']}²"),
                *(("–", "–", "–") if published is None else _published(published)),
            ]
        )
    peers = [
        [f"{family}, {size}", "", "", *_published(figures)]
        for family, sizes in result["peers"].items()
        for size, figures in zip("TSB", sizes, strict=False)
    ]
    head = ["model", "parameters", "10⁹ multiply-adds at 224²", "published parameters", "10⁹", "top-1, %"]
    takes = [
        [
            f"`{row['recipe']}`",
            f"{row['steps']:,} × {row['batch']:,}",
            f"{row['flop']:.2e}",
            f"{row['memory_bytes'] / 1e9:.1f} GB ({row['micro_batch']} images)",
            f"{row['checkpoint_bytes'] / 1e9:.2f} GB",
        ]
        for row in result["recipes"]
    ]
    memory = f"memory on each of {result['gpus']} GPUs"
    return (
        table(head, [*rows, *peers])
        + "\n"
        + table(["recipe", "steps × images", "FLOP in all", memory, "a checkpoint"], takes)
        + f"\nCounted, not measured; commit {result['software']['commit']}.\n"
    )


def _published(figures: tuple[float, float, float]) -> tuple[str, str, str]:
    parameters, multiply_adds, top1 = figures
    return f"{parameters:g}M", f"{multiply_adds:.1f}", f"{top1:.1f}"


def main() -> None:
    """Count, print and write."""
    parser = ArgumentParser(prog="benchmarks.backbones", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    publish(count(), options.out)


if __name__ == "__main__":
    run_cli(main)

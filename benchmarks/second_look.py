"""The scored samples of a study of quality by other feature extractors, so that no claim hangs on one small net.

    python -m benchmarks.second_look --study benchmarks/results/quality.json --work runs/fair --data fashion \\
        --nets inception runs/fashion/features.safetensors --weights default_1.pt \\
        --beside benchmarks/results/second_look.json --out benchmarks/results/second_look.json

Every cell that the study scored at its largest budget common to all is compared with as many real images as before, or
as --reference says: by the Fréchet distance where there are more samples than features, by the kernel distance of
Inception's 2,048. Ratios of ours to each rival are paired by seed. What was found of other data sets is
kept by --beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import scoring
from benchmarks.contenders import CONTENDERS
from benchmarks.contest import Cell
from benchmarks.output import publish
from benchmarks.protocol import part_name
from benchmarks.scoring import DATA_SETS, DataSet
from benchmarks.study import paired_ratio
from gspn_dit.errors import ArgumentParser, UserError, run_cli

if TYPE_CHECKING:
    import torch

    from fid.features import FeatureNet

INCEPTION = "inception"


def load_net(source: str, weights: str | None) -> FeatureNet:
    """Return a feature extractor by file, run of task classification, or "inception", whose file is `weights`."""
    from fid.features import load_feature_net, load_inception

    return load_inception(weights) if source == INCEPTION else load_feature_net(source)


def features_of(net: FeatureNet, images: np.ndarray) -> torch.Tensor:
    """Return the features [n, d] of images, uint8 [n, H, W, C]."""
    from fid.extraction import extract_all
    from fid.labelled import LabelledImages

    (found,), _ = extract_all(LabelledImages(images, "images"), [net])
    return found.features


def distance(net: FeatureNet, drawn: torch.Tensor, real: torch.Tensor) -> tuple[str, float]:
    """Return what the distance of samples is called, and the distance; see the module."""
    from fid.metrics import frechet_distance, kernel_distances

    if len(drawn) > net.feature_dim:
        return net.names["fd"], frechet_distance(drawn, real)
    return net.names["kid"], float(kernel_distances(drawn, real, len(drawn) // 2).mean())


def scored_cells(study: Mapping[str, Any], data: DataSet) -> dict[str, list[Cell]]:
    """Return the cells of the largest budget that all contenders have, by kind; raises UserError if there are none."""
    if data.name not in study["data"]:
        raise UserError(f"--study has no {data.name}, but {', '.join(study['data'])}")
    cells = study["data"][data.name]["cells"]
    everyone = {cell["variant"] for cell in cells}
    for budget in sorted(study["protocol"]["budgets"], reverse=True):
        found: dict[str, list[Cell]] = {}
        for kind in ("equal time", "equal steps"):
            rows = [cell for cell in cells if part_name(budget, kind) in cell["for"] and not cell["diverged"]]
            if rows and {row["variant"] for row in rows} == everyone:
                found[part_name(budget, kind)] = [
                    Cell(data, row["variant"], tuple(row["options"].items()), row["rate"], row["steps"], row["seed"])
                    for row in rows
                ]
        if found:
            return found
    raise UserError(f"--study has no budget on {data.name} that all contenders were scored at")


def look(
    study: Mapping[str, Any], data: DataSet, nets: Sequence[FeatureNet], work: Path, reference: int
) -> list[dict[str, Any]]:
    """Return every cell's distances to so many real images by every net; raises UserError where samples are missing."""
    from gspn_dit.data.images import evenly_spaced

    real = data.load("train")
    pixels = real.pixels(evenly_spaced(len(real), reference))
    by_kind = scored_cells(study, data)
    files = {
        cell: cell.directory(work, study["protocol"]["size"]) / scoring.SAMPLES
        for cells in by_kind.values()
        for cell in cells
    }
    if missing := [file for file in files.values() if not file.exists()]:
        raise UserError(f"{missing[0]} is missing; --work must be the directory that the study was run in")
    rows = []
    for net in nets:
        known = features_of(net, pixels)
        found = {cell: distance(net, features_of(net, scoring.load_samples(file)), known)
                 for cell, file in files.items()}  # fmt: skip
        for kind, cells in by_kind.items():
            for cell in cells:
                name, value = found[cell]
                place = {"kind": kind, "variant": cell.contender, "seed": cell.seed}
                rows.append({**place, "score": name, "value": value})
                print(f"{place} {name}: {value:.4f}", flush=True)
    return rows


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratio of ours to each rival by kind and score, None where a distance is not positive."""
    table = []
    for kind, score in dict.fromkeys((row["kind"], row["score"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["score"]) == (kind, score)]
        there = list(dict.fromkeys(row["variant"] for row in own))
        positive = all(row["value"] > 0 for row in own)
        for ours in (name for name in there if CONTENDERS[name].ours):
            for rival in (name for name in there if not CONTENDERS[name].ours):
                ratio = paired_ratio(own, "value", ours, rival) if positive else None
                table.append({"kind": kind, "score": score, "ours": ours, "rival": rival, "ratio": ratio})
    return table


def beside(file: Path | None) -> dict[str, Any]:
    """Return what an earlier look found, by data set; nothing without one; raises UserError for a file that is none."""
    if file is None:
        return {}
    found = read_json(file, "--beside")
    looks = found.get("data") if isinstance(found, dict) else None
    if not isinstance(looks, dict) or not all("nets" in of for of in looks.values()):
        raise UserError(f"--beside {file} is not what benchmarks.second_look found; give its --out")
    return looks


def main(arguments: Sequence[str] | None = None) -> None:
    """Look at a study's samples."""
    from benchmarks.measure import CpuDevice, software

    parser = ArgumentParser(prog="benchmarks.second_look", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--study", type=Path, required=True, help="JSON of benchmarks.quality")
    parser.add_argument("--work", type=Path, default=Path("runs/fair"), help="where its cells live")
    parser.add_argument("--data", choices=tuple(DATA_SETS), default="digits", help="which of its data sets")
    parser.add_argument("--nets", nargs="+", required=True, metavar="NET", help="feature extractors: files of "
                        "fid.train_features, runs of task classification, or inception")  # fmt: skip
    parser.add_argument("--weights", help="file of inception, if not at torch-fidelity's usual place")
    parser.add_argument("--root", help="where the images lie, if not where docs/quality.md makes them")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--beside", type=Path, metavar="JSON", help="an earlier look, of which other data sets stay")
    parser.add_argument(
        "--reference", type=int, default=scoring.SETTING["reference"], help="real images, evenly spaced"
    )
    options = parser.parse_args(arguments)
    if options.reference < 2:
        raise UserError(f"--reference is {options.reference}, but must be at least 2")
    data, earlier = DATA_SETS[options.data].at(options.root, None), beside(options.beside)
    nets = [load_net(source, options.weights) for source in options.nets]
    rows = look(read_study(options.study), data, nets, options.work, options.reference)
    found = {
        "tokens": data.tokens,
        "nets": [scoring.told_of(net) for net in nets],
        "setting": {**data.setting, "reference": options.reference},
        "comparisons": compared(rows),
        "cells": rows,
        "machine": CpuDevice().describe(),
        "software": software(),
    }
    every = sorted({**earlier, data.name: found}.items(), key=lambda item: item[1]["tokens"])
    publish({"data": dict(every)}, options.out)


def read_json(file: Path, flag: str) -> Any:
    """Return what a file that an option names has; raises UserError where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file} cannot be read: {error}") from error


def read_study(file: Path, flag: str = "--study") -> dict[str, Any]:
    """Return a study that an option names; raises UserError for a file that is none."""
    found = read_json(file, flag)
    if not isinstance(found, dict) or not {"data", "protocol"} <= set(found):
        raise UserError(f"{flag} {file} is no study of benchmarks.quality; give its --out")
    return found


if __name__ == "__main__":
    run_cli(main)

"""The page of evidence says what the committed results say, and how figures are written."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence, markdown, quality_tables, recipe_tables, resolution_tables, speed_tables
from benchmarks.few_step import summary as few_step_summary
from benchmarks.one_rate import summary
from benchmarks.scoring import METRICS
from gspn_dit.errors import UserError

MACHINE = {"processor": "a chip", "cores": 2, "kernels": "kernels (AVX2)"}
SOFTWARE = {"torch": "2.0", "commit": "abc"}


def study(seeds: int = 3) -> dict[str, Any]:
    """A study whose gspn is 0, 10 and 21% worse than attention in FD, by seed."""
    cells = []
    for seed in range(seeds):
        for variant, factor in (("attention", 1.0), ("gspn", (1.0, 1.1, 1.21)[seed])):
            row = dict.fromkeys(METRICS, 0.5) | {"fd": (10.0 + seed) * factor, "training_seconds": 100.0 + seed}
            row |= {"commit": "1234567", "judge_validation_accuracy": 0.9}
            cells.append({**row, "variant": variant, "seed": seed, "steps": 1234, "budget": "60 s", "parameters": 5678})
    return {
        "data": "digits",
        "size": "N",
        "setting": {"samples": 1000, "steps": 30, "guidance_scale": 1.2, "jobs": 2},
        "cells": cells,
        "budgets": {"60 s": summary(cells, "attention")},
        "machine": MACHINE,
        "software": SOFTWARE,
    }


MIXERS = {
    "targets": [
        {"target": "a", "bound": "<= 1.1", "value": 1.0567, "met": True},
        {"target": "b", "bound": ">= 3", "value": None, "met": None},
    ],
    "exponents": {"mixer C=384": {"attention": 1.81, "gspn": 1.0}},
    "times_faster_than_attention": {
        "mixer C=384": {"256": {"attention": 1.0, "gspn": 0.5}, "16384": {"attention": 1.0}}
    },
    "cells": [
        {"name": "mixer C=384", "variant": "gspn", "tokens": 256, "peak_extra_bytes": 12_345_678},
        {"name": "mixer C=384", "variant": "gspn", "tokens": 16384, "skipped": "too long"},
    ],
    "device": MACHINE,
    "software": SOFTWARE,
}
RESOLUTION = {
    "size": 8,
    "setting": {"crops": 512, "steps": 15, "guidance_scale": 1.2},
    "rows": [
        {"model": "real", "scale": 1, "images": 360, "crop_fd": 0.321, "class_agreement": 0.98},
        *(
            {"model": "gspn", "scale": scale, "images": 64, "crop_fd": 12.34 * scale, "class_agreement": 1 / scale}
            for scale in (1, 2, 4)
        ),
    ],
    "machine": MACHINE,
    "software": SOFTWARE,
}


def rows(text: str) -> list[list[str]]:
    """Cells of every line of the tables in a text."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


PAGES = sorted({study.page for study in evidence.STUDIES.values()})


@pytest.mark.parametrize("page", PAGES)
def test_the_committed_page_is_what_the_committed_results_say(page: str) -> None:
    text = (evidence.ROOT / page).read_text()
    assert text == evidence.rewritten(page, text, evidence.read_results(evidence.RESULTS))


def test_every_picture_on_the_page_of_a_study_that_was_run_is_there() -> None:
    measured = evidence.read_results(evidence.RESULTS)
    page = evidence.ROOT / evidence.EVIDENCE
    for picture in re.findall(r"\]\((\w+\.png)\)", page.read_text()):
        name = picture.removesuffix(".png").removeprefix("evidence_")
        assert name not in measured or (page.parent / picture).exists(), picture


def test_numbers_have_three_digits_and_intervals_half_their_width() -> None:
    assert [markdown.short(x) for x in (0, 0.04567, -1.0, 9.999, 98.76, 12345.6)] == [
        *("0.00", "0.0457", "-1.00", "10.00", "98.8", "12,346")
    ]
    assert markdown.mean_and_interval({"mean": 9.87, "low": 9.0, "high": 10.74}) == "9.87 ± 0.87"
    assert markdown.mean_and_interval({"mean": 9.87, "low": math.nan, "high": math.nan}) == "9.87"
    assert markdown.ratio_and_interval({"mean": 1.1, "low": 0.9, "high": 1.3444}) == "1.100 [0.900, 1.344]"


def test_a_study_of_quality_by_hand() -> None:
    """Logs of the ratios are 0, a, 2a with a = log 1.1: mean a, standard error a/√3, and t(0.975, 2) is 4.303."""
    head, _, attention, gspn = rows(quality_tables.quality_table(study()))
    assert (attention[:7], head[5]) == (["60 s", "attention", "5,678", "1,234", "101", "1", "1"], "FD ÷ attention")
    low, high = (1.1 ** (1 + sign * 4.3027 / 3**0.5) for sign in (-1, 1))
    assert gspn[5:7] == [f"1.100 [{low:.3f}, {high:.3f}]", "1.000 [1.000, 1.000]"]
    assert attention[7].startswith("11.0 ± 2.5")  # FD 10, 11, 12: 4.303 / √3
    text = quality_tables.quality_table(study())
    assert "3 paired seeds, 1,000 samples each, 30 steps, guidance 1.2, 2 at a time" in text
    assert "a chip, 2 cores, kernels (AVX2); torch 2.0, commit abc." in text


def test_one_seed_has_no_interval() -> None:
    assert rows(quality_tables.quality_table(study(seeds=1)))[-1][5:8] == ["1.000", "1.000", "10.0"]


def test_few_steps_by_hand() -> None:
    """FD 2 and 4 in one step over 1 and 1 in many; the mean is 3, the ratio √8."""
    cells = [
        {"recipe": name, "sampling_steps": count, "seed": seed, "fd": fd, "class_agreement": 0.9}
        | {"steps": 700, "commit": "1234567"}
        for name, count, fds in (("velocity", 50, (1, 1)), ("flow_map, half + half", 1, (2, 4)))
        for seed, fd in enumerate(fds)
    ]
    result = {
        "setting": {"model": "a model", "samples": 1000, "seconds": 40.0, "guidance_scale": 1.5},
        "targets": [{"target": "a", "bound": "<= 2.0", "value": 2.828, "recipe": "b", "met": False}],
        "summary": few_step_summary(cells),
        "speed": {"flow_map, 1": {"images_per_second": 1234.5, "spread": 0.05}},
        "cells": cells,
        "machine": MACHINE,
        "software": SOFTWARE,
    }
    text = recipe_tables.few_step_table(result)
    assert ["a", "<= 2.0", "2.83 (b)", "no"] in rows(text)
    (row,) = (row for row in rows(text) if row[0].startswith("flow_map, half"))
    assert row[1:4] == ["700", "1", "3.00 ± 13"] and row[4].startswith("2.828 [") and row[5] == "0.900"
    assert ["flow_map, 1", "1,234", "5%"] in rows(text)
    assert "a model, 2 paired seeds, 40 s of one thread" in text and "Trained at 1234567. a chip" in text


def test_digits_in_one_step() -> None:
    cell = {"recipe": "some", "sampling_steps": 1, "fd": 2.0, "fd_ratio": 1.234, "class_agreement": 0.9, "recall": 0.5}
    result = {
        "setting": {"samples": 1000, "guidance_scale": 1.5},
        "cells": [cell],
        "speed": {"flow_map, 1": {"images_per_second": 1234.5, "spread": 0.05}},
        "machine": MACHINE,
        "software": SOFTWARE,
    }
    text = recipe_tables.digits_one_step_table(result)
    assert rows(text)[2] == ["some", "1", "2.00", "1.23", "0.900", "0.500"]
    assert "flow_map, 1: 1,234 ± 5%. a chip" in text


def test_mixers_and_resolution() -> None:
    text = speed_tables.mixers_table(MIXERS)
    assert ["a", "<= 1.1", "1.06", "yes"] in rows(text)
    assert rows(text)[3][-1] == "not measured"
    assert [cell for cell in rows(text)[-4] if cell] == ["mixer C=384", "gspn", "1.000", "0.500×"]
    assert [cell for cell in rows(text)[-1] if cell] == ["mixer C=384", "gspn", "12"]
    text = resolution_tables.resolution_table(RESOLUTION)
    assert ["gspn", "2×", "64", "24.7", "0.50"] in rows(text)
    assert "÷ rival's" not in text and "of that size" not in text
    real = {"model": "validation images", "scale": 2, "images": 64, "crop_fd": 0.5, "class_agreement": 0.9}
    text = resolution_tables.resolution_table({**RESOLUTION, "rows": [*RESOLUTION["rows"], real]})
    assert "At 2× crops are compared with crops of real images of that size." in text


def test_sizes_are_paired_by_seed() -> None:
    """FDs of 2 and 8 over 1 and 2 are ratios of 2 and 4; models of one seed are not compared."""
    found = {"attention, positions continued": (1.0, 2.0), "gspn2-free": (2.0, 8.0), "gspn": (9.0,)}
    figures = {"scale": 1, "images": 64, "class_agreement": 0.5}
    cells = [{"model": m, "seed": i, "crop_fd": fd, **figures} for m, fds in found.items() for i, fd in enumerate(fds)]
    *_, head, _, ours = rows(resolution_tables.resolution_table({**RESOLUTION, "rows": cells}))
    assert head == ["ours", "rival", "FD of crops ÷ rival's, 1×"]
    assert ours[:2] == ["gspn2-free", "attention, positions continued"]
    assert ours[2].startswith(f"{8**0.5:.3f} [")


MEMORY = {
    "block": {
        "shape": {"batch": 2, "height": 16, "width": 8, "channels": 900, "dtype": "float32"},
        "saved_bytes": {"plain": 50_000_000, "recomputed": 10_400_000, "ratio": 0.208},
        "forward_backward": {"ratio_of_medians": 1.104},
    },
    "step": {
        "model": "GSPN-B/2",
        "batch": 8,
        "dtype": "float32",
        "peak_gigabytes": {"plain": 10.36, "recomputed": 5.43, "checkpointed": 5.12},
    },
    "machine": MACHINE,
    "software": SOFTWARE,
}
TRAFFIC = {
    "dtype": "bfloat16",
    "rows": [
        {
            "arch": "sm_90",
            "shape": [1, 2, 3, 4],
            "forward": {"bytes_ratio": 1.1325, "regime": "cluster"},
            "backward": {"bytes_ratio": 1.5424, "regime": "long"},
        }
    ],
    "sums": [
        {
            "sums": "bfloat16",
            "forward_elements": 31,
            "share_beyond_tolerance": 0.2124,
            "largest_error_over_tolerance": 70.13,
        }
    ],
    "projected": {"shape": [1, 2, 3, 4], "proxy_channels": 5, "elements": {"forward": 4.812, "backward": 13.04}},
    "software": SOFTWARE,
}


def test_memory_and_traffic() -> None:
    saved, time, peak = rows(speed_tables.memory_table(MEMORY))[2:]
    assert saved[1:] == ["50.0 MB", "10.4 MB (0.21 ×)", "its input"] and "2 × 16 × 8 tokens" in saved[0]
    assert (time[1:3], peak[1:]) == (["1", "1.10 ×"], ["10.4 GB", "5.4 GB", "5.1 GB"])
    traffic = speed_tables.cuda_traffic_table(TRAFFIC)
    assert rows(traffic)[2] == ["sm_90", "[1, 2, 3, 4]", "1.13 cluster", "1.54 long"]
    assert rows(traffic)[5:] == [["bfloat16", "31", "21.2%", "70.1"]]
    assert "at [1, 2, 3, 4], P = 5: 4.8 elements per token and channel forwards, 13.0 backwards." in traffic


def test_the_demos_scores_stand_beside_those_of_real_images() -> None:
    scores = {"FD-digits": 0.2606, "KID-digits": {"mean": 0.0, "std": 0.1}, "IS-digits": {"mean": 9.8147, "std": 0.129}}
    result = {
        "scores": {**scores, "recall": 0.8455, "n": 1000},
        "held_out": {"FD-digits": 0.2252, "IS-digits": {"mean": 9.7955, "std": 0.1}, "recall": 0.9, "n": 360},
        "run": {"steps": 1500, "training_seconds": 593.6, "processor_seconds": 94.4},
        "setting": {"steps": 50, "guidance_scale": 1.2},
        "machine": {"cores": 2},
        "versions": {"torch": "2.0"},
        "git_commit": "0123456789",
    }
    text = evidence.demo_table(result)
    assert rows(text)[2:] == [
        ["FD-digits", "0.261", "0.225"],
        ["IS-digits", "9.81 ± 0.13", "9.80 ± 0.10"],
        ["recall", "0.846", "0.900"],
        ["images", "1,000", "360"],
    ]
    assert "1,500 steps in 94 s of processor time on one thread, 50 steps of sampling, guidance 1.2; 2 cores" in text
    assert text.endswith("torch 2.0, commit 0123456.\n")


OWN = [name for name, study in evidence.STUDIES.items() if study.page == evidence.EVIDENCE]


def text_of(*names: str) -> str:
    return "".join(f"before {name}\n<!-- begin {name} -->\nold\n<!-- end {name} -->\nafter\n" for name in names)


def test_only_what_stands_between_the_markers_changes() -> None:
    old = text_of(*OWN)
    new = evidence.rewritten(evidence.EVIDENCE, old, {"resolution": RESOLUTION})
    assert evidence.BLOCK.sub("", new) == evidence.BLOCK.sub("", old)
    blocks = {
        name: content for _, name, content, _ in re.findall(r"(<!-- begin (\w+) -->\n)(.*?)(<!-- end)", new, re.S)
    }
    assert blocks.pop("resolution") == resolution_tables.resolution_table(RESOLUTION)
    assert set(blocks.values()) == {evidence.NOT_MEASURED}
    assert evidence.rewritten(evidence.EVIDENCE, new, {"resolution": RESOLUTION}) == new


@pytest.mark.parametrize("names", [[], OWN[1:], [*OWN, "resolution"], [*OWN, "memory"], ["mixers", "other"]])
def test_every_study_has_one_place(names: list[str]) -> None:
    with pytest.raises(UserError, match=r"must have one place <!-- begin NAME --> .* each for mixers, mixers_wide"):
        evidence.rewritten(evidence.EVIDENCE, text_of(*names), {})


def test_data_sets_of_as_many_tokens_are_drawn_side_by_side() -> None:
    from matplotlib.figure import Figure

    def compared(name: str, mean: float) -> dict[str, Any]:
        ratio = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        kind = {"kind": "equal time", "budget": 4}
        return {"data": name, **kind, "ours": "scans", "rival": "attention", "fd": ratio, "val_loss": None}

    data = {"wide": {"tokens": 256}, "pixels": {"tokens": 64}, "latents": {"tokens": 64}}
    rows = [compared(name, mean) for name, mean in zip(data, (1.1, 0.9, 0.8), strict=True)]
    figure = Figure()
    quality_tables.plot_fair({"data": data, "curves": [], "comparisons": rows}, figure)
    ratios, losses = figure.axes
    assert [label.get_text() for label in ratios.get_xticklabels()] == [
        "pixels, 64 tokens",
        "latents, 64 tokens",
        "wide, 256 tokens",
    ]
    (drawn,) = ratios.containers
    assert sorted(zip(*drawn.lines[0].get_data(), strict=True)) == [(6, 0.9), (7, 0.8), (8, 1.1)]
    assert not losses.containers  # no pair is finite


def test_studies_of_one_picture_keep_their_rows() -> None:
    first = {"data": {"pixels": {"tokens": 64}, "wide": {"tokens": 256}}, "comparisons": [1, 2], "curves": [3]}
    second = {"data": {"wide": {"tokens": 256}}, "comparisons": [4], "curves": []}
    assert quality_tables.together([first, second]) == {
        "data": first["data"],
        "comparisons": [1, 2, 4],
        "curves": [3],
    }


def test_one_data_set_is_drawn_against_its_budgets() -> None:
    from matplotlib.figure import Figure

    def point(budget: int, kind: str, fd: float) -> dict[str, Any]:
        means = {metric: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for metric, mean in
                 (("fd", fd), ("val_loss", fd / 10))}  # fmt: skip
        return {"data": "digits", "variant": "scans", "kind": kind, "budget": budget, **means}

    data = {"digits": {"tokens": 16, "seconds": 8}}
    points = [point(1, "equal time", 5.0), point(4, "equal time", 3.0), point(4, "equal steps", 9.0)]
    figure = Figure()
    quality_tables.plot_fair({"data": data, "curves": points, "comparisons": []}, figure)
    drawn = [axis.containers[0].lines[0].get_data() for axis in figure.axes]
    assert [list(zip(*line, strict=True)) for line in drawn] == [[(8, 5.0), (32, 3.0)], [(8, 0.5), (32, 0.3)]]


def test_plots(tmp_path: Path) -> None:
    evidence.draw({"mixers": MIXERS, "quality_digits": study(), "resolution": RESOLUTION, "memory": MEMORY}, tmp_path)
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(drawn) == {f"evidence_{name}.png" for name in ("mixers", "quality_digits", "resolution")}
    assert all(10_000 < size < 150_000 for size in drawn.values())

"""Drawing beyond the training size: what is cut out, what is shrunk, how many, and the whole study on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import resolution
from benchmarks.one_rate import Cell
from benchmarks.resolution import Run
from benchmarks.scoring import DATA_SETS
from gspn_dit.config import Config
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from tests.models.conftest import lively
from tests.tiny import save_checkpoint


def numbered(count: int, side: int) -> np.ndarray:
    """Images whose three channels say which image, row and column a pixel is."""
    return np.stack(np.meshgrid(np.arange(count), np.arange(side), np.arange(side), indexing="ij"), axis=-1)


def test_crops_are_connected_squares_of_the_images_in_turn() -> None:
    cut = resolution.crops(numbered(3, 8), 4, 7)
    assert cut.shape == (7, 4, 4, 3)
    assert cut[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal(cut - cut[:, :1, :1], np.broadcast_to(numbered(1, 4), cut.shape))
    assert len({tuple(crop[0, 0]) for crop in cut}) == 7  # at different places
    assert np.array_equal(cut, resolution.crops(numbered(3, 8), 4, 7))


def test_crops_reach_every_border_and_are_the_image_where_it_is_no_larger() -> None:
    places = resolution.crops(numbered(1, 6), 4, 200)[:, 0, 0, 1:]
    assert {tuple(place) for place in places} == {(y, x) for y in range(3) for x in range(3)}
    assert np.array_equal(resolution.crops(numbered(2, 4), 4, 2), numbered(2, 4))


def test_shrinking_averages_and_rounds_half_up() -> None:
    image = np.array([[0, 1, 10, 10], [1, 0, 10, 10], [255, 255, 0, 0], [255, 254, 0, 1]], dtype=np.uint8)
    expected = np.array([[1, 10], [255, 0]])  # 0.5, 10, 254.75, 0.25
    assert resolution.shrunk(image[None, :, :, None], 2)[0, :, :, 0].tolist() == expected.tolist()


def test_as_many_pixels_at_every_size_but_so_many_images_at_least() -> None:
    assert [resolution.image_count(scale, 512, 64) for scale in (1, 2, 4)] == [512, 128, 64]
    assert [resolution.image_count(scale, 512, 16) for scale in (1, 2, 4)] == [512, 128, 32]
    assert [resolution.image_count(scale, 32, 64) for scale in (1, 2)] == [32, 32]


def test_fewer_images_than_classes_ask_for_classes_from_the_whole_list() -> None:
    assert resolution.labels_of(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert resolution.labels_of(18, 54).tolist() == list(range(0, 54, 3))
    assert resolution.labels_of(4, 10).tolist() == [0, 2, 5, 7]


def save_run(directory: Path, name: str) -> str:
    """Write a checkpoint of an untrained model of digits, small and with a life of its own."""
    arguments = {"name": name, "num_classes": 10, "latent_channels": 1, "latent_size": 8, "hidden_size": 16, "depth": 2}
    model = create_model(**arguments)  # type: ignore[arg-type]
    lively(model)
    manifest = {
        "model": arguments,
        "latent": {"name": "identity", "image_size": 8, "image_channels": 1},
        "class_names": [str(digit) for digit in range(10)],
        "config": Config().to_dict(),
    }
    save_checkpoint(directory, 1, {"ema": model.state_dict()}, manifest)
    return str(directory)


def test_the_study_from_checkpoints_to_json_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = [f"{name}={save_run(tmp_path / name, f'{family}-N/2')}" for name, family in (("a", "GSPN"), ("b", "DiT"))]
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = [
        "--runs",
        *runs,
        "--scales",
        "1",
        "2",
        "--samples",
        "80",
        "--steps",
        "1",
        "--out",
        str(out),
        "--picture",
        str(picture),
    ]
    monkeypatch.setattr(sys, "argv", ["resolution", *words])
    resolution.main()
    rows = {(row["model"], row["scale"]): row for row in json.loads(out.read_text())["rows"]}
    continued, interpolated = "b, positions continued", "b, positions interpolated"
    models = (resolution.REAL, "a", continued, interpolated)
    assert {name: [scale for model, scale in rows if model == name] for name in models} == {
        resolution.REAL: [1],
        **{name: [1, 2] for name in models[1:]},
    }
    assert [rows["a", scale]["images"] for scale in (1, 2)] == [80, 64]
    assert rows[continued, 1]["crop_fd"] == rows[interpolated, 1]["crop_fd"]
    assert rows[continued, 2]["crop_fd"] != rows[interpolated, 2]["crop_fd"]
    assert rows[resolution.REAL, 1]["class_agreement"] > 0.9
    assert all(
        row["crop_fd"] > 10 * rows[resolution.REAL, 1]["crop_fd"] for row in rows.values() if "b" in row["model"]
    )
    assert Image.open(picture).mode == "P"
    before, again = out.read_text(), [*words, "--models", "b", "--beside", str(out)]
    monkeypatch.setattr(sys, "argv", ["resolution", *again])
    resolution.main()
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]
    for wrong, problem in (
        (["--models", "c"], "--models names c, but there are a, b"),
        (["--steps", "2"], r"--beside .*out.json is no result of benchmarks.resolution on digits drawn in this way"),
    ):
        monkeypatch.setattr(sys, "argv", ["resolution", *again, *wrong])
        with pytest.raises(UserError, match=problem):
            resolution.main()


def test_what_is_drawn_again_takes_the_place_of_earlier_rows() -> None:
    earlier = [{"model": name, "scale": scale, "x": 0} for name in ("a, continued", "b") for scale in (1, 2)]
    new = [{"model": name, "scale": 1, "x": 1} for name in ("a, continued", "a, interpolated", "c")]
    assert resolution.joined(earlier, new) == [*new[:2], *earlier[1:], new[2]]


def test_larger_real_images_are_what_crops_are_compared_with() -> None:
    found = resolution.larger_images(["2=/some/where"], DATA_SETS["emoji-sizes"], 32)
    assert (found[2].images, found[2].image_size) == (("imagefolder", "/some/where"), 64)
    for word in ("1=some", "2=", "some/where"):
        with pytest.raises(UserError, match="takes SCALE=DIR, such as 2=data/emoji64_classes, of 2, 4"):
            resolution.larger_images([word], DATA_SETS["emoji-sizes"], 32)
    with pytest.raises(UserError, match="names images of 2 times the size twice"):
        resolution.larger_images(["2=a", "2=b"], DATA_SETS["emoji-sizes"], 32)


def test_a_model_that_was_trained_with_interpolated_positions_is_drawn_so_alone() -> None:
    model = create_model("DiT-N/2", 10, 1, 8, hidden_size=16, depth=2, positions=True)
    both = [("a, positions continued", False), ("a, positions interpolated", True)]
    assert resolution.ways("a", model) == both
    model.interpolate_positions = True
    assert resolution.ways("a", model) == [("a", True)]


def save_study(file: Path, data: str, *variants: str) -> Path:
    cells = [
        {"variant": variant, "seed": seed, "budget": budget, "steps": steps}
        for budget, seed, steps in (("9 s", 1, 70), ("9 s", 0, 70), ("80 steps", 0, 80))
        for variant in variants
    ]
    file.write_text(
        json.dumps({"data": data, "size": "N", "cells": cells, "budgets": {"9 s": {}, "80 steps": {}}}),
        encoding="utf-8",
    )
    return file


def test_studies_say_which_runs(tmp_path: Path) -> None:
    """The first seed's, for the first budget, of every study; all must be of the same images."""
    one = save_study(tmp_path / "one.json", "fashion", "gspn", "attention")
    more = save_study(tmp_path / "more.json", "fashion", "no-positions")
    other = save_study(tmp_path / "other.json", "digits", "gspn")
    data, runs = resolution.runs_of_studies([one, more], tmp_path)
    assert data == "fashion"
    assert runs == [
        Run(name, str(Cell("fashion", name, "N", 0, 70).directory(tmp_path) / "run"))
        for name in ("gspn", "attention", "no-positions")
    ]
    with pytest.raises(UserError, match=r"--study takes results of one data set, but these are of fashion, digits"):
        resolution.runs_of_studies([one, other], tmp_path)


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"study.json cannot be read as a study of benchmarks.one_rate: 'cells'"):
        resolution.runs_of_studies([tmp_path / "study.json"], tmp_path)


def test_a_run_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["resolution", "--runs", "runs/demo"])
    with pytest.raises(UserError, match="--runs takes NAME=DIR, such as gspn=runs/demo"):
        resolution.main()


def test_runs_of_one_name_are_of_several_seeds() -> None:
    assert resolution.named_runs(["a=x", "b=y", "a=z"]) == [Run("a", "x", 0), Run("b", "y", 0), Run("a", "z", 1)]


def test_runs_of_a_fair_study_are_those_that_it_scored_at_equal_time(tmp_path: Path) -> None:
    facts = {"options": {"positions": True}, "rate": 0.01, "diverged": False}
    cells = [
        {"variant": name, "seed": seed, "steps": steps, "for": [f"{budget}×, {kind}"], **facts}
        for name in ("attention", "gspn-normed")
        for seed in (0, 1)
        for budget, kind, steps in ((1, "equal time", 7), (1, "equal steps", 8), (4, "equal time", 28))
    ]
    study = {"protocol": {"size": "N", "budgets": [1, 4]}, "data": {"emoji-sizes": {"cells": cells}}}
    (tmp_path / "fair.json").write_text(json.dumps(study))
    runs = resolution.runs_of_fair_study(tmp_path / "fair.json", DATA_SETS["emoji-sizes"], tmp_path)
    assert [(run.model, run.seed) for run in runs] == [(n, s) for n in ("attention", "gspn-normed") for s in (0, 1)]
    assert runs[0].directory == str(tmp_path / "emoji-sizes/attention-N/positions=True/28-steps/rate-0.01/seed-0/run")

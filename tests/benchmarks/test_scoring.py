"""Data sets of studies: where options say that they lie, and what is refused of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.scoring import DATA_SETS, add_data_options, chosen
from gspn_dit.config import parse_train_arguments
from gspn_dit.errors import ArgumentParser, UserError


def options(*words: str, several: bool = False) -> argparse.Namespace:
    parser = ArgumentParser()
    add_data_options(parser, tuple(DATA_SETS), several)
    return parser.parse_args(words)


def make_emoji(root: Path, classes: int) -> Path:
    for split in ("train", "validation"):
        for number in range(classes):
            folder = root / split / f"class-{number}"
            folder.mkdir(parents=True)
            for place in range(40):
                pixels = np.random.default_rng((number, place)).integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{place}.png")
    return root


def test_places_are_those_of_the_pages_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(options()) == [DATA_SETS["digits"]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (emoji,) = chosen(options("--data", "emoji", "--root", "images", "--features", "run"))
    assert emoji.images == ("imagefolder", str(tmp_path / "images")) and emoji.features == str(tmp_path / "run")
    assert (emoji.classes, DATA_SETS["emoji"].classes) == (1, 54)
    words = ["--data", "emoji", "fashion", "digits", "--root", "emoji=images", "fashion=elsewhere"]
    several = chosen(options(*words, "--features", "fashion=run", several=True))
    assert several[0].images == emoji.images and several[0].features == DATA_SETS["emoji"].features
    assert several[1].images == ("hf", str(tmp_path / "elsewhere")) and several[1].features == str(tmp_path / "run")
    assert several[2] == DATA_SETS["digits"]


def test_a_cells_scores_are_of_the_places_that_the_study_was_told(tmp_path: Path) -> None:
    (told,) = chosen(options("--data", "emoji-1024", "--root", str(tmp_path), "--features", "digits"))
    assert chosen(options(*told.scoring_arguments())) == [told]
    assert chosen(options(*DATA_SETS["digits"].scoring_arguments())) == [DATA_SETS["digits"]]


@pytest.mark.parametrize(("name", "images"), [("fashion", 64), ("fashion-256", 32), ("emoji-1024", 8)])
def test_trainings_of_many_tokens_have_small_batches(name: str, images: int) -> None:
    assert parse_train_arguments(DATA_SETS[name].arguments()).config.training.batch_size == images


@pytest.mark.parametrize("name", DATA_SETS)
def test_trainings_read_what_is_scored(name: str) -> None:
    """Latents are trained on in place of the images."""
    one = DATA_SETS[name]
    data = parse_train_arguments(one.arguments()).config.data
    latents = name == "fashion-latents"
    assert (data.path == one.images[1]) is not latents
    assert data.image_size == one.image_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "digits", "--root", "x"], "--root is x, but digits are bundled; leave it out"),
        (["--data", "emoji", "fashion", "--root", "x"], "--root is x, but must be NAME=VALUE where there are several"),
        (["--data", "emoji", "--features", "emoji=x", "y"], "--features is y, but emoji is given twice"),
    ],
)
def test_places_that_are_no_data_sets(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(options(*words, several=True))


def test_a_study_is_told_beforehand_what_its_scores_would_stumble_over(tmp_path: Path) -> None:
    DATA_SETS["digits"].check()
    missing = DATA_SETS["emoji"].at(str(tmp_path / "none"), "digits")
    with pytest.raises(UserError, match=r"emoji: no images at .*/none; docs/quality.md makes them, or give --root"):
        missing.check()
    emoji = DATA_SETS["emoji"].at(str(make_emoji(tmp_path / "emoji", 2)), "digits")
    with pytest.raises(UserError, match=r"digits"):  # a net for 8×8 in grey
        emoji.check()
    with pytest.raises(UserError, match=r"emoji: .*/emoji has 2 classes, but 3 are planned for"):
        dataclasses.replace(emoji, classes=3).check()


def test_real_images_have_no_distance_from_themselves_whatever_classes_the_net_knows() -> None:
    digits = DATA_SETS["digits"]
    real = digits.load("train")
    rows = np.arange(len(real))
    figures = digits.scores(real.pixels(rows), real.labels + 20, len(real))
    assert figures["fd"] == pytest.approx(0, abs=1e-3) and figures["precision"] == figures["recall"] == 1
    assert figures["class_agreement"] == 0  # none is of the class that was asked for
    assert "class_agreement" not in dataclasses.replace(digits, judged=False).scores(
        real.pixels(rows[:200]), real.labels[:200], 200
    )

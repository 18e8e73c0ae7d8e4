"""The checkpoint in the package: small, found wherever a checkpoint is named, and its digits are those asked for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.judge import judge_agreement
from gspn_dit import GSPNPipeline
from gspn_dit.checkpoint import read_manifest, resolve_checkpoint
from gspn_dit.config import config_from_dict, parse_train_arguments
from gspn_dit.data.images import load_images
from gspn_dit.errors import UserError
from gspn_dit.generate import parse_arguments as parse_generate
from gspn_dit.generate import run as generate
from gspn_dit.sample import parse_arguments, run

NAME = "builtin:digits"
FOLDER = Path(__file__).parents[1] / "gspn_dit" / "builtin" / "digits"


def test_it_is_small_and_says_where_it_comes_from() -> None:
    assert resolve_checkpoint(NAME) == FOLDER
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in card and "Optical Recognition of Handwritten Digits" in card
    (command,) = re.findall(r"python train.py (.*)", card)
    trained = config_from_dict(read_manifest(FOLDER)["config"]).to_dict()
    assert parse_train_arguments(command.split()).config.to_dict() | {"output_dir": trained["output_dir"]} == trained


def test_sample_draws_the_digits_that_are_asked_for(tmp_path: Path) -> None:
    words = ["--checkpoint", NAME, "--classes", "0-9", "--per-class", "10", "--steps", "10", "--device", "cpu"]
    run(parse_arguments([*words, "--guidance-scale", "1.5", "--save-npz", str(tmp_path / "set.npz")]))
    with np.load(tmp_path / "set.npz") as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    agreement = judge_agreement(
        images, labels, load_images("digits", None, "train"), load_images("digits", None, "validation")
    )
    assert agreement["class_agreement"] >= 0.95
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_generate_and_the_pipeline_draw_the_same(tmp_path: Path) -> None:
    words = ["--checkpoint", NAME, "--num-samples", "3", "--labels", "balanced", "--steps", "2", "--device", "cpu"]
    generate(parse_generate([*words, "--out", str(tmp_path / "set.npz")]))
    with np.load(tmp_path / "set.npz") as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    for load in (GSPNPipeline.from_checkpoint, GSPNPipeline.from_pretrained):
        again = load(NAME)(labels.tolist(), num_inference_steps=2, output_type="np").images
        assert np.array_equal(again, images)


@pytest.mark.parametrize("load", [GSPNPipeline.from_checkpoint, GSPNPipeline.from_pretrained, resolve_checkpoint])
@pytest.mark.parametrize(
    "name, hint", [("builtin:digit", "; did you mean 'digits'"), ("builtin:", ""), ("builtin:..", "")]
)
def test_another_name_is_refused(load: object, name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load(name)  # type: ignore[operator]
    assert str(caught.value).startswith(f"there is no checkpoint {name} in the package{hint}")
    assert str(caught.value).endswith("there is builtin:digits")

"""Kinds of data: what each gives, who refuses an unknown one, and a toy that is registered here and trains."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest
from PIL import Image

from fid.images import read_reference
from gspn_dit.config import DataConfig, config_from_dict, parse_train_arguments
from gspn_dit.data import load_images
from gspn_dit.data.build import build_data
from gspn_dit.data.facts import data_facts
from gspn_dit.data.image_sources import Parts
from gspn_dit.data.images import open_source
from gspn_dit.data.sources import SOURCES, Source, find_source
from gspn_dit.errors import UserError


def read_squares(path: str | os.PathLike[str] | None) -> Parts:
    """Twelve 8×8 images: two classes, dark and bright."""
    assert path is None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    columns = {"image": [Image.new("L", (8, 8), 200 * (i % 2) + i) for i in range(12)], "label": [0, 1] * 6}
    return Parts({"all": datasets.Dataset.from_dict(columns, features=features)}, "a toy")


def test_a_toy_source_trains_and_is_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One entry, made here: config, training, evaluation, dry run and command lines know it."""
    from tests.training.conftest import run_training

    monkeypatch.setitem(SOURCES, "squares", Source(images=read_squares, bundled=True))
    config = config_from_dict(
        {
            "output_dir": str(tmp_path / "run"),
            "data": {"name": "squares", "validation_fraction": 0.25},
            "model": {"name": "GSPN-N/4", "hidden_size": 16, "depth": 2},
            "sampling": {"steps": 1, "per_class": 1},
            "training": {"max_steps": 2, "batch_size": 4, "trackers": []},
        }
    )
    run_training(config)
    printed = capsys.readouterr().out
    assert "data    squares: 9 images of 2 classes, 8x8 grey; 3 more for validation" in printed
    assert "left out: a toy" in printed and "step 2: validation loss" in printed
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002"]
    assert read_reference("squares", None).images.pixels.shape == (12, 8, 8, 1)
    opened = open_source("squares", None)
    assert len(opened) == 12
    assert opened.describe() == "squares: 12 images of 2 classes, 8x8 grey\nleft out: a toy"
    assert data_facts(config).images == 9


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    message = r"unknown data\.name 'digit'; allowed are digits, imagefolder, hf, latents; did you mean 'digits'\?"
    config = parse_train_arguments(["--data.name", "digit", "--output_dir", str(tmp_path / "run")]).config
    for look in (build_data, data_facts):
        with pytest.raises(UserError, match=message):
            look(config)
    with pytest.raises(UserError, match=message):
        find_source("digit")
    with pytest.raises(UserError, match=r"no image set named 'latents'; allowed are 'digits', 'imagefolder', 'hf'$"):
        load_images("latents", tmp_path)


@pytest.mark.parametrize("name", ["digits", "imagefolder", "latents"])
def test_what_cannot_be_streamed_says_so(name: str) -> None:
    config = config_from_dict({"data": {"name": name, "streaming": True, "path": "x"}})
    assert config.data == DataConfig(name=name, streaming=True, path="x")
    with pytest.raises(UserError, match=f"data.streaming is for data.name hf, not {name}"):
        build_data(config)

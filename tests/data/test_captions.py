"""Captioned sets: what folders and data sets with text become, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from gspn_dit.config import DataConfig
from gspn_dit.data.captions import caption_variants, load_captioned
from gspn_dit.errors import UserError


def write_images(folder: Path, count: int, first: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(first, first + count)]
    for number, name in enumerate(names, first):
        PILImage.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return names


def write_metadata(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of splits; its training images have one caption, or two."""
    for split, count, first in (("train", 4, 0), ("val", 2, 10), ("pairs", 3, 20)):
        names = write_images(tmp_path / "set" / split, count, first)
        rows = [{"file_name": name, "text": f"picture {name}", "texts": ["a", f"b {name}"]} for name in names]
        write_metadata(tmp_path / "set" / split, rows)
    return tmp_path / "set"


def config(path: Path, name: str = "imagefolder", **options: Any) -> DataConfig:
    return DataConfig(name=name, path=str(path), **options)


@pytest.mark.parametrize("split, first, count", [("train", 0, 4), ("validation", 10, 2), ("pairs", 20, 3)])
def test_each_split_has_its_images_and_captions(folder: Path, split: str, first: int, count: int) -> None:
    captioned = load_captioned(config(folder), split)
    assert captioned.captions == [(f"picture {number}.png",) for number in range(first, first + count)]
    assert captioned.images.pixels()[:, 0, 0, 0].tolist() == list(range(first, first + count))
    assert captioned.images.image_size == 8 and captioned.images.has_validation


def test_what_no_caption_names_is_said(folder: Path) -> None:
    write_images(folder / "train", 2, 30)
    write_images(folder / "train" / "@eaDir", 1)
    (folder / "train" / "notes.txt").write_text("x")
    assert load_captioned(config(folder)).images.remarks == (
        "left out: hidden or system folders: 1 (@eaDir), unread files: 1 (.txt), images without a caption: 2 "
        "(30.png, 31.png)",
    )
    assert load_captioned(config(folder), "validation").images.remarks == ()


def test_an_image_can_have_several_captions(folder: Path) -> None:
    captioned = load_captioned(config(folder, caption_column="texts"))
    assert captioned.captions[3] == ("a", "b 3.png")
    assert captioned.texts() == ["a", "b 0.png", "b 1.png", "b 2.png", "b 3.png"]
    assert captioned.fingerprint() != load_captioned(config(folder)).fingerprint()


def test_one_folder_is_split(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": name} for name in write_images(tmp_path, 10)]
    write_metadata(tmp_path, rows)
    parts = [load_captioned(config(tmp_path, validation_fraction=0.2), split) for split in ("train", "validation")]
    texts = [part.texts() for part in parts]
    assert [len(part) for part in texts] == [8, 2] and sorted(texts[0] + texts[1]) == sorted(r["text"] for r in rows)
    for part in parts:  # captions stay with their images
        assert [int(text[0].split(".")[0]) for text in part.captions] == part.images.pixels()[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("several", [False, True])
def test_a_saved_data_set_with_a_text_column(tmp_path: Path, several: bool) -> None:
    captions: list[Any] = [["x", "y"], ["z"], ["w"]] if several else ["x", "z", "w"]
    kind = List(Value("string")) if several else Value("string")
    rows = {"picture": [np.full((8, 8, 3), n, np.uint8) for n in range(3)], "caption": captions}
    features = Features({"picture": Image(), "caption": kind})
    rows["picture"] = [PILImage.fromarray(array) for array in rows["picture"]]
    DatasetDict({split: Dataset.from_dict(rows, features=features) for split in ("train", "test")}).save_to_disk(
        str(tmp_path / "saved")
    )
    captioned = load_captioned(config(tmp_path / "saved", "hf", caption_column="caption"), "validation")
    assert captioned.captions == ([("x", "y"), ("z",), ("w",)] if several else [("x",), ("z",), ("w",)])
    assert captioned.images.pixels()[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"file_name": "0.png"}, r"line 1 of .* \(0.png\) has no 'text' \(it has: \)"),
        ({"file_name": "0.png", "caption": "x"}, r"has no 'text' \(it has: caption\); set data.caption_column"),
        ({"file_name": "0.png", "text": "  "}, r"\(0.png\) has an empty caption"),
        ({"file_name": "0.png", "text": []}, r"\(0.png\) has an empty caption"),
        ({"file_name": "0.png", "text": 3}, "'text' is 3, but must be a text or a list of texts"),
        ({"file_name": "1.png", "text": "x"}, "line 1 of .* names 1.png, which is not in"),
        ({"text": "x"}, "line 1 of .* has no file_name"),
    ],
)
def test_metadata_that_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write_images(tmp_path, 1)
    write_metadata(tmp_path, [row])
    with pytest.raises(UserError, match=message):
        load_captioned(config(tmp_path))


def test_other_sets_that_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r'no metadata.jsonl with captions; .*: \{"file_name": "cat.png"'):
        load_captioned(config(folder / "train" / ".." / ".."))
    with pytest.raises(UserError, match="has no split 'pears'; it has pairs, train, val"):
        load_captioned(config(folder), "pears")
    with pytest.raises(UserError, match=r"data.name digits has no captions"):
        load_captioned(DataConfig())
    (folder / "train" / "metadata.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"metadata.jsonl cannot be read"):
        load_captioned(config(folder))
    rows = {"image": [PILImage.new("RGB", (8, 8))], "captoin": ["x"]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "captoin": Value("string")})).save_to_disk(
        str(tmp_path / "saved")
    )
    with pytest.raises(UserError, match=r"has no column 'caption' of captions .* did you mean 'captoin'"):
        load_captioned(config(tmp_path / "saved", "hf", caption_column="caption"))


def test_variants_depend_on_the_sample_number_alone() -> None:
    all_at_once = caption_variants(3, range(1000), [4] * 1000)
    assert np.array_equal(all_at_once[500:510], caption_variants(3, range(500, 510), [4] * 10))
    assert (np.bincount(all_at_once) > 200).all() and set(all_at_once) == set(range(4))
    assert caption_variants(3, range(5), [1] * 5).tolist() == [0] * 5

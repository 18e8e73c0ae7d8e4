"""Emoji as classes of design and group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from gspn_dit.data.images import load_images
from gspn_dit.errors import UserError
from gspn_dit.prepare.emoji_classes import arrange


def write_set(folder: Path) -> Path:
    """Two designs of two emoji for training, one of another for validation; the brightness says which is which."""
    for split, rows in {
        "train": [("noto", "food", 10), ("noto", "flags", 20), ("twemoji", "food", 30), ("twemoji", "flags", 40)],
        "validation": [("noto", "food", 50), ("twemoji", "flags", 60)],
    }.items():
        lines = []
        for style, group, bright in rows:
            path = folder / split / group / f"{style}-{bright}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (bright,) * 3).save(path)
            lines.append(json.dumps({"file_name": f"{group}/{path.name}", "style": style, "group": group}) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    (folder / "ATTRIBUTION.md").write_text("by whom")
    return folder


def test_each_pair_of_design_and_group_is_a_class(tmp_path: Path) -> None:
    assert arrange(write_set(tmp_path / "emoji"), tmp_path / "classes") == 4
    images = load_images("imagefolder", str(tmp_path / "classes"), "train")
    assert images.class_names == ["noto, flags", "noto, food", "twemoji, flags", "twemoji, food"]
    assert images.pixels(range(4))[:, 0, 0, 0].tolist() == [20, 10, 40, 30] and list(images.labels) == [0, 1, 2, 3]
    assert (tmp_path / "classes" / "ATTRIBUTION.md").read_text() == "by whom"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes", "emoji"]


@pytest.mark.parametrize("spoil", ["nothing", "no metadata", "not JSON", "no style", "no picture"])
def test_what_is_no_such_set_is_refused_and_nothing_is_written(spoil: str, tmp_path: Path) -> None:
    data = tmp_path / "emoji"
    metadata = data / "train" / "metadata.jsonl"
    if spoil != "nothing":
        write_set(data)
    if spoil == "no metadata":
        metadata.unlink()
    elif spoil == "not JSON":
        metadata.write_text("emoji\n")
    elif spoil == "no style":
        metadata.write_text('{"file_name": "a.png", "group": "food"}\n')
    elif spoil == "no picture":
        (data / "train" / "food" / "noto-10.png").unlink()
    with pytest.raises(UserError, match="cannot be written" if spoil == "no picture" else "is no set of python -m"):
        arrange(data, tmp_path / "classes")
    assert not [path for path in tmp_path.iterdir() if path != data]


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    with pytest.raises(UserError, match="exists; give another name"):
        arrange(write_set(tmp_path / "emoji"), tmp_path / "classes")

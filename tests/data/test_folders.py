"""Folders as they lie on people's disks: what is read, what is left out and said, and what is refused."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from gspn_dit.data import load_images
from gspn_dit.data.folders import LeftOut, choose_splits, split_word
from gspn_dit.errors import UserError


def write(root: Path, files: Iterable[str]) -> Path:
    """Write 8×8 images, number i filled with i; another suffix than an image's makes a file of words."""
    for index, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".txt", ".db", ""):
            path.write_text("no image")
        else:
            with open(path, "wb") as file:
                Image.new("L", (8, 8), index).save(file, "GIF" if path.suffix == ".gif" else "PNG")
    return root


CLASSES = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")


def test_hidden_and_system_folders_are_skipped_and_named(tmp_path: Path) -> None:
    stray = [f"cat/{name}/0.png" for name in (".ipynb_checkpoints", "__MACOSX", ".thumbnails", "@eaDir")]
    write(tmp_path, [*CLASSES, *stray, ".cache/0.png", "cat/._0.png", "dog/notes.txt", "dog/Thumbs.db", "top.png"])
    found = load_images("imagefolder", tmp_path, split=None)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [0, 0, 1, 1]
    assert found.remarks == (
        "left out: hidden or system folders: 5 (.cache, .ipynb_checkpoints, .thumbnails, @eaDir, …), "
        "images beside the class folders: 1 (top.png), hidden files: 1 (._0.png), unread files: 2 (.db, .txt)",
    )


def test_a_clean_folder_leaves_nothing_to_say(tmp_path: Path) -> None:
    assert load_images("imagefolder", write(tmp_path, CLASSES), split=None).remarks == ()


def test_left_out_counts_by_kind_and_shows_a_few_names() -> None:
    left_out = LeftOut()
    assert str(left_out) == ""
    for name in (".txt", ".txt", ".json"):
        left_out.add("unread files", name)
    left_out.add("hidden files", ".x")
    assert str(left_out) == "unread files: 3 (.txt 2, .json), hidden files: 1 (.x)"


def test_classes_may_begin_with_two_underscores(tmp_path: Path) -> None:
    found = load_images("imagefolder", write(tmp_path, ["__unknown__/0.png", "yes/0.png", ".net/0.png"]), split=None)
    assert found.class_names == ["__unknown__", "yes"]
    assert found.remarks == ("left out: hidden or system folders: 1 (.net)",)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".gif", ".JPG", ".TIFF"])
def test_further_suffixes_are_read(tmp_path: Path, suffix: str) -> None:
    found = load_images("imagefolder", write(tmp_path, [*CLASSES, f"dog/2{suffix}"]), None, 8, channels=1)
    assert found.labels.tolist() == [0, 0, 1, 1, 1] and found.pixels([4])[0, 0, 0].tolist() == [4]


def test_a_link_to_the_folder_itself_is_followed_never(tmp_path: Path) -> None:
    write(tmp_path, CLASSES)
    (tmp_path / "cat" / "self").symlink_to(".")
    (tmp_path / "cat" / "up").symlink_to("..")
    (tmp_path / "cat" / "twin").symlink_to("../dog")
    (tmp_path / "dog" / "twin").symlink_to("../cat")
    found = load_images("imagefolder", tmp_path, split=None)
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.remarks == ("left out: links to folders already read: 4 (twin 2, self, up)",)


def test_a_link_to_a_folder_elsewhere_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "set", CLASSES)
    write(tmp_path / "elsewhere", ["more/7.png"])
    for name in ("a", "b"):
        (tmp_path / "set" / "cat" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "emu").symlink_to(tmp_path / "elsewhere" / "more")
    found = load_images("imagefolder", tmp_path / "set", split=None)
    assert found.class_names == ["cat", "dog", "emu"] and found.labels.tolist() == [0, 0, 1, 1, 2]
    assert found.remarks == ("left out: links to folders already read: 2 (more, b)",)


def test_one_folder_under_two_class_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path, CLASSES)
    (tmp_path / "wolf").symlink_to("dog")
    with pytest.raises(UserError, match=r"the folders .*/dog and .*/wolf are one and the same; remove the link"):
        load_images("imagefolder", tmp_path)


def test_a_link_that_leads_to_itself_is_no_folder(tmp_path: Path) -> None:
    write(tmp_path, CLASSES)
    (tmp_path / "cat" / "knot").symlink_to("knot")
    assert len(load_images("imagefolder", tmp_path, split=None)) == 4


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "VAL"), ("train_set", "test-set"), ("train", "Validation")],
)
def test_splits_have_many_names(tmp_path: Path, train: str, held_out: str) -> None:
    write(tmp_path, [*(f"{train}/{name}" for name in CLASSES), f"{held_out}/dog/0.png"])
    parts = [load_images("imagefolder", tmp_path, split) for split in ("train", "validation")]
    assert [part.class_names for part in parts] == [["cat", "dog"]] * 2
    assert [len(part) for part in parts] == [4, 1] and parts[0].has_validation


def test_the_first_of_several_held_out_splits_validates(tmp_path: Path) -> None:
    names = [f"{part}/{name}" for part in ("Train", "Test", "Dev") for name in CLASSES]
    write(tmp_path, [*names, "extra/0.png", "unlabelled_test/0.png", "sheet.png"])
    validation = load_images("imagefolder", tmp_path, "validation")
    assert validation.pixels()[:, 0, 0, 0].tolist() == [8, 9, 10, 11]
    assert validation.remarks == (
        "left out: folders beside the splits: 2 (extra, unlabelled_test), images beside the class folders: 1 "
        "(sheet.png)",
    )
    (tmp_path / "valid").mkdir()
    with pytest.raises(UserError, match=r"no images in .*/valid"):
        load_images("imagefolder", tmp_path, "validation")


def test_a_further_split_without_classes_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [*(f"{part}/{name}" for part in ("train", "val") for name in CLASSES), "test/0.png"])
    assert load_images("imagefolder", tmp_path).remarks == ("left out: splits without class folders: 1 (test)",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/0.png", "test/0.png"), r"the images in .*/train must lie in one sub-folder per class"),
        (("train/0.png",), r"the images in .*/train must lie in one sub-folder per class"),
        (("val/a/0.png", "test/a/0.png"), r"has no folder of training images, only test, val; call it train"),
        (("train/0.png", "test/0.png", "car/0.png"), r"called as splits are \(test, train\) beside others \(car\)"),
        (("train/a/0.png", "car/0.png"), r"called as splits are \(train\) beside others \(car\)"),
        (("train/a/0.png", "Training/a/0.png", "val/a/0.png"), r"several training splits \(Training, train\)"),
        (("zip/train/a/0.png", "zip/test/a/0.png"), r"/zip holds splits \(train, test\) where images of one class"),
        (("train/cat/0.png", "val/0.png"), r"the images in .*/val must lie in one sub-folder per class"),
    ],
)
def test_folders_that_look_like_splits_but_are_none_are_refused(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_images("imagefolder", write(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_one_class_may_be_called_train(tmp_path: Path) -> None:
    found = load_images("imagefolder", write(tmp_path, ["train/0.png", "bus/0.png", "car/0.png"]), split=None)
    assert found.class_names == ["bus", "car", "train"]


def test_words_that_stand_for_splits() -> None:
    assert [split_word(name) for name in ("train data", "Test_Images", "valset", "validation")] == [
        "train",
        "test",
        "val",
        "validation",
    ]
    assert [split_word(name) for name in ("tests", "latest", "trainer", "set", "", "test2")] == [None] * 6
    assert choose_splits(["Test", "Valid", "TRAIN", "a"], "x") == ["TRAIN", "Valid", "Test"]
    assert choose_splits(["train", "a"], "x") == choose_splits(["val", "test"], "x") == []


def test_names_are_compared_in_one_form_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path / "set", [f"train/{composed}/0.png", "train/tea/0.png", f"val/{decomposed}/0.png"])
    found = load_images("imagefolder", tmp_path / "set", "validation")
    assert found.class_names == [composed, "tea"] and found.labels.tolist() == [0]
    write(tmp_path / "both", [f"{composed}/0.png", f"{decomposed}/0.png"])
    with pytest.raises(UserError, match="two folders named 'café', spelt in two forms of Unicode"):
        load_images("imagefolder", tmp_path / "both")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write(tmp_path, CLASSES)
    for name in (b"cat/b\xfccher.png", b"caf\xe9"):
        path = os.fsencode(tmp_path) + b"/" + name
        if name.endswith(b".png"):
            os.link(tmp_path / "cat" / "0.png", path)
        else:
            os.mkdir(path)
        escaped = name.decode("utf-8", "backslashreplace").replace("\\", r"\\")
        with pytest.raises(UserError, match=rf"the name .*/{escaped} is not UTF-8; rename it") as caught:
            load_images("imagefolder", tmp_path)
        str(caught.value).encode()  # can be printed
        (os.unlink if name.endswith(b".png") else os.rmdir)(path)
    with pytest.raises(UserError, match="is not UTF-8"):
        load_images("imagefolder", os.fsdecode(b"/no/caf\xe9"))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [*CLASSES, "cat/locked/9.png"])
    original = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"the folder .*/cat/locked cannot be read: Permission denied"):
        load_images("imagefolder", tmp_path)

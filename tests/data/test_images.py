"""Image sets: the digits' fixed split, folders, saved data sets, geometry, and every mistake a user can make."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from gspn_dit.data import ImageSet, decoding, images, load_images
from gspn_dit.data.image_sources import fixed_permutation, stratified_split
from gspn_dit.errors import LocalUserError, UserError

DIGITS_SHA256 = {
    "train": "2e9ba1f730ade609fc1321c8e8df04460f6e766a648ba35133d25de796ec4623",
    "validation": "537d7cc7d4e121f7a941fe7597b2967f08d0427a5e080ec1fb472148287d7fa8",
}


@pytest.fixture(scope="module")
def digits() -> dict[str | None, ImageSet]:
    return {split: load_images("digits", split=split) for split in ("train", "validation", None)}


def write_image(path: Path, value: int | tuple[int, ...] = 0, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes `ant` (7 images, values 0…6) and `bee` (5 images, values 100…104), 8×8 greyscale."""
    for index in range(7):
        write_image(tmp_path / "set" / "ant" / f"{index}.png", index)
    for index in range(5):
        write_image(tmp_path / "set" / "bee" / "deeper" / f"{index}.PNG", 100 + index)
    return tmp_path / "set"


def test_the_digits_split_has_fixed_sizes_and_loses_no_image(digits: dict[str | None, ImageSet]) -> None:
    train, validation, everything = digits["train"], digits["validation"], digits[None]
    assert (len(train), len(validation), len(everything)) == (1437, 360, 1797)
    assert train.labels.dtype == np.int64
    source = load_digits()
    expected = sorted((np.floor(source.images * 255 / 16 + 0.5).astype(np.uint8)).reshape(1797, -1).tolist())
    found = np.concatenate([train.pixels(), validation.pixels()]).reshape(1797, -1)
    assert sorted(found.tolist()) == expected
    np.testing.assert_array_equal(everything.pixels().reshape(1797, -1), found)


def test_the_digits_split_is_stratified(digits: dict[str | None, ImageSet]) -> None:
    share = np.bincount(digits[None].labels) / 5
    assert (np.abs(np.bincount(digits["validation"].labels) - share) <= 1).all()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_digits_and_their_order_never_change(digits: dict[str | None, ImageSet], split: str) -> None:
    content = digits[split].pixels().tobytes() + digits[split].labels.tobytes()
    assert hashlib.sha256(content).hexdigest() == DIGITS_SHA256[split]


def test_the_digits_are_a_hugging_face_data_set(digits: dict[str | None, ImageSet]) -> None:
    dataset = digits["train"].dataset
    assert isinstance(dataset, datasets.Dataset)
    assert isinstance(dataset.features["image"], datasets.Image)
    assert dataset.features["label"].names == [str(digit) for digit in range(10)]
    assert dataset[0]["image"].mode == "L" and dataset[0]["image"].size == (8, 8)
    assert (digits["train"].name, digits["train"].image_size, digits["train"].channels) == ("digits", 8, 1)
    assert digits["train"].num_classes == 10 and digits["train"].has_validation


def test_labels_decode_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_images("digits", split="validation")
    opened: list[object] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *rest: opened.append(file) or original(file, *rest))
    assert np.bincount(loaded.labels).sum() == 360 and not opened
    loaded.pixels([0])
    assert len(opened) == 1  # what would be seen


def test_pixels_takes_rows_size_and_channels(digits: dict[str | None, ImageSet]) -> None:
    train = digits["train"]
    whole = train.pixels()
    assert whole.shape == (1437, 8, 8, 1) and whole.dtype == np.uint8
    np.testing.assert_array_equal(train.pixels([5, 700, 5]), whole[[5, 700, 5]])
    np.testing.assert_array_equal(train.pixels(np.array([3]), channels=3), whole[[3]].repeat(3, axis=3))
    assert train.pixels([]).shape == (0, 8, 8, 1)
    blocks = whole[:2].reshape(2, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    assert np.abs(train.pixels([0, 1], image_size=4) - blocks).max() <= 1  # Pillow rounds after each axis
    with pytest.raises(ValueError, match="channels must be 1 or 3, not 4"):
        train.pixels([0], channels=4)


def test_the_fixed_permutation_is_the_same_everywhere() -> None:
    assert fixed_permutation(8).tolist() == [2, 4, 6, 5, 1, 7, 0, 3]
    assert sorted(fixed_permutation(1000).tolist()) == list(range(1000))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80),
    st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.33, 0.5]),
)
def test_a_stratified_split_is_a_partition_with_even_shares(labels: list[int], fraction: float) -> None:
    array = np.array(labels)
    train, validation = stratified_split(array, fraction)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
    for label in set(labels):
        size = labels.count(label)
        held_out = int((array[validation] == label).sum())
        assert abs(held_out - fraction * size) < 1 or size == 1
        assert held_out < size


def test_a_folder_is_read_by_class_name(folder: Path) -> None:
    loaded = load_images("imagefolder", folder, split=None)
    assert loaded.class_names == ["ant", "bee"] and loaded.labels.tolist() == [0] * 7 + [1] * 5
    assert loaded.pixels()[:, 0, 0, 0].tolist() == [*range(7), *range(100, 105)]
    assert (loaded.image_size, loaded.channels, loaded.name, loaded.has_validation) == (8, 1, "set", False)
    assert loaded.dataset[8]["image"].getpixel((0, 0)) == 101


def test_a_folder_is_split_deterministically(folder: Path) -> None:
    parts = [load_images("imagefolder", folder, split, validation_fraction=0.25) for split in ("train", "validation")]
    values = [part.pixels()[:, 0, 0, 0].tolist() for part in parts]
    assert sorted(values[0] + values[1]) == [*range(7), *range(100, 105)]
    assert np.bincount(parts[1].labels).tolist() == [2, 1]
    again = load_images("imagefolder", folder, "validation", validation_fraction=0.25)
    assert again.pixels()[:, 0, 0, 0].tolist() == values[1]


def test_without_a_fraction_training_is_everything(folder: Path) -> None:
    assert len(load_images("imagefolder", folder, validation_fraction=0)) == 12
    with pytest.raises(UserError, match="has no validation split and validation_fraction is 0"):
        load_images("imagefolder", folder, "validation", validation_fraction=0)


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_a_folder_may_bring_its_own_split(tmp_path: Path, held_out: str) -> None:
    for name, count in (("x", 3), ("y", 2)):
        for index in range(count):
            write_image(tmp_path / "train" / name / f"{index}.png", index)
    write_image(tmp_path / held_out / "y" / "0.png", 9)
    train, validation, everything = (load_images("imagefolder", tmp_path, s) for s in ("train", "validation", None))
    assert (len(train), len(validation), len(everything)) == (5, 1, 6)
    assert validation.class_names == ["x", "y"] and validation.labels.tolist() == [1]
    assert train.has_validation and validation.pixels()[0, 0, 0, 0] == 9
    write_image(tmp_path / held_out / "z" / "0.png")
    with pytest.raises(UserError, match="z has no counterpart among the training classes"):
        load_images("imagefolder", tmp_path, "validation")


def saved(values: list[int], image: str = "image", label: str = "label") -> datasets.Dataset:
    features = datasets.Features(
        {label: datasets.ClassLabel(names=["u", "v"]), image: datasets.Image(), "note": datasets.Value("string")}
    )
    columns = {
        image: [Image.new("L", (4, 4), value) for value in values],
        label: [value % 2 for value in values],
        "note": ["-"] * len(values),
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_saved_data_set_is_found_by_feature_type(tmp_path: Path) -> None:
    saved(list(range(10)), "photo", "kind").with_format("numpy").save_to_disk(tmp_path / "plain")
    loaded = load_images("hf", tmp_path / "plain", split=None)
    assert loaded.dataset.column_names == ["image", "label"] and loaded.class_names == ["u", "v"]
    assert loaded.pixels()[:, 0, 0, 0].tolist() == list(range(10)) and loaded.labels.tolist() == [0, 1] * 5
    assert len(load_images("hf", tmp_path / "plain", validation_fraction=0.2)) == 8


def test_a_saved_data_set_dict_brings_its_split(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": saved([1, 2, 3]), "test": saved([7, 8])})
    both.save_to_disk(tmp_path)
    assert load_images("hf", tmp_path, "validation").pixels()[:, 0, 0, 0].tolist() == [7, 8]
    assert load_images("hf", tmp_path).has_validation


def test_a_saved_data_set_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved([1, 2]).remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UserError, match=r"has no ClassLabel column \(its columns: image, note\)"):
        load_images("hf", tmp_path / "unlabelled")
    twice = saved([1, 2], label="fine")
    twice.add_column("coarse", [0, 1], feature=datasets.ClassLabel(names=["s", "t"])).save_to_disk(tmp_path / "twice")
    with pytest.raises(UserError, match=r"several ClassLabel columns \(fine, coarse\); name the one to use 'label'"):
        load_images("hf", tmp_path / "twice")
    datasets.DatasetDict({"a": saved([1]), "b": saved([2])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits a, b; needed are 'train' and one of"):
        load_images("hf", tmp_path / "splits")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing is not a data set that save_to_disk wrote"):
        load_images("hf", tmp_path / "nothing")
    missing = saved([1, 2]).cast_column("label", datasets.Value("int64")).map(lambda _: {"label": -1})
    missing.cast_column("label", datasets.ClassLabel(names=["u"])).save_to_disk(tmp_path / "missing")
    with pytest.raises(UserError, match="images without a class label"):
        load_images("hf", tmp_path / "missing")


def test_splits_of_a_saved_set_have_many_names(tmp_path: Path) -> None:
    datasets.DatasetDict(Training=saved([1, 2]), other=saved([5]), Testing=saved([3, 4])).save_to_disk(tmp_path)
    found = load_images("hf", tmp_path, "validation")
    assert found.pixels()[:, 0, 0, 0].tolist() == [3, 4] and found.remarks == ("left out: other splits: 1 (other)",)


@pytest.mark.parametrize(
    ("mode", "value", "channels", "pixel"),
    [
        ("1", 1, 1, [255]),
        ("L", 7, 1, [7]),
        ("RGB", (1, 2, 3), 3, [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), 3, [1, 2, 3]),
        ("LA", (9, 255), 3, [9, 9, 9]),
    ],
)
def test_channels_follow_the_images(
    tmp_path: Path, mode: str, value: int | tuple[int, ...], channels: int, pixel: list[int]
) -> None:
    write_image(tmp_path / "c" / "0.png", value, mode=mode)
    loaded = load_images("imagefolder", tmp_path, split=None)
    assert loaded.channels == channels
    assert loaded.pixels()[0, 3, 3].tolist() == pixel


@pytest.mark.parametrize(("mode", "hidden"), [("RGBA", (9, 8, 7, 0)), ("LA", (9, 0)), ("P", 0)])
def test_transparency_is_laid_on_white_and_said(tmp_path: Path, mode: str, hidden: int | tuple[int, ...]) -> None:
    """The colours that a transparent pixel hides are not learned."""
    picture = Image.new(mode, (2, 1), hidden)
    if mode == "P":
        picture.putpalette([9, 8, 7, 1, 2, 3])
        picture.putpixel((1, 0), 1)
    else:
        picture.putpixel((1, 0), (1, 2, 3, 255) if mode == "RGBA" else (5, 255))
    (tmp_path / "c").mkdir()
    picture.save(tmp_path / "c" / "0.png", **({"transparency": 0} if mode == "P" else {}))
    loaded = load_images("imagefolder", tmp_path, None, 1, channels=3)
    shown = decoding.decode_image(tmp_path / "c" / "0.png", "x", 3)
    opaque = {"RGBA": (1, 2, 3), "LA": (5, 5, 5), "P": (1, 2, 3)}[mode]
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), opaque]
    assert loaded.remarks == ()  # with size and channels given no image is inspected
    inspected = load_images("imagefolder", tmp_path, None, 1)
    told = ("1 of 1 inspected images have an alpha channel, and are laid on white",)
    assert inspected.remarks == (told if mode != "P" else ())


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", (0, 100, 255, 51), mode="RGBA")  # a fifth
    found = decoding.decode_image(tmp_path / "0.png", "x", 3).getpixel((0, 0))
    assert found == (204, 224, 255)


def test_too_many_pixels_are_told_from_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_image(folder / "ant" / "huge.png", size=(20, 11))
    with pytest.raises(UserError, match=r"huge\.png: it has more than 200 pixels, .* save it smaller, or remove it"):
        load_images("imagefolder", folder)


def test_headers_say_the_size_after_an_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "jpg"):
        Image.new("L", (6, 4)).save(tmp_path / f"turned.{suffix}", exif=exif)
        path = str(tmp_path / f"turned.{suffix}")
        assert decoding.read_header(path, path) == ((4, 6), "L")
        assert decoding.decode_image(path, path).size == (4, 6)


def test_one_colour_image_makes_the_set_rgb_in_both_splits(folder: Path) -> None:
    write_image(folder / "bee" / "colour.png", (4, 5, 6), mode="RGB")
    for split in ("train", "validation"):
        assert load_images("imagefolder", folder, split).pixels().shape[1:] == (8, 8, 3)


def test_sixteen_bit_images_are_refused(folder: Path) -> None:
    write_image(folder / "ant" / "deep.png", 5, mode="I;16")
    with pytest.raises(UserError, match=r"deep\.png has more than 8 bits per channel"):
        load_images("imagefolder", folder)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("L", (2, 2))
    picture.putpixel((0, 0), 200)
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    (tmp_path / "c").mkdir()
    picture.save(tmp_path / "c" / "turned.png", exif=exif)
    assert load_images("imagefolder", tmp_path, split=None).pixels()[0, :, :, 0].tolist() == [[0, 0], [0, 200]]


def test_mixed_sizes_are_named_and_cropped_on_request(folder: Path) -> None:
    wide = np.arange(16, dtype=np.uint8)[None].repeat(8, axis=0)  # columns 0…15
    Image.fromarray(wide).save(folder / "ant" / "wide.png")
    with pytest.raises(
        UserError,
        match=r"mixed sizes: 8x8 \(12 images\), 16x8 \(1 images\); set data\.image_size and every image is centre-",
    ):
        load_images("imagefolder", folder)
    loaded = load_images("imagefolder", folder, split=None, image_size=8)
    assert loaded.image_size == 8 and loaded.pixels().shape == (13, 8, 8, 1)
    np.testing.assert_array_equal(loaded.pixels([7])[0, :, :, 0], wide[:, 4:12])


def test_equal_but_not_square_sizes_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "c" / "0.png", size=(6, 4))
    with pytest.raises(UserError, match=r"are 6x4 pixels, not square; set data\.image_size"):
        load_images("imagefolder", tmp_path, split=None)


def test_center_crop_halves_with_a_box_then_resizes() -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 32), dtype=np.uint8)
    boxes = values.reshape(8, 2, 16, 2).mean(axis=(1, 3))
    found = np.asarray(decoding.center_crop(Image.fromarray(values), 8), dtype=float)
    assert np.abs(found - boxes[:, 4:12]).max() <= 1  # Pillow rounds after each axis
    for size in (4, 5, 9, 12):
        flat = decoding.center_crop(Image.new("RGB", (11, 7), (10, 20, 30)), size)
        assert flat.size == (size, size) and set(flat.get_flattened_data()) == {(10, 20, 30)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digit"}, "no image set named 'digit'; allowed are 'digits', 'imagefolder', 'hf'; did you mean"),
        ({"name": "latents", "path": "x"}, "no image set named 'latents'"),
        ({"name": "digits", "path": "x"}, "'digits' is bundled and takes no data.path"),
        ({"name": "digits", "split": "dev"}, "no split named 'dev'"),
        ({"name": "digits", "image_size": 0}, "image_size must be at least 1, not 0"),
        ({"name": "digits", "validation_fraction": 0.7}, "validation_fraction must lie between 0 and 0.5, not 0.7"),
        ({"name": "imagefolder"}, "'imagefolder' needs a directory: set data.path"),
        ({"name": "hf", "path": "/no/such/place"}, "the data path /no/such/place does not exist"),
        ({"name": "imagefolder", "path": __file__}, "is not a directory"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_images(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_images_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in .*empty \(looked for \.png, \.jpg"):
        load_images("imagefolder", tmp_path / "empty")
    (tmp_path / "words" / "c").mkdir(parents=True)
    (tmp_path / "words" / "c" / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"no images in .*words \(looked for \.png"):
        load_images("imagefolder", tmp_path / "words")
    (folder / "cow").mkdir()
    with pytest.raises(UserError, match=r"class folder .*cow has no images"):
        load_images("imagefolder", folder)
    write_image(tmp_path / "flat" / "0.png")
    with pytest.raises(UserError, match="must lie in one sub-folder per class"):
        load_images("imagefolder", tmp_path / "flat")


def test_a_set_that_is_too_small_to_split_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "c" / "0.png")
    with pytest.raises(UserError, match=r"too small to be split: 1 images, .* or set data\.validation_fraction to 0"):
        load_images("imagefolder", tmp_path, "validation")
    for name in "abd":  # no class can spare its only image
        write_image(tmp_path / name / "0.png")
    with pytest.raises(UserError, match="a class of one image stays in training; give more images, or set"):
        load_images("imagefolder", tmp_path, "validation")
    assert len(load_images("imagefolder", tmp_path, validation_fraction=0)) == 4


def test_an_unreadable_image_is_named(folder: Path) -> None:
    (folder / "bee" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image .*/bee/broken\.png: not an image") as caught:
        load_images("imagefolder", folder)
    assert not isinstance(caught.value, LocalUserError)


def test_a_truncated_image_is_named_when_it_is_decoded(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
    (folder / "ant" / "cut.png").write_bytes(buffer.getvalue()[:60])
    loaded = load_images("imagefolder", folder, split=None)
    with pytest.raises(LocalUserError, match=r"cannot read the image .*/ant/cut\.png"):
        loaded.pixels()


def test_a_missing_image_of_a_saved_set_is_named_by_its_row(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["u"])})
    columns = {"image": [Image.new("L", (4, 4)), None], "label": [0, 0]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="cannot read the image in row 1: the cell is empty"):
        load_images("hf", tmp_path)


def test_large_sets_are_inspected_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original: Callable = images.read_cell_header

    def count(cell: dict, row: int) -> tuple[tuple[int, int], str]:
        read.append(cell["path"])
        return original(cell, row)

    monkeypatch.setattr(images, "read_cell_header", count)
    monkeypatch.setattr(images, "MAX_HEADERS", 5)
    monkeypatch.setattr(images, "SAMPLED_HEADERS", 3)
    write_image(folder / "ant" / "1.png", size=(9, 9))
    loaded = load_images("imagefolder", folder, split=None)
    assert len(read) == 3
    assert loaded.pixels([0, 2]).shape == (2, 8, 8, 1)
    with pytest.raises(LocalUserError, match=r"ant/1\.png is 9x9, the others 8x8; set data\.image_size"):
        loaded.pixels([1])

"""Reading samples and references, and everything that is refused on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fid.images import LabelledImages, Reference, read_reference, read_samples
from gspn_dit.errors import UserError


def write_png(path: Path, value: int | tuple[int, ...] = 0, size: int = 8, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value).save(path)


def test_an_npz_is_read_as_it_is(save: Callable[..., Path]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    found = read_samples(save(pixels, np.array([1, 0, 2, 1], np.int32)))
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.labels is not None and found.labels.dtype == np.int64 and found.labels.tolist() == [1, 0, 2, 1]
    assert found.class_names is None
    assert read_samples(save(pixels)).labels is None


def test_a_flat_directory_is_read_in_name_order(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        write_png(tmp_path / f"00{index}.png", index)
    found = read_samples(tmp_path)
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 1, 2] and found.pixels.shape == (3, 8, 8, 1)
    assert found.labels is None


def test_names_of_index_and_class_give_labels(tmp_path: Path) -> None:
    """As sample.py and generate write them; the order is that of the indices, whatever their number of digits."""
    for name, value in (("9-7.png", 1), ("10-3.png", 2), ("000008-3.png", 3)):
        write_png(tmp_path / name, value)
    found = read_samples(tmp_path)
    assert found.pixels[:, 0, 0, 0].tolist() == [3, 1, 2] and found.labels.tolist() == [3, 7, 3]
    assert found.class_names is None
    write_png(tmp_path / "09-1.png", 4)
    with pytest.raises(UserError, match=r"has two images of one index; the names must be <index>-<class id>\.png"):
        read_samples(tmp_path)
    write_png(tmp_path / "other.png", 5)
    assert read_samples(tmp_path).labels is None


def test_class_folders_give_labels_and_names(tmp_path: Path) -> None:
    write_png(tmp_path / "seven" / "a.png", 1)
    write_png(tmp_path / "seven" / "b.png", 2)
    write_png(tmp_path / "four" / "a.png", (3, 4, 5), mode="RGB")
    (tmp_path / "empty").mkdir()
    found = read_samples(tmp_path)
    assert found.class_names == ("four", "seven") and found.labels.tolist() == [0, 1, 1]
    assert found.pixels[:, 0, 0].tolist() == [[3, 4, 5], [1, 1, 1], [2, 2, 2]]


def test_class_folders_are_searched_and_hidden_ones_do_not_shift_the_ids(tmp_path: Path) -> None:
    for name in ("four/deep/a.png", "seven/a.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png"):
        write_png(tmp_path / name, len(name))
    found = read_samples(tmp_path)
    assert found.class_names == ("four", "seven") and found.labels.tolist() == [0, 1]
    assert found.pixels[:, 0, 0, 0].tolist() == [len("four/deep/a.png"), len("seven/a.png")]
    assert found.remarks == "left out: hidden or system folders: 2 (.ipynb_checkpoints, @eaDir)"


def test_samples_of_several_formats_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "flat" / "0.png")
    write_png(tmp_path / "flat" / "1.jpg")
    write_png(tmp_path / "flat" / "2.jpg")
    with pytest.raises(UserError, match=r"flat has images of several formats \(2 \.jpg, 1 \.png\); samples must"):
        read_samples(tmp_path / "flat")
    write_png(tmp_path / "classes" / "a" / "0.png")
    write_png(tmp_path / "classes" / "b" / "0.gif")
    with pytest.raises(UserError, match=r"several formats \(1 \.png, 1 \.gif\)"):
        read_samples(tmp_path / "classes")


def test_a_report_among_the_samples_is_left_out(tmp_path: Path) -> None:
    for index in range(2):
        write_png(tmp_path / f"00000{index}-3.png", index)
    write_png(tmp_path / "report" / "grid.png", size=20)
    (tmp_path / "report" / "report.json").write_text("{}")
    (tmp_path / "generation.json").write_text('{"seed": 1}')
    found = read_samples(tmp_path)
    assert found.labels is not None and found.labels.tolist() == [3, 3] and found.generation == {"seed": 1}
    assert found.remarks == "left out: folders of reports: 1 (report)"


def test_an_exif_rotation_turns_the_pixels(tmp_path: Path) -> None:
    """A ramp along a width of 12 becomes one along a height of 12; nothing is cut into rows of another length."""
    ramp = np.arange(12, dtype=np.uint8)[None].repeat(8, axis=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise by a quarter for display
    for index in range(2):
        Image.fromarray(ramp).save(tmp_path / f"{index}.png", exif=exif)
    found = read_samples(tmp_path)
    assert found.pixels.shape == (2, 12, 8, 1)
    assert (found.pixels[:, :, :, 0] == np.arange(12)[None, :, None]).all()
    Image.fromarray(ramp).save(tmp_path / "2.png")
    with pytest.raises(UserError, match=r"2\.png is 12x8 pixels, 0\.png is 8x12"):
        read_samples(tmp_path)


def test_what_a_sample_hides_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "huge" / "0.png", size=20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"0\.png: it has more than 200 pixels"):
        read_samples(tmp_path / "huge")
    write_png(tmp_path / "deep" / "0.png", mode="I;16")
    with pytest.raises(UserError, match=r"0\.png has more than 8 bits per channel"):
        read_samples(tmp_path / "deep")


def test_the_hash_is_of_the_content(tmp_path: Path, save: Callable[..., Path]) -> None:
    write_png(tmp_path / "png" / "0.png", 7)
    pixels = np.full((1, 8, 8, 1), 7, np.uint8)
    assert read_samples(tmp_path / "png").sha256 == read_samples(save(pixels)).sha256
    hashes = {
        LabelledImages(pixels, "a").sha256,
        LabelledImages(pixels, "a", np.array([0])).sha256,
        LabelledImages(pixels, "a", np.array([1])).sha256,
        LabelledImages(pixels + 1, "a").sha256,
        LabelledImages(pixels.reshape(1, 4, 16, 1), "a").sha256,
    }
    assert len(hashes) == 5


def test_bad_arrays_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    good = np.zeros((3, 8, 8, 1), np.uint8)
    nan = np.zeros((3, 8, 8, 1), np.float32)
    nan[0, 0, 0] = np.nan
    nan[1, 1, 1] = np.inf
    cases = [
        ((nan,), "has 2 NaN or infinite values (float32); images must be uint8"),
        ((np.zeros((3, 8, 8, 1)),), "has floating-point values (float64)"),
        ((good.astype(np.int64),), "is int64; images must be uint8"),
        ((good[..., 0],), "has the shape (3, 8, 8); needed is [n, height, width, 1 or 3]"),
        ((np.moveaxis(good, 3, 1),), "has the shape (3, 1, 8, 8)"),
        ((good[:0],), "holds no images"),
        ((good, np.zeros(2, np.int64)), "arr_1 of {path} has the shape (2,) for 3 images; needed is (3,)"),
        ((good, np.zeros(3)), "is float64; class ids must be integers"),
        ((good, np.array([0, -1, 2])), "negative class ids (smallest: -1)"),
        ((good, np.array([0, 2**63, 2], np.uint64)), "class ids beyond 2,147,483,647 (largest: 9223372036854775808)"),
        ((np.array([{}, {}], dtype=object),), "holds pickled objects, which are never loaded"),
        ((good, np.array([{}, {}, {}], dtype=object)), "holds pickled objects, which are never loaded"),
    ]
    for arrays, message in cases:
        path = save(*arrays)
        with pytest.raises(UserError) as caught:
            read_samples(path)
        assert message.format(path=path) in str(caught.value)
    np.savez(tmp_path / "named.npz", images=good)
    with pytest.raises(UserError, match=r"named\.npz has no arr_0 \(it has: images\)"):
        read_samples(tmp_path / "named.npz")
    np.save(tmp_path / "bare.npy", good)
    with pytest.raises(UserError, match=r"bare\.npy holds a single array; an NPZ with arr_0 is needed"):
        read_samples(tmp_path / "bare.npy")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"\x80\x04N.", b"words"])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.npz is no NPZ file"):
        read_samples(tmp_path / "bad.npz")


def test_bad_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no samples at .*nowhere: there is no such file or directory"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no PNG images in"):
        read_samples(tmp_path)
    write_png(tmp_path / "both" / "0.png")
    write_png(tmp_path / "both" / "c" / "0.png")
    with pytest.raises(UserError, match=r"has PNGs of its own and in sub-folders \(c\)"):
        read_samples(tmp_path / "both")
    write_png(tmp_path / "sizes" / "0.png")
    write_png(tmp_path / "sizes" / "1.png", size=9)
    with pytest.raises(UserError, match=r"1\.png is 9x9 pixels, 0\.png is 8x8; all images must have one size"):
        read_samples(tmp_path / "sizes")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read the image .*broken/0\.png"):
        read_samples(tmp_path / "broken")


def test_the_bundled_reference_is_the_training_split(digits: Reference) -> None:
    assert digits.images.pixels.shape == (1437, 8, 8, 1) and digits.images.source == "digits, training split"
    assert digits.held_out is not None and digits.held_out.pixels.shape == (360, 8, 8, 1)
    assert digits.images.class_names == tuple("0123456789")


def test_a_reference_folder_is_resized_and_brings_its_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / "plain" / name / "0.png", 5, size=16)
        write_png(tmp_path / "split" / "train" / name / "0.png", 6)
        write_png(tmp_path / "split" / "val" / name / "0.png", 7)
    plain = read_reference(tmp_path / "plain", 8)
    assert plain.held_out is None and plain.images.pixels.shape == (2, 8, 8, 1)
    assert plain.images.source == str(tmp_path / "plain") and plain.images.class_names == ("a", "b")
    split = read_reference(tmp_path / "split", 8)
    assert split.held_out is not None
    assert (split.images.pixels.max(), split.held_out.pixels.max()) == (6, 7)


def test_references_are_also_saved_sets_flat_directories_and_arrays(tmp_path: Path, save: Callable[..., Path]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["u"])})
    part = datasets.Dataset.from_dict({"image": [Image.new("L", (8, 8), 3)], "label": [0]}, features=features)
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "two")
    write_png(tmp_path / "flat" / "0.png", 9)
    assert read_reference(tmp_path / "one", 8).held_out is None
    both = read_reference(tmp_path / "two", 8)
    assert both.held_out is not None and both.held_out.pixels.max() == 3
    assert read_reference(tmp_path / "flat", 8).images.pixels.max() == 9
    array = read_reference(save(np.full((2, 8, 8, 3), 4, np.uint8)), 8)
    assert array.held_out is None and array.images.pixels.shape == (2, 8, 8, 3)


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    write_png(place / "0.png")
    for look in (read_samples, lambda path: read_reference(path, 8)):
        with pytest.raises(UserError, match=r"/caf\\xe9 is not UTF-8; rename it"):
            look(place)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(UserError, match=r"no reference 'digit': .* bundled data set \(digits\); did you mean 'digits'"):
        read_reference("digit", 8)

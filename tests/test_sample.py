"""`sample.py`: what it writes, that images do not depend on how they are asked for, and every mistake in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gspn_dit.pipeline
from gspn_dit.checkpoint import checkpoint_directory
from gspn_dit.errors import UserError
from gspn_dit.grid import class_grid
from gspn_dit.sample import parse_arguments, parse_classes, run
from tests.tiny import CLASS_NAMES, SIZE, save_checkpoint, tiny_manifest, tiny_tensors, write_run

SCRIPT = Path(__file__).parents[1] / "sample.py"


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def sample(run_directory: Path, *arguments: str | Path) -> None:
    """Run the command line in this process, on the CPU, with two steps."""
    words = ["--checkpoint", str(run_directory), "--device", "cpu", "--steps", "2", *map(str, arguments)]
    run(parse_arguments(words))


def drawn(run_directory: Path, folder: Path, *arguments: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a command line, through --save-npz."""
    file = folder / "set.npz"
    sample(run_directory, *arguments, "--save-npz", file)
    with np.load(file) as stored:
        assert sorted(stored.files) == ["arr_0", "arr_1"]
        return stored["arr_0"], stored["arr_1"]


def refusal(*arguments: str | Path) -> str:
    """The message of a command line that is refused before a checkpoint is looked at."""
    with pytest.raises(UserError) as caught:
        parse_arguments([str(argument) for argument in arguments])
    return str(caught.value)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- classes ---------------------------------------------------------------------------------------------------------

DIGITS = [str(digit) for digit in range(10)]
ANIMALS = ["ant", "bee", "cat", "dog", "sea-lion", "7", "1-2"]


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("all", DIGITS, list(range(10))),
        ("0-9", DIGITS, list(range(10))),
        ("3", DIGITS, [3]),
        ("3-3", DIGITS, [3]),
        ("3,7,5", DIGITS, [3, 7, 5]),
        ("7, 0-2 ,1", DIGITS, [7, 0, 1, 2, 1]),
        ("cat,0", ANIMALS, [2, 0]),
        ("sea-lion", ANIMALS, [4]),
        ("7", ANIMALS, [5]),  # a name beats a number
        ("1-2", ANIMALS, [6]),  # and a range
        ("0-2", ANIMALS, [0, 1, 2]),
    ],
)
def test_ids_ranges_and_names(text: str, names: list[str], expected: list[int]) -> None:
    assert parse_classes(text, names) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10", "class 10 is out of range; the model has classes 0-9"),
        ("0-10", "class 10 is out of range"),
        ("-1", "class -1 is out of range"),
        ("5-3", "the range of classes 5-3 is empty; give it as 3-5"),
        ("1,,2", "unknown class ''"),
        ("1-", "unknown class '1-'"),
        ("--1", "unknown class '--1'"),
        ("²-³", "unknown class '²-³'"),
        ("nine", "unknown class 'nine'; classes are 0-9: 0, 1, 2"),
        ("", "unknown class ''"),
    ],
)
def test_unknown_classes(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_classes(text, DIGITS)
    assert message in str(caught.value)


def test_misspelt_name_comes_with_the_right_one() -> None:
    with pytest.raises(UserError, match="unknown class 'sealion'; did you mean 'sea-lion'"):
        parse_classes("sealion", ANIMALS)


# -- what is written -------------------------------------------------------------------------------------------------


def test_npz_holds_images_and_labels_class_by_class(run_directory: Path, tmp_path: Path) -> None:
    images, labels = drawn(run_directory, tmp_path, "--classes", "3,0-1", "--per-class", "2")
    assert (images.dtype, images.shape) == (np.uint8, (6, SIZE, SIZE, 1))
    assert (labels.dtype, labels.tolist()) == (np.int64, [3, 3, 0, 0, 1, 1])
    assert contents(tmp_path) == ["set.npz"]


def test_interleaved_order(run_directory: Path, tmp_path: Path) -> None:
    options = ("--classes", "3,0-1", "--per-class", "2", "--order", "interleaved")
    assert drawn(run_directory, tmp_path, *options)[1].tolist() == [3, 0, 1, 3, 0, 1]


def test_all_classes_and_eight_of_each_by_default(run_directory: Path, tmp_path: Path) -> None:
    labels = drawn(run_directory, tmp_path)[1]
    assert labels.tolist() == [label for label in range(len(CLASS_NAMES)) for _ in range(8)]


def test_all_three_outputs_hold_the_same_images(run_directory: Path, tmp_path: Path) -> None:
    grid, folder, npz = tmp_path / "new" / "grid.png", tmp_path / "images", tmp_path / "other" / "set.npz"
    options = ("--classes", "cat,ant", "--per-class", "3")
    sample(run_directory, *options, "--out", grid, "--save-images", folder, "--save-npz", npz)
    with np.load(npz) as stored:
        images, labels = stored["arr_0"], stored["arr_1"]
    expected = class_grid(images, labels.tolist(), CLASS_NAMES)
    np.testing.assert_array_equal(np.asarray(Image.open(grid)), np.asarray(expected))
    names = [f"{index:06d}-{label}.png" for index, label in enumerate([2, 2, 2, 0, 0, 0])]
    assert contents(folder) == names
    for name, image in zip(names, images, strict=True):
        with Image.open(folder / name) as opened:
            assert (opened.format, opened.mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.asarray(opened), image[..., 0])
    assert contents(tmp_path / "new") == ["grid.png"]
    assert contents(tmp_path / "other") == ["set.npz"]


def test_colour_images(tmp_path: Path) -> None:
    write_run(tmp_path / "run", channels=3)
    images, _ = drawn(tmp_path / "run", tmp_path, "--classes", "0", "--save-images", str(tmp_path / "images"))
    with Image.open(tmp_path / "images" / "000007-0.png") as opened:
        np.testing.assert_array_equal(np.asarray(opened), images[7])


def test_what_was_written_is_said(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, folder, npz = tmp_path / "grid.png", tmp_path / "images", tmp_path / "set.npz"
    sample(run_directory, "--per-class", "1", "--out", grid, "--save-images", folder, "--save-npz", npz)
    assert capsys.readouterr().out.splitlines() == [
        f"grid of 5 images: {grid}",
        f"5 images: {folder}",
        f"5 images: {npz}",
    ]


# -- what an image depends on ----------------------------------------------------------------------------------------


def test_an_image_depends_on_its_index_and_class_alone(run_directory: Path, tmp_path: Path) -> None:
    some, some_labels = drawn(run_directory, tmp_path, "--classes", "0,1", "--per-class", "2")
    assert some_labels.tolist() == [0, 0, 1, 1]
    assert len(np.unique(some.reshape(4, -1), axis=0)) == 4
    more, _ = drawn(run_directory, tmp_path, "--classes", "0,2", "--per-class", "40")  # more than one chunk
    np.testing.assert_array_equal(more[:2], some[:2])
    mixed, mixed_labels = drawn(
        run_directory, tmp_path, "--classes", "0,1", "--per-class", "2", "--order", "interleaved"
    )
    assert mixed_labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(mixed[[0, 3]], some[[0, 3]])
    assert not np.array_equal(mixed[1], some[1])  # the same noise for another class


def test_options_reach_the_sampler(run_directory: Path, tmp_path: Path) -> None:
    def images(*options: str) -> np.ndarray:
        return drawn(run_directory, tmp_path, "--classes", "0", "--per-class", "2", *options)[0]

    default = images()
    np.testing.assert_array_equal(images("--guidance-scale", "2", "--seed", "0", "--weights", "ema"), default)
    np.testing.assert_array_equal(images("--sampler", "euler", "--guidance-interval", "0", "1"), default)
    for options in (
        ("--guidance-scale", "1"),
        ("--seed", "1"),
        ("--weights", "model"),
        ("--sampler", "heun"),
        ("--steps", "3"),
        ("--guidance-interval", "0.6", "0.7"),
    ):
        assert not np.array_equal(images(*options), default), options


def test_the_newest_complete_checkpoint_of_a_run_is_used(run_directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_directory, tmp_path / "run"))
    write_run(copy, step=300, seed=10)
    write_run(copy, step=400, seed=20)
    (checkpoint_directory(copy, 400) / "ema.safetensors").write_bytes(b"")
    newest = drawn(copy, tmp_path, "--per-class", "1")[0]
    np.testing.assert_array_equal(newest, drawn(checkpoint_directory(copy, 300), tmp_path, "--per-class", "1")[0])
    assert not np.array_equal(newest, drawn(run_directory, tmp_path, "--per-class", "1")[0])


# -- classes that are named by numbers -----------------------------------------------------------------------------

NUMBERS = [str(number) for number in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
"""Twelve classes in the order in which folders are read."""


@pytest.mark.parametrize(
    ("text", "names", "ids"),
    [
        ("0,10,2", NUMBERS, [0, 2, 4]),
        ("0-1", NUMBERS, [0, 1]),
        ("0-9", [str(number) for number in range(10)], list(range(10))),
        ("0-2", ["ant", "bee", "cat", "100"], [0, 1, 2]),
        ("0-2", ["ant", "0-2", "cat"], [1]),
    ],
)
def test_names_come_before_ids(text: str, names: list[str], ids: list[int]) -> None:
    assert parse_classes(text, names) == ids


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("0-3", NUMBERS, "the class named 2 has the id 4; give names one by one, such as 0,1,2,3"),
        ("10-11", NUMBERS, "the class named 10 has the id 2; give names one by one, such as 10,11"),
        ("1-2", ["01", "02", "03"], "the class named 01 has the id 0; give names one by one, such as 01,02"),
        ("0-9999999999999", NUMBERS, "is ambiguous"),
    ],
)
def test_a_range_that_means_other_classes_by_name_is_refused(text: str, names: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_classes(text, names)
    assert f"the range of classes {text} is ambiguous" in str(caught.value) and message in str(caught.value)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --checkpoint"),
        (("--checkpoint", "x"), "nothing to write: give --out FILE, --save-images DIR or --save-npz FILE"),
        (("--checkpoint", "x", "--per-class", "0"), "--per-class is 0, but must be at least 1"),
        (("--checkpoint", "x", "--steps", "-3"), "--steps is -3, but must be at least 1"),
        (("--checkpoint", "x", "--seed", "-1"), "--seed is -1, but must lie in [0, 2^63)"),
        (("--checkpoint", "x", "--seed", str(2**64)), f"--seed is {2**64}, but must lie in [0, 2^63)"),
        (("--checkpoint", "x", "--per", "3"), "unknown argument --per; did you mean '--per-class'?"),
        (("--checkpoint", "x", "--steps", "many"), "argument --steps: invalid int value: 'many'"),
        (("--checkpoint", "x", "--guidance-interval", "0.5"), "argument --guidance-interval: expected 2 arguments"),
    ],
)
def test_mistakes_on_the_command_line(arguments: tuple[str, ...], message: str) -> None:
    assert refusal(*arguments) == message


def test_outputs_that_cannot_be_written_are_found_before_anything_is_drawn(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("kept")
    (folder / "old.png").write_text("kept")
    start = ("--checkpoint", "x")
    assert refusal(*start, "--save-images", folder) == (
        f"--save-images {folder} is not empty; give --overwrite to add to it and replace"
    )
    assert refusal(*start, "--save-images", file) == f"--save-images {file} is a file; give a directory"
    assert refusal(*start, "--out", folder) == f"--out {folder} is a directory; give a file"
    assert refusal(*start, "--save-npz", folder) == f"--save-npz {folder} is a directory; give a file"
    assert refusal(*start, "--out", "x.jpg") == "--out x.jpg: the grid is a PNG; give a name that ends in .png"
    assert refusal(*start, "--save-npz", "x.npy") == "--save-npz x.npy: give a name that ends in .npz"
    assert refusal(*start, "--out", "$HOME/x.png").startswith("argument --out: it is $HOME/x.png: variables")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert parse_arguments([*start, "--save-images", str(empty)]).save_images == str(empty)


def test_overwrite_adds_to_a_folder(run_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_text("kept")
    sample(run_directory, "--per-class", "1", "--save-images", tmp_path, "--overwrite")
    assert (tmp_path / "old.png").read_text() == "kept"
    assert len(contents(tmp_path)) == 1 + len(CLASS_NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "0-5"), "class 5 is out of range; the model has classes 0-4"),
        (("--classes", "catt"), "unknown class 'catt'; did you mean 'cat'?"),
        (("--sampler", "ddim"), "unknown sampler 'ddim'; allowed are euler, heun"),
        (("--guidance-scale", "-1"), "guidance scale is -1.0, but must be at least 0"),
        (("--guidance-interval", "0.9", "0.1"), "guidance interval is [0.9, 0.1], but must be within"),
        (("--device", "warp"), "--device warp cannot be used here"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
    ],
)
def test_mistakes_that_the_checkpoint_shows_leave_nothing_behind(
    run_directory: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    outputs = ("--out", tmp_path / "a" / "grid.png", "--save-images", tmp_path / "b", "--save-npz", tmp_path / "c.npz")
    with pytest.raises(UserError) as caught:
        sample(run_directory, *arguments, *outputs)
    assert message in str(caught.value)
    assert contents(tmp_path) == []


def test_samples_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["ema"]["output.linear.weight"][:] = float("nan")
    save_checkpoint(tmp_path / "run", 1, tensors, tiny_manifest())
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with pytest.raises(UserError, match="samples hold NaN or infinite values"):
        sample(
            tmp_path / "run",
            *("--out", outputs / "grid.png", "--save-images", outputs / "images", "--save-npz", outputs / "set.npz"),
        )
    assert contents(outputs) == []


def test_a_parent_that_is_a_file(run_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"cannot write the images: .*file"):
        sample(run_directory, "--per-class", "1", "--out", tmp_path / "file" / "grid.png")
    assert (tmp_path / "file").read_text() == "kept"


def test_an_old_set_is_replaced_whole_or_not_at_all(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz = tmp_path / "set.npz"
    npz.write_text("the set before")

    def run_out_of_space(file: object, **arrays: np.ndarray) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", run_out_of_space)
    with pytest.raises(UserError, match="cannot write the images: no space left"):
        sample(run_directory, "--per-class", "1", "--save-npz", npz)
    assert npz.read_text() == "the set before"
    assert contents(tmp_path) == ["set.npz"]
    monkeypatch.undo()
    sample(run_directory, "--per-class", "1", "--save-npz", npz)
    with np.load(npz) as stored:
        assert stored["arr_0"].shape == (len(CLASS_NAMES), SIZE, SIZE, 1)


def test_defects_of_the_program_are_not_taken_for_mistakes(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(gspn_dit.pipeline, "draw_latents", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        sample(run_directory, "--out", tmp_path / "grid.png")


# -- as a user starts it ---------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Start `python sample.py` in a folder that is not the checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    environment.pop("RANK", None)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_help_within_three_seconds(tmp_path: Path) -> None:
    before = os.times()
    finished = start(tmp_path, "--help")
    after = os.times()
    assert finished.returncode == 0
    assert "--guidance-scale" in finished.stdout
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert seconds < 3


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    finished = start(tmp_path, "--checkpoint", "missing", "--steps", "0", "--out", "grid.png")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "sample.py: error: --steps is 0, but must be at least 1\n"


@pytest.mark.slow
def test_from_a_checkpoint_to_files_in_a_process_of_its_own(run_directory: Path, tmp_path: Path) -> None:
    options = ("--steps", "2", "--device", "cpu", "--classes", "ant", "--per-class", "2", "--save-npz", "set.npz")
    finished = start(tmp_path, "--checkpoint", run_directory, *options)
    assert (finished.returncode, finished.stdout) == (0, "2 images: set.npz\n")
    with np.load(tmp_path / "set.npz") as stored:
        images = stored["arr_0"]
    (tmp_path / "here").mkdir()
    np.testing.assert_array_equal(images, drawn(run_directory, tmp_path / "here", *options[:-2])[0])

    finished = start(tmp_path, "--checkpoint", "missing", "--out", "grid.png")
    assert (finished.returncode, finished.stdout, len(finished.stderr.splitlines())) == (2, "", 1)
    assert finished.stderr.startswith("sample.py: error: checkpoint missing does not exist; give a run directory")
    assert contents(tmp_path) == ["here", "here/set.npz", "set.npz"]

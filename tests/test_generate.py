"""Evaluation sets: the same bit by bit however they are made, with all that moved them beside, and one-line errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn_dit import generate, rng
from gspn_dit.config import Config, ObjectiveConfig
from gspn_dit.errors import LocalUserError, UserError
from gspn_dit.files import is_temporary, write_atomically
from gspn_dit.generate import parse_arguments, run
from gspn_dit.pipeline import CHUNK, GSPNPipeline
from gspn_dit.sample_sets import NpzFile, PngFolder, draw_labels, read_settings
from tests.tiny import CLASS_NAMES, SIZE, save_checkpoint, tiny_manifest, tiny_tensors, write_run

ROOT = Path(__file__).resolve().parents[1]
COUNT = 2 * CHUNK + 9
"""Three chunks, the last of them padded."""


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def words(run_directory: Path, out: Path, *arguments: Any, count: int | None = COUNT) -> list[str]:
    number = () if count is None else ("--num-samples", count)
    start = ("--checkpoint", run_directory, "--out", out, "--device", "cpu", "--steps", 2, *number)
    return [str(word) for word in (*start, *arguments)]


def make(run_directory: Path, out: Path, *arguments: Any, count: int | None = COUNT) -> Path:
    """Run the command line in this process and return where the set is."""
    run(parse_arguments(words(run_directory, out, *arguments, count=count)))
    return out


def refusal(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(*arguments, **keywords)
    return str(caught.value)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a directory tree, by name; of settings all but the environment, which is the source tree's, too."""
    files: dict[str, Any] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content: Any = path.read_bytes()
        if path.suffix == ".json":
            content = {
                key: value for key, value in json.loads(content).items() if key not in ("environment", "resumed")
            }
        files[str(path.relative_to(folder))] = content
    return files


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a folder, in the order of the indices in the names."""
    files = sorted(folder.glob("*.png"))
    assert [int(file.stem.split("-")[0]) for file in files] == list(range(len(files)))
    return np.stack([np.asarray(Image.open(file)) for file in files]), np.array(
        [int(file.stem.split("-")[1]) for file in files]
    )


def read_npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as stored:
        assert sorted(stored.files) == ["arr_0", "arr_1"]
        return stored["arr_0"], stored["arr_1"]


# -- times -----------------------------------------------------------------------------------------------------------


def test_times_are_shifted_as_config_or_call_says(tmp_path: Path) -> None:
    """The config's shift, the pipeline's and the command's are one value, and generation.json has it.

    And that of the times in training, beside it.
    """
    shifted = Config(objective=ObjectiveConfig(timestep_shift=2.0, sampling_shift=3.0)).to_dict()
    plain, run_of_three = write_run(tmp_path / "plain"), write_run(tmp_path / "three", config=shifted)
    sets = {
        "config": make(run_of_three, tmp_path / "config", count=5),
        "option": make(plain, tmp_path / "option", "--sampling-shift", 3, count=5),
    }
    pipeline = GSPNPipeline.from_checkpoint(run_of_three)
    assert pipeline.scheduler.config.shift == 3
    labels = draw_labels("uniform", 0, 5, range(5)).tolist()
    expected = pipeline(labels, num_inference_steps=2, output_type="np").images
    same = GSPNPipeline.from_checkpoint(plain)(
        labels, num_inference_steps=2, output_type="np", sampling_shift=3.0
    ).images
    np.testing.assert_array_equal(same, expected)
    for name, folder in sets.items():
        np.testing.assert_array_equal(read_folder(folder)[0][..., None], expected)
        stated = read_settings(folder) or {}
        assert (stated["training_shift"], stated["sampling_shift"]) == (2 if name == "config" else 1, 3)
    unshifted = make(plain, tmp_path / "unshifted", count=5)
    assert not np.array_equal(read_folder(unshifted)[0][..., None], expected)
    assert (read_settings(unshifted) or {})["sampling_shift"] == 1
    assert "--sampling-shift is 0.0, but must be finite and above 0" in refusal(
        plain, tmp_path / "none", "--sampling-shift", 0, count=5
    )


# -- labels ----------------------------------------------------------------------------------------------------------


def test_uniform_labels_are_functions_of_seed_and_index() -> None:
    labels = draw_labels("uniform", 3, 1000, range(7))
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(draw_labels("uniform", 3, 10, range(7)), labels[:10])
    by_hand = [int(rng.uniform(3, rng.Stream.SAMPLE_LABEL, [index]).item() * 7) for index in (0, 1, 999)]
    assert labels[[0, 1, 999]].tolist() == by_hand
    assert not np.array_equal(draw_labels("uniform", 4, 1000, range(7)), labels)


def test_uniform_labels_are_uniform() -> None:
    """Chi-square with 9 degrees of freedom: 27.9 is exceeded once in a thousand."""
    counts = np.bincount(draw_labels("uniform", 0, 20_000, range(10)), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    assert counts.std() > 5  # balanced they are not


def test_balanced_labels_take_the_classes_in_turn() -> None:
    assert draw_labels("balanced", 9, 8, [4, 0, 2]).tolist() == [4, 0, 2, 4, 0, 2, 4, 0]


def test_labels_of_some_classes() -> None:
    assert set(draw_labels("uniform", 0, 200, [5, 11]).tolist()) == {5, 11}


# -- the images ------------------------------------------------------------------------------------------------------


def test_a_set_is_what_the_pipeline_draws(run_directory: Path, tmp_path: Path) -> None:
    options = ("--labels", "balanced", "--classes", "dog,0-1", "--seed", 5, "--guidance-scale", 2, "--sampler", "heun")
    images, labels = read_folder(make(run_directory, tmp_path / "set", *options))
    assert labels.tolist() == [[3, 0, 1][index % 3] for index in range(COUNT)]
    drawn = GSPNPipeline.from_checkpoint(run_directory)(
        labels.tolist(), num_inference_steps=2, guidance_scale=2, sampler="heun", seed=5, output_type="np"
    )
    np.testing.assert_array_equal(images, drawn.images[..., 0])


def test_a_file_holds_what_a_folder_holds(run_directory: Path, tmp_path: Path) -> None:
    images, labels = read_folder(make(run_directory, tmp_path / "set"))
    arrays, ids = read_npz(make(run_directory, tmp_path / "set.npz"))
    assert (arrays.dtype, arrays.shape, ids.dtype) == (np.uint8, (COUNT, SIZE, SIZE, 1), np.int64)
    np.testing.assert_array_equal(arrays[..., 0], images)
    np.testing.assert_array_equal(ids, labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.json", "set.npz"]
    folder, file = (
        json.loads(path.read_text()) for path in (tmp_path / "set" / "generation.json", tmp_path / "set.json")
    )
    assert {key for key in folder if folder[key] != file[key]} == {"image_format"}
    shouted = make(run_directory, tmp_path / "SET2.NPZ")
    assert shouted.is_file() and shouted.read_bytes() == (tmp_path / "set.npz").read_bytes()


def test_the_file_is_a_plain_uncompressed_archive(run_directory: Path, tmp_path: Path) -> None:
    file = make(run_directory, tmp_path / "set.npz", count=3)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert [(entry.filename, entry.compress_type) for entry in archive.infolist()] == [
            ("arr_0.npy", zipfile.ZIP_STORED),
            ("arr_1.npy", zipfile.ZIP_STORED),
        ]
    again = make(run_directory, tmp_path / "again.npz", count=3)
    assert again.read_bytes() == file.read_bytes()


def test_a_shorter_set_is_the_beginning_of_a_longer_one(run_directory: Path, tmp_path: Path) -> None:
    """The last chunk is padded and then truncated."""
    long, long_labels = read_npz(make(run_directory, tmp_path / "long.npz", "--labels", "uniform"))
    for count in (1, CHUNK + 5):
        short, labels = read_npz(make(run_directory, tmp_path / f"{count}.npz", count=count))
        np.testing.assert_array_equal(labels, long_labels[:count])
        np.testing.assert_array_equal(short, long[:count])


def test_a_weaker_model_guides_and_is_named(run_directory: Path, tmp_path: Path) -> None:
    weaker = write_run(tmp_path / "weaker", step=10, seed=7)
    options = ("--guidance-scale", 2, "--guide-checkpoint", weaker)
    images, labels = read_npz(make(run_directory, tmp_path / "set.npz", *options, count=3))
    pipeline = GSPNPipeline.from_checkpoint(run_directory).guide_with(weaker)
    drawn = pipeline(labels.tolist(), num_inference_steps=2, guidance_scale=2, output_type="np").images
    np.testing.assert_array_equal(images, drawn)
    assert not np.array_equal(
        images, read_npz(make(run_directory, tmp_path / "plain.npz", "--guidance-scale", 2, count=3))[0]
    )
    settings = json.loads((tmp_path / "set.json").read_text())
    weights = weaker / "checkpoints" / "step-00000010" / "ema.safetensors"
    assert settings["guide_checkpoint"] == str(weights.parent)
    assert settings["guide_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_colour(tmp_path: Path) -> None:
    out = make(write_run(tmp_path / "run", channels=3), tmp_path / "set", count=2)
    with Image.open(sorted(out.glob("*.png"))[0]) as opened:
        assert opened.mode == "RGB"


# -- what is written beside them -------------------------------------------------------------------------------------


def test_every_setting_is_beside_the_images(run_directory: Path, tmp_path: Path) -> None:
    out = make(run_directory, tmp_path / "set", "--guidance-interval", 0.1, 0.9, "--weights", "model", count=3)
    settings = json.loads((out / "generation.json").read_text())
    weights = run_directory / "checkpoints" / "step-00000100" / "model.safetensors"
    expected = {
        "format_version": 1,
        "complete": True,
        "protocol": None,
        "num_images": 3,
        "image_size": SIZE,
        "image_format": "png",
        "uint8": "truncate",
        "labels": "uniform",
        "seed": 0,
        "sampler": "euler",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "guidance_interval": [0.1, 0.9],
        "guidance_channels": "all",
        "checkpoint": str(weights.parent),
        "step": 100,
        "weights": "model",
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "vae": None,
        "class_names": CLASS_NAMES,
        "chunk_size": CHUNK,
        "dtype": "float32",
        "tf32": False,
    }
    assert {key: settings[key] for key in expected} == expected
    assert settings["model"]["name"] == "GSPN-N/2"
    assert settings["objective"]["name"] == "velocity"
    assert settings["environment"]["device"] == "cpu"
    assert {"torch", "diffusers", "numpy"} <= set(settings["environment"]["versions"])


def test_what_a_protocol_fixes() -> None:
    options = parse_arguments(["--checkpoint", "x", "--out", "/nowhere", "--protocol", "adm-50k"])
    fixed = (options.num_samples, options.labels, options.classes, options.weights, options.steps)
    assert fixed == (50_000, "uniform", "all", "ema", 250)
    assert (options.guidance_scale, options.seed) == (1.0, 0)
    given = ["--labels", "uniform", "--num-samples", "50000", "--guidance-scale", "1.5", "--guidance-channels", "3"]
    options = parse_arguments(["--checkpoint", "x", "--out", "/nowhere", "--protocol", "adm-50k", *given])
    assert (options.guidance_scale, options.guidance_channels) == (1.5, 3)


# -- killed, resumed, overwritten ------------------------------------------------------------------------------------


def die_at(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Let the generation of a chunk fail, as if the process had been killed there."""
    original = generate._make

    def failing(options: Any, pipeline: Any, output: Any, number: int) -> np.ndarray:
        if number == chunk:
            raise RuntimeError("killed")
        return original(options, pipeline, output, number)

    monkeypatch.setattr(generate, "_make", failing)


@pytest.mark.parametrize(("name", "chunk"), [("set", 1), ("set.npz", 0), ("set.npz", 2)])
def test_an_interrupted_set_goes_on_where_it_stopped(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    make(run_directory, tmp_path / "whole" / name)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        die_at(patch, chunk)
        make(run_directory, tmp_path / "resumed" / name)
    stored = read_settings(tmp_path / "resumed" / name)
    assert stored is not None and stored["complete"] is False
    assert not (tmp_path / "resumed" / "set.npz").exists()
    made: list[int] = []
    original = generate._make
    monkeypatch.setattr(generate, "_make", lambda *arguments: made.append(arguments[3]) or original(*arguments))
    make(run_directory, tmp_path / "resumed" / name, "--resume")
    assert made == list(range(chunk, 3))
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_complete_set_is_left_as_it_is(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("set", "set.npz"):
        make(run_directory, tmp_path / name, count=3)
        before = contents(tmp_path)
        capsys.readouterr()
        make(run_directory, tmp_path / name, "--resume", count=3)
        assert capsys.readouterr().out == f"{tmp_path / name} is complete: 3 images\n"
        assert contents(tmp_path) == before


def test_lost_images_are_made_again(run_directory: Path, tmp_path: Path) -> None:
    out = make(run_directory, tmp_path / "set")
    before = contents(out)
    sorted(out.glob("*.png"))[CHUNK + 3].unlink()
    (out / ".000001-0.png.4711.tmp").write_bytes(b"half")
    make(run_directory, out, "--resume")
    assert contents(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", 1), "begun with seed = 0, this run has 1"),
        (("--guidance-scale", 2), "begun with guidance_scale = 1.0, this run has 2.0"),
        (("--labels", "balanced"), 'begun with labels = "uniform", this run has "balanced"'),
        (("--sampler", "heun"), 'begun with sampler = "euler", this run has "heun"'),
        (("--tf32",), "begun with tf32 = false, this run has true"),
        (("--weights", "model"), 'begun with weights = "ema", this run has "model"'),
        (("--num-samples", 4), "begun with num_images = 3, this run has 4"),
    ],
)
def test_a_set_is_not_continued_with_other_settings(
    run_directory: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    for name in ("set", "set.npz"):
        out = make(run_directory, tmp_path / name, count=3)
        before = contents(tmp_path)
        refused = refusal(run_directory, out, "--resume", *arguments, count=3)
        assert refused.startswith(f"--out {out} was {message}; restore it")
        assert contents(tmp_path) == before


def test_a_set_is_not_continued_with_other_weights(tmp_path: Path) -> None:
    trained = write_run(tmp_path / "run")
    out = make(trained, tmp_path / "set", count=3)
    write_run(trained, step=200, seed=5)
    assert "was begun with step = 100, this run has 200" in refusal(trained, out, "--resume", count=3)
    make(trained / "checkpoints" / "step-00000100", out, "--resume", count=3)
    moved = shutil.move(trained / "checkpoints" / "step-00000100", tmp_path / "moved")
    make(moved, out, "--resume", count=3)


def test_another_environment_is_added(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make(run_directory, tmp_path / "set", count=3)
    first = json.loads((out / "generation.json").read_text())["environment"]
    next(out.glob("*.png")).unlink()
    monkeypatch.setattr(generate, "_device_name", lambda device: "another")
    make(run_directory, out, "--resume", count=3)
    settings = json.loads((out / "generation.json").read_text())
    assert settings["environment"] == first
    assert settings["resumed"] == [{**first, "device": "another"}]


def test_overwrite_replaces_the_set_and_nothing_else(run_directory: Path, tmp_path: Path) -> None:
    folder, file = make(run_directory, tmp_path / "set"), make(run_directory, tmp_path / "set.npz")
    (folder / "notes.txt").write_text("kept")
    for out in (folder, file):
        make(run_directory, out, "--overwrite", "--seed", 1, count=3)
    images, labels = read_npz(file)
    np.testing.assert_array_equal(read_folder(folder)[0], images[..., 0])
    np.testing.assert_array_equal(labels, draw_labels("uniform", 1, 3, range(5)))
    assert len(list(folder.iterdir())) == 3 + 2
    assert (folder / "notes.txt").read_text() == "kept"


def test_an_old_file_stays_until_the_new_one_is_complete(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(run_directory, tmp_path / "set.npz", count=3)
    old = out.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        die_at(patch, 2)
        make(run_directory, out, "--overwrite")
    assert out.read_bytes() == old
    make(run_directory, out, "--resume")
    assert len(read_npz(out)[0]) == COUNT


def test_what_a_kill_at_the_end_left_beside_the_file_is_removed(run_directory: Path, tmp_path: Path) -> None:
    left, others = tmp_path / ".set.npz.4711.tmp", tmp_path / ".another.npz.4711.tmp"
    for path in (left, others):
        path.write_bytes(b"half")
    make(run_directory, tmp_path / "set.npz", count=3)
    assert not left.exists() and others.exists()


def test_a_damaged_part_is_found(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        die_at(patch, 2)
        make(run_directory, tmp_path / "set.npz")
    part = tmp_path / "set.npz.partial" / "000001.npy"
    part.write_bytes(part.read_bytes()[:-7])
    assert refusal(run_directory, tmp_path / "set.npz", "--resume") == (
        f"{part} is damaged; delete it and give --resume to make it again"
    )
    assert not (tmp_path / "set.npz").exists()


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "how many images? give --num-samples N, or a --protocol that says it: adm-50k, adm-50k-512, balanced-50k"),
        (
            ("--protocol", "reconstruction"),
            "the protocol reconstruction scores reconstructions, which python -m gspn_dit",
        ),
        (("--num-samples", 0), "--num-samples is 0, but must be at least 1"),
        (
            ("--protocol", "adm"),
            "unknown protocol 'adm'; allowed are adm-50k, adm-50k-512, balanced-50k, reconstruction, quick",
        ),
        (
            ("--protocol", "adm-50k", "--num-samples", 10),
            "--num-samples 10 contradicts the protocol adm-50k, which has",
        ),
        (("--protocol", "adm-50k", "--labels", "balanced"), "--labels balanced contradicts the protocol adm-50k"),
        (("--protocol", "adm-50k", "--weights", "model"), "--weights model contradicts the protocol adm-50k"),
        (("--protocol", "adm-50k"), "the protocol adm-50k is for images of 256 pixels, this model has images of 4"),
        (("--num-samples", 5, "--seed", -1), "--seed is -1, but must lie in [0, 2^63)"),
        (
            ("--num-samples", 5, "--guidance-channels", "none"),
            "--guidance-channels is none, but must be all or a number",
        ),
        (("--num-samples", 5, "--guidance-channels", 2), "--guidance-channels is 2, but the latent has 1"),
        (("--num-samples", 5, "--resume", "--overwrite"), "--resume and --overwrite contradict each other"),
        (("--num-samples", 5, "--classes", "caat"), "unknown class 'caat'; did you mean 'cat'?"),
        (("--num-samples", 5, "--classes", "0-5"), "class 5 is out of range; the model has classes 0-4"),
        (("--num-samples", 5, "--sampler", "ddpm"), "unknown sampler 'ddpm'; allowed are euler, heun"),
        (("--num-samples", 5, "--guidance-scale", "-1"), "guidance scale is -1.0, but must be at least 0"),
        (("--num-samples", 5, "--guidance-interval", 0.9, 0.1), "guidance interval is [0.9, 0.1], but must be within"),
        (("--num-samples", 5, "--device", "warp"), "--device warp cannot be used here"),
    ],
)
def test_mistakes_leave_nothing_behind(
    run_directory: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    assert message in refusal(run_directory, tmp_path / "set", *arguments, count=None)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_are_not_there_or_damaged(run_directory: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing", tmp_path / "set").startswith("checkpoint")
    own = Path(shutil.copytree(run_directory, tmp_path / "run"))
    path = own / "checkpoints" / "step-00000100" / "ema.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert refusal(own, tmp_path / "set").startswith(f"{path} is damaged")
    assert not (tmp_path / "set").exists()


def test_places_that_hold_something_else(run_directory: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "000000-1.png").write_text("kept")
    file.write_text("kept")
    (tmp_path / "folder.npz").mkdir()
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, arr_0=np.zeros(3))
    for flag in ((), ("--resume",), ("--overwrite",)):
        assert refusal(run_directory, folder, *flag) == (
            f"--out {folder} is not empty and holds no set with a generation.json; give another --out"
        )
    assert refusal(run_directory, file).endswith("is a file; give a directory, or a name that ends in .npz")
    assert "is a directory; give a file" in refusal(run_directory, tmp_path / "folder.npz")
    assert "give --resume to continue it, --overwrite to replace it" in refusal(run_directory, foreign)
    assert "holds no set" in refusal(run_directory, foreign, "--resume")
    assert contents(folder) == {"000000-1.png": b"kept"}


def test_a_set_is_neither_added_to_nor_replaced_unasked(run_directory: Path, tmp_path: Path) -> None:
    for name in ("set", "set.npz"):
        make(run_directory, tmp_path / name, count=3)
        before = contents(tmp_path)
        assert refusal(run_directory, tmp_path / name, count=3) == (
            f"--out {tmp_path / name} exists; give --resume to continue it, --overwrite to replace it, or another"
        )
        assert contents(tmp_path) == before


def test_images_of_another_set_are_not_mixed_in(run_directory: Path, tmp_path: Path) -> None:
    out = make(run_directory, tmp_path / "set", count=3)
    (out / "000007-1.png").write_bytes(b"foreign")
    assert "holds images of another set (000007-1.png)" in refusal(run_directory, out, "--resume", count=3)


@pytest.mark.parametrize("kind", [PngFolder, NpzFile])
def test_a_full_disk_is_told_in_one_line_and_costs_nothing_made(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    out = tmp_path / ("set" if kind is PngFolder else "set.npz")
    original = kind.write

    def write(output: Any, chunk: int, images: np.ndarray) -> None:
        if chunk == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(output, chunk, images)

    with monkeypatch.context() as patch, pytest.raises(LocalUserError) as caught:
        patch.setattr(kind, "write", write)
        make(run_directory, out)
    assert str(caught.value) == (
        f"--out {out} cannot be written: [Errno 28] No space left on device; what is there is kept, "
        "continue with --resume"
    )
    make(run_directory, out, "--resume")
    make(run_directory, tmp_path / "whole" / out.name)
    read = read_folder if kind is PngFolder else read_npz
    for resumed, whole in zip(read(out), read(tmp_path / "whole" / out.name), strict=True):
        np.testing.assert_array_equal(resumed, whole)


def test_samples_that_are_not_finite(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["ema"]["output.linear.weight"][:] = float("nan")
    save_checkpoint(tmp_path / "run", 1, tensors, tiny_manifest())
    with pytest.raises(LocalUserError, match=r"images 0-2: .*samples hold NaN or infinite values"):
        make(tmp_path / "run", tmp_path / "set", count=3)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "a", fail)
    assert contents(tmp_path) == {"a": b"old"}
    assert is_temporary(".a.12.tmp") and not is_temporary("a") and not is_temporary(".a.tmp")


def test_progress_tells_rate_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        is_main_process, num_processes = True, 2

    clock = iter([100.0, 110.0, 140.0, 150.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    progress = generate.Progress(1000, 800, State())  # type: ignore[arg-type]
    for _ in range(3):
        progress.advance(100)
    assert capsys.readouterr().out.splitlines() == [
        "generating 1,000 images in 2 processes, 200 are there already",
        "400 of 1,000 images, 5 images/s, 0:02:00 left",
    ]


# -- as a user starts it ---------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    ENVIRONMENT.pop(_name, None)


def command(processes: int, arguments: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "gspn_dit.generate", *arguments]


def start(processes: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(processes, arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def kill(job: subprocess.Popen[bytes]) -> None:
    """Kill a job at once, the workers that its launcher started included: they would go on without it."""
    import psutil

    processes = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
    job.kill()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait(timeout=60)
    psutil.wait_procs(processes, timeout=60)


def test_help_and_a_mistake_answer_at_once(tmp_path: Path) -> None:
    before = os.times()
    finished = start(1, ["--help"], tmp_path)
    mistaken = start(1, ["--checkpoint", "x", "--out", "set", "--steps", "0", "--num-samples", "3"], tmp_path)
    after = os.times()
    assert "--protocol NAME" in finished.stdout
    assert (mistaken.returncode, mistaken.stdout) == (2, "")
    assert mistaken.stderr == "gspn_dit.generate: error: --steps is 0, but must be at least 1\n"
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert seconds < 2 * 3


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_two_processes_and_kills_make_the_same_set(run_directory: Path, tmp_path: Path, name: str) -> None:
    """One process; two; and two killed at random moments, again and again, gone on by one and by two in turn."""
    count = 40 * CHUNK + 5
    done = start(1, words(run_directory, tmp_path / "one" / name, count=count), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"generating {count:,} images\n" in done.stdout
    done = start(2, words(run_directory, tmp_path / "two" / name, count=count), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"generating {count:,} images in 2 processes\n") == 1

    chance, out = random.Random(name), tmp_path / "killed" / name
    made = out if name == "set" else tmp_path / "killed" / f"{name}.partial"
    numbers: list[int] = []
    for attempt in range(4):
        job = subprocess.Popen(
            command(1 + attempt % 2, words(run_directory, out, "--resume", count=count)),
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wanted = (numbers[-1] if numbers else 0) + chance.randint(1, 5) * (CHUNK if name == "set" else 1)
        while job.poll() is None and len(list(made.glob("[0-9]*"))) < wanted:
            time.sleep(0.01)
        kill(job)
        numbers.append(len(list(made.glob("[0-9]*"))))
    assert numbers == sorted(numbers) and numbers[0] > 0
    assert not out.is_file()
    done = start(2, words(run_directory, out, "--resume", count=count), tmp_path)
    assert done.returncode == 0, done.stderr
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == whole
    assert contents(tmp_path / "killed") == whole


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_mistake_is_told_once_by_many(run_directory: Path, tmp_path: Path) -> None:
    done = start(2, words(run_directory, tmp_path / "set", "--classes", "catt"), tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("unknown class 'catt'") == 1
    assert not (tmp_path / "set").exists()

"""Images of several sizes in one training: buckets by hand, every image once an epoch, resume, samples at any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gspn_dit import rng
from gspn_dit import sample as sample_module
from gspn_dit.config import Config, config_from_dict
from gspn_dit.data import buckets as buckets_module
from gspn_dit.data.buckets import BucketBatches, in_runs, nearest_buckets
from gspn_dit.data.build import build_data
from gspn_dit.data.decoding import center_crop
from gspn_dit.data.images import load_images
from gspn_dit.errors import UserError
from gspn_dit.tasks import create_task
from tests.training.conftest import changed, fresh_accelerator, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of
from tests.training.test_multiprocess import train as train_processes

__all__ = ["fresh_accelerator"]

SIZES = ["8x8", "4x16", "16x4"]
SHAPES = {"square": (20, 20), "wide": (40, 10), "high": (9, 30)}
"""Width and height of the images, whose brightness is their number."""
EACH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for part, (name, size) in enumerate(SHAPES.items()):
        for number in range(EACH):
            file = root / ("cat" if number % 2 else "dog") / f"{name}{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("L", size, 20 + part * EACH + number).save(file)
    return root


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits, whole ones and their middles, wide and high."""
    root, digits = tmp_path_factory.mktemp("crops"), load_images("digits", split="train")
    for number, (pixels, label) in enumerate(zip(digits.pixels(range(60))[..., 0], digits.labels, strict=False)):
        file = root / ("even" if label % 2 == 0 else "odd") / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels, pixels[3:5], pixels[:, 3:5])[number % 3]).save(file)
    return root


def config(output_dir: Path, folder: Path, **training: Any) -> Config:
    data = {"name": "imagefolder", "path": str(folder), "image_size": 8, "buckets": SIZES, "validation_fraction": 0.2}
    return changed(tiny_config(output_dir, **training), data=data)


@pytest.fixture
def batches(folder: Path, tmp_path: Path) -> BucketBatches:
    found = build_data(config(tmp_path, folder)).training
    assert isinstance(found, BucketBatches)
    return found


def test_the_nearest_aspect_by_hand() -> None:
    """Ratios of width to height 1, 4 and 1/4: 2 lies as far from 1 as from 4, and the first is taken."""
    sizes = np.array([[100, 100], [200, 100], [201, 100], [900, 100], [10, 100], [50, 99]])
    assert nearest_buckets(sizes, [(8, 8), (4, 16), (16, 4)]).tolist() == [0, 0, 1, 1, 2, 0]


def test_buckets_of_one_aspect_are_filled_in_turn() -> None:
    sizes = np.array([[64, 64]] * 3 + [[90, 30]] + [[64, 64]] * 2)
    assert nearest_buckets(sizes, [(8, 8), (4, 16), (16, 16)]).tolist() == [0, 2, 0, 1, 0, 2]


def test_runs_keep_every_image_and_stand_where_their_first_one_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets_module, "RUN", 2)
    order, of_image = np.array([5, 0, 3, 1, 4, 2]), np.array([0, 1, 0, 1, 0, 1])
    # Buckets in that order are 1 0 1 1 0 1: runs 5 3, 0 4, 1 2.
    assert in_runs(order, of_image).tolist() == [5, 3, 0, 4, 1, 2]
    monkeypatch.setattr(buckets_module, "RUN", 1)
    assert in_runs(order, of_image).tolist() == order.tolist()


def test_a_crop_covers_the_size_and_keeps_the_middle() -> None:
    ramp = np.tile(np.arange(40, dtype=np.uint8)[None], (10, 1))  # 10 rows, value = column
    cut = np.asarray(center_crop(Image.fromarray(ramp), 10, 20))
    assert cut.shape == (10, 20) and cut[0].tolist() == list(range(10, 30))
    halved = np.asarray(center_crop(Image.fromarray(ramp), 5, 20))
    assert halved.shape == (5, 20)
    assert np.abs(halved[0].astype(float) - (2 * np.arange(20) + 0.5)).max() <= 0.5  # box filter: means of pairs
    assert np.asarray(center_crop(Image.new("L", (7, 11)), 9, 3)).shape == (9, 3)


def values(latents: torch.Tensor) -> list[int]:
    """The number of each image."""
    return [round(float(image.mean() + 1) * 127.5) - 20 for image in latents]


@pytest.mark.parametrize("cached", [True, False])
def test_every_image_is_seen_once_an_epoch_at_the_size_of_its_aspect(
    batches: BucketBatches, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    if not cached:
        monkeypatch.setattr(buckets_module, "CACHE_BYTES", 0)
        del batches._cached_pixels  # which building filled
    monkeypatch.setattr(buckets_module, "RUN", 2)
    count = len(batches.images)
    for epoch in range(2):
        seen: list[int] = []
        for start in range(epoch * count, (epoch + 1) * count, 5):  # batches that straddle runs
            numbers = range(start, min(start + 5, (epoch + 1) * count))
            parts = batches.parts(numbers)
            assert sorted(n for part in parts for n in part) == list(numbers)
            for part in parts:
                latents, labels = batches.shuffled(part)
                found = values(latents)
                (shape,) = {number // EACH for number in found}
                assert tuple(latents.shape[1:]) == ((1, 8, 8), (1, 4, 16), (1, 16, 4))[shape]
                assert labels.tolist() == [0 if number % EACH % 2 else 1 for number in found]  # cat, dog
                seen += found
        assert len(seen) == len(set(seen)) == count
    assert (batches._cached_pixels is not None) == cached


def test_order_depends_on_numbers_alone_and_changes_with_the_epoch(batches: BucketBatches) -> None:
    count = len(batches.images)
    whole = batches.rows(range(2 * count))
    assert np.array_equal(np.concatenate([batches.rows([n]) for n in range(2 * count)]), whole)
    assert not np.array_equal(whole[:count], whole[count:])
    assert np.array_equal(whole[:count], in_runs(rng.permutation(0, 0, count), batches.buckets))


def test_a_batch_s_loss_is_the_mean_over_its_images(folder: Path, tmp_path: Path) -> None:
    """Whatever images share a pass: the loss of one image at a time gives the same mean."""
    task = create_task(config(tmp_path, folder))
    task.model.double()
    numbers = range(12)
    assert len(task.train_data.parts(numbers)) > 1  # type: ignore[attr-defined]
    whole = task.loss(task.model, numbers)["loss"]
    alone = torch.stack([task.loss(task.model, range(n, n + 1))["loss"] for n in numbers])
    torch.testing.assert_close(whole, alone.mean(), rtol=1e-6, atol=0)
    count = task.validation_count
    pairs = [task.validate(task.model, range(n, n + 1))["val_loss"] for n in range(count)]
    total, counted = task.validate(task.model, range(count))["val_loss"]
    assert int(counted) == count
    torch.testing.assert_close(total, torch.stack([pair[0] for pair in pairs]).sum(), rtol=1e-6, atol=0)


def test_training_resumes_bit_for_bit_and_draws_any_size(crops: Path, tmp_path: Path) -> None:
    options = {"max_steps": 6, "validate_every": 3}
    images = create_task(config(tmp_path / "whole", crops, **options)).train_data
    assert isinstance(images, BucketBatches)
    assert sorted(images.rows(range(len(images.buckets)))) == list(range(len(images.buckets)))  # each once an epoch
    assert set(images.buckets) == {0, 1, 2}
    run_training(config(tmp_path / "whole", crops, **options))
    run_training(config(tmp_path / "halves", crops, **{**options, "max_steps": 2}))
    run_training(config(tmp_path / "halves", crops, **options), resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 6), tensors_of(tmp_path / "halves", 6))
    losses = [[line["loss"] for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("whole", "halves")]
    assert losses[0] == losses[1]
    for size in ("8x8", "4x16", "16x4", "12x20"):
        words = ["--checkpoint", str(tmp_path / "whole"), "--size", size, "--per-class", "2", "--steps", "2"]
        sample_module.run(sample_module.parse_arguments([*words, "--save-npz", str(tmp_path / f"{size}.npz")]))
        with np.load(tmp_path / f"{size}.npz", allow_pickle=False) as archive:
            assert archive["arr_0"].shape == (4, *map(int, size.split("x")), 1)
    with pytest.raises(UserError, match="height is 10 pixels, but must be a positive multiple of 4"):
        words[3] = "10x8"
        sample_module.run(sample_module.parse_arguments([*words, "--out", str(tmp_path / "grid.png")]))
    with pytest.raises(UserError, match=r"data.buckets = .*, this run has"):
        other = changed(config(tmp_path / "halves", crops, **options), data={"buckets": SIZES[:2]})
        run_training(other, resume="auto")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"buckets": ["8x8", "6x16"]}}, "data.buckets: 6x16 is not divisible by 4, the pixels of a patch's"),
        ({"data": {"name": "hf", "streaming": True}}, "data.buckets does not go with data.streaming"),
        ({"data": {"name": "latents"}}, "data.buckets does not go with data.name latents"),
        ({"training": {"fd_every": 5}}, "training.fd_every does not go with data.buckets"),
        ({"training": {"repa_features": "features.npy"}}, "repa_features does not go with data.buckets"),
        ({"training": {"sharding": "fsdp"}}, r"data.buckets does not go with sharding \(fsdp\); leave one of them"),
        ({"training": {"sharding": "zero1"}}, r"data.buckets does not go with sharding \(zero1\); leave one of them"),
    ],
)
def test_what_does_not_go_with_buckets(folder: Path, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    from gspn_dit.config import TrainArguments
    from gspn_dit.training.loop import train

    with pytest.raises(UserError, match=message):
        train(TrainArguments(changed(config(tmp_path / "run", folder), **sections), None, False), lambda *_: None)  # type: ignore[arg-type, return-value]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_and_accumulation_change_the_order_of_sums_alone(folder: Path, tmp_path: Path) -> None:
    """Though processes call the model a different number of times in one and the same step."""
    options = ("--data.name", "imagefolder", "--data.path", str(folder), "--data.image_size", "8")
    options += ("--data.buckets", str(SIZES).replace("'", '"'), "--data.validation_fraction", "0.2")
    options += ("--training.batch_size", "12", "--training.max_steps", "6", "--training.validate_every", "3")
    found = build_data(config(tmp_path, folder)).training
    assert isinstance(found, BucketBatches)
    calls = [[len(found.parts(range(first, first + 6))) for first in (12 * step, 12 * step + 6)] for step in range(6)]
    assert any(one != two for one, two in calls)
    for name, processes, accumulation in (("1", 1, "1"), ("1x3", 1, "3"), ("2x3", 2, "3")):
        parts = ("--training.gradient_accumulation_steps", accumulation)
        script = "tests/training/train_in_float64.py"
        done = train_processes(tmp_path / name, processes, *options, *parts, script=script)
        assert done.returncode == 0, done.stderr
    one = tensors_of(tmp_path / "1", 6)
    validated = [line["val_loss"] for line in metrics_of(tmp_path / "1") if "val_loss" in line]
    assert len(validated) == 2
    for name in ("1x3", "2x3"):
        for key, tensor in tensors_of(tmp_path / name, 6).items():
            if key.startswith(("model/", "ema/")):
                torch.testing.assert_close(tensor, one[key], rtol=1e-8, atol=1e-11, msg=f"{name}, {key}")
        again = [line["val_loss"] for line in metrics_of(tmp_path / name) if "val_loss" in line]
        assert again == pytest.approx(validated, rel=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"buckets": ["8x8"], "image_size": None}, "data.buckets needs data.image_size"),
        ({"buckets": ["8x8", "08x8"], "image_size": 8}, "of which two are the same; keep one of them"),
        ({"buckets": ["8"], "image_size": 8}, "data.buckets is 8, but must be HEIGHTxWIDTH in pixels"),
    ],
)
def test_values_that_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_dict({"data": data})


def test_tasks_without_buckets_refuse_them() -> None:
    with pytest.raises(UserError, match=r"data.buckets does not go with task classification"):
        config_from_dict({"task": "classification", "data": {"buckets": ["8x8"], "image_size": 8}})


@pytest.mark.parametrize("size", ["8", "axb", "0x8", "8x", "8x8x8"])
def test_a_size_on_the_command_line_is_two_numbers(size: str) -> None:
    with pytest.raises(UserError, match=f"--size is {size}, but must be HEIGHTxWIDTH in pixels"):
        sample_module.parse_arguments(["--checkpoint", "x", "--out", "grid.png", "--size", size])

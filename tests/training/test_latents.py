"""Training on encoded latents, through an autoencoder, and on a stream."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from gspn_dit import rng
from gspn_dit.config import Config
from gspn_dit.data.latent_shards import MANIFEST, open_latents
from gspn_dit.errors import UserError
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.prepare import encode
from gspn_dit.tasks import create_task
from tests.data.test_autoencoders import SIZE as RAE_SIZE
from tests.data.test_autoencoders import rae
from tests.data.tiny_vae import CHANNELS, SIZE, image_of, write_folder, write_vae
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, tensors_of

IMAGES = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `vae`, another one `other`, `images`, and their `latents`."""
    directory = tmp_path_factory.mktemp("training")
    write_vae(directory / "vae")
    write_vae(directory / "other", seed=1)
    write_folder(directory / "images", IMAGES)
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--source", f"imagefolder:{directory / 'images'}", "--vae", str(directory / "vae")]
    words += ["--image-size", str(SIZE), "--out", str(directory / "latents"), "--shard-images", "6"]
    encode.run(encode.parse_arguments(words))
    return directory


def config_of(place: Path, run: Path, **data: object) -> Config:
    """Training on the latents, with two of twenty images held out."""
    keys = {"name": "latents", "path": str(place / "latents"), "horizontal_flip": True, **data}
    return changed(tiny_config(run), data=keys, model={"name": "GSPN-N/2"})


def on_the_fly(place: Path, run: Path) -> Config:
    config = config_of(place, run, name="imagefolder", path=str(place / "images"))
    return changed(config, latent={"name": "kl", "vae": str(place / "vae")})


def test_batches_of_latents_are_draws_by_sample_number(place: Path, tmp_path: Path) -> None:
    task = create_task(config_of(place, tmp_path))
    assert (len(task.train_data.images), len(task.validation_data.images)) == (18, 2)
    latents, labels = task.train_data.shuffled(range(30, 40))
    stored = open_latents(place / "latents", "train", 0.1)
    items = rng.data_indices(0, range(30, 40), 18)
    flips = (rng.uniform(0, rng.Stream.FLIP, range(30, 40)) < 0.5).numpy()
    assert {True, False} == set(flips.tolist())
    mean, log_variance = torch.from_numpy(stored.moments(items, flips)).float().chunk(2, dim=1)
    noise = rng.normal(0, rng.Stream.POSTERIOR, range(30, 40), (CHANNELS, 4, 4))
    expected = (mean + torch.exp(log_variance / 2) * noise - 0.25) * 0.5
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)
    assert labels.tolist() == stored.labels[items].tolist()
    parts_of_batch = [task.train_data.shuffled([number])[0] for number in range(30, 40)]
    assert torch.equal(torch.cat(parts_of_batch), latents)


def test_validation_latents_are_never_mirrored_and_drawn_from_their_own_stream(place: Path, tmp_path: Path) -> None:
    batches = create_task(config_of(place, tmp_path)).validation_data
    latents, _ = batches.at([1, 0])
    moments = torch.from_numpy(batches.images.moments(np.array([1, 0]), np.zeros(2, dtype=bool)))
    noise = rng.normal(0, rng.Stream.VALIDATION_POSTERIOR, [1, 0], (CHANNELS, 4, 4))
    assert torch.equal(latents, batches.latent.draw(moments, noise))


def test_latents_and_images_through_the_autoencoder_give_the_same_batches(place: Path, tmp_path: Path) -> None:
    """But for the half precision of the stored moments."""
    stored, direct = (create_task(config) for config in (config_of(place, tmp_path), on_the_fly(place, tmp_path)))
    assert stored.latent.spec() == direct.latent.spec()
    for numbers in (range(8), range(25, 33)):
        (one, labels), (other, other_labels) = (part.train_data.shuffled(numbers) for part in (stored, direct))
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)
        assert torch.equal(labels, other_labels)
    torch.testing.assert_close(
        stored.validation_data.at([0, 1])[0], direct.validation_data.at([0, 1])[0], rtol=5e-3, atol=5e-3
    )


@pytest.mark.parametrize("make", [config_of, on_the_fly])
def test_run_is_resumed_bit_by_bit_and_sampled(place: Path, tmp_path: Path, make: object) -> None:
    whole, halves = (make(place, tmp_path / name) for name in ("whole", "halves"))  # type: ignore[operator]
    run_training(whole)
    run_training(changed(halves, training={"max_steps": 2}))
    run_training(halves, resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 4), tensors_of(tmp_path / "halves", 4))
    pipeline = GSPNPipeline.from_checkpoint(tmp_path / "whole")
    assert pipeline.latent.spec() == create_task(whole).latent.spec()
    images = pipeline(["ant", "bee"], num_inference_steps=1, output_type="np").images
    assert images.shape == (2, SIZE, SIZE, 1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `place`, with a representation autoencoder: no posterior, images of one size, more channels than cells."""
    directory = tmp_path_factory.mktemp("wide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rae().save_pretrained(directory / "vae")
    for number in range(10):
        file = directory / "images" / ("ant" if number % 2 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image_of(number, RAE_SIZE, "RGB").save(file)
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--source", f"imagefolder:{directory / 'images'}", "--vae", str(directory / "vae")]
    words += ["--image-size", str(RAE_SIZE), "--out", str(directory / "latents"), "--shard-images", "6"]
    encode.run(encode.parse_arguments(words))
    return directory


@pytest.mark.parametrize("from_shards", [True, False])
def test_a_representation_autoencoder_all_the_way(wide: Path, tmp_path: Path, from_shards: bool) -> None:
    """Encoded to shards or while training: the same latents but for float16, resumed bit by bit, sampled."""
    images = {"name": "imagefolder", "path": str(wide / "images"), "validation_fraction": 0}
    latents = {"name": "latents", "path": str(wide / "latents"), "validation_fraction": 0}
    latent = {"name": "rae", "vae": str(wide / "vae")}

    def configured(name: str, shards: bool) -> Config:
        config = changed(tiny_config(tmp_path / name, max_steps=3), model={"name": "GSPN-N/1", "hidden_size": 64})
        return changed(config, data=latents) if shards else changed(config, data=images, latent=latent)

    stored, direct = (create_task(configured("run", shards)).train_data for shards in (True, False))
    torch.testing.assert_close(stored.shuffled(range(12))[0], direct.shuffled(range(12))[0], rtol=5e-3, atol=5e-3)
    assert stored.images.moments(np.arange(3), np.zeros(3, dtype=bool)).shape == (3, 64, 4, 4)  # no log-variances
    run_training(configured("whole", from_shards))
    run_training(changed(configured("halves", from_shards), training={"max_steps": 2}))
    run_training(configured("halves", from_shards), resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 3), tensors_of(tmp_path / "halves", 3))
    pipeline = GSPNPipeline.from_checkpoint(tmp_path / "whole")
    assert pipeline.latent.spec()["name"] == "rae" and not pipeline.latent.has_posterior
    drawn = pipeline(["ant", "bee"], num_inference_steps=1, output_type="np").images
    assert isinstance(drawn, np.ndarray) and drawn.shape == (2, RAE_SIZE, RAE_SIZE, 3)
    with pytest.raises(ValueError, match="height is 64 pixels, but the autoencoder draws 32x32 alone"):
        pipeline("ant", num_inference_steps=1, height=64, callback_on_step_end=lambda *_: pytest.fail("a step"))


def test_another_autoencoder_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    run_training(changed(on_the_fly(place, tmp_path / "run"), training={"max_steps": 2}))
    other = changed(on_the_fly(place, tmp_path / "run"), latent={"vae": str(place / "other")})
    with pytest.raises(UserError, match=r"those of the VAE .*vae \(hash .*but given is the VAE .*other \(hash"):
        run_training(other, resume="auto")
    with pytest.raises(UserError, match=r"but given is the VAE .*other \(hash"):
        GSPNPipeline.from_checkpoint(tmp_path / "run", vae=str(place / "other"))
    with pytest.raises(UserError, match=r"but given is the VAE .*other \(hash"):
        create_task(changed(config_of(place, tmp_path), latent={"vae": str(place / "other")}))


def test_other_latents_are_noticed_on_resume(place: Path, tmp_path: Path) -> None:
    run_training(changed(config_of(place, tmp_path / "run"), training={"max_steps": 2}))
    shutil.copytree(place / "latents", tmp_path / "moved")
    run_training(changed(config_of(place, tmp_path / "run"), data={"path": str(tmp_path / "moved")}), resume="auto")
    manifest = json.loads((tmp_path / "moved" / MANIFEST).read_text())
    manifest["source"]["fingerprint"] = "another"
    (tmp_path / "moved" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was trained on other data: 18 images of 'moved' then, 18 of 'moved' now"):
        run_training(changed(config_of(place, tmp_path / "run"), data={"path": str(tmp_path / "moved")}), resume="auto")


def test_size_that_was_not_encoded_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.image_size is 16, but .*latents was encoded from 8 pixels"):
        create_task(config_of(place, tmp_path, image_size=16))


def test_stream_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [Image.new("L", (8, 8), 9 * i) for i in range(21)], "label": [i % 2 for i in range(21)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    keys = {"name": "hf", "path": str(tmp_path / "set"), "streaming": True, "streaming_shuffle_images": 6}
    whole, halves = (changed(tiny_config(tmp_path / name), data=keys) for name in ("whole", "halves"))
    run_training(whole)
    run_training(changed(halves, training={"max_steps": 2}))
    run_training(halves, resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 4), tensors_of(tmp_path / "halves", 4))

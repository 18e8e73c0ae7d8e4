"""Features of images on disk: extracted by encoders of timm and transformers, resumed, verified, and trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gspn_dit import rng
from gspn_dit.data.features import open_features
from gspn_dit.data.latent_shards import open_latents, open_shards, shard_name
from gspn_dit.data.sources import SOURCES
from gspn_dit.errors import UserError
from gspn_dit.prepare import features
from gspn_dit.prepare.feature_nets import IMAGENET_MEAN, FeatureNet, as_planes
from gspn_dit.tasks import create_task
from tests.training.conftest import changed, fresh_accelerator, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, tensors_of

__all__ = ["fresh_accelerator"]

IMAGES = 23


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ViT of 2 layers, random, for 16 pixels in patches of 8: 2×2 features of 12 dimensions."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    place = tmp_path_factory.mktemp("encoder")
    ViTModel(config, add_pooling_layer=False).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(IMAGES):
        file = root / ["cat", "dog"][number % 2] / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return root


def words(folder: Path, encoder: str, out: Path, *more: str) -> list[str]:
    sizes = ("--image-size", "8", "--encoder-size", "16", "--shard-images", "10", "--batch-size", "4")
    return ["--source", f"imagefolder:{folder}", "--encoder", encoder, *sizes, "--out", str(out), *more]


def extract(*arguments: Any) -> None:
    options = features.parse_arguments(words(*arguments))
    features.verify(options) if options.verify else features.run(options)


@pytest.fixture(scope="module")
def extracted(folder: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "out"
    extract(folder, encoder, out)
    return out


def test_features_are_the_encoder_s_tokens_row_by_row(extracted: Path, folder: Path, encoder: str) -> None:
    from transformers import ViTModel

    shards = open_shards(extracted)
    assert len(shards) == IMAGES and len(shards.shards) == 3
    spec = shards.manifest["features"]
    assert (spec["grid"], spec["dimensions"], spec["input_size"]) == (2, 12, 16)
    file = sorted(folder.rglob("*.png"))[5]  # the order of the source: by class, then by name
    pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None].float() / 255
    shown = torch.nn.functional.interpolate(pixels, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(spec[name])[:, None, None] for name in ("mean", "std"))
    assert spec["mean"] == list(IMAGENET_MEAN)
    for mirrored in (False, True):
        given = shown.flip(-1) if mirrored else shown
        with torch.no_grad():
            tokens = ViTModel.from_pretrained(encoder, add_pooling_layer=False)((given - mean) / std).last_hidden_state
        found = open_features(str(extracted), 2, shards.labels, 0).rows(np.array([5]), np.array([mirrored]))
        torch.testing.assert_close(torch.from_numpy(found), tokens[:, 1:], atol=2e-3, rtol=2e-3)


def test_an_interrupted_extraction_goes_on_and_gives_the_same_bytes(
    extracted: Path, folder: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gspn_dit.prepare.encoder import Encoder

    encode = Encoder.encode

    def dies_in_the_third(self: Encoder, number: int) -> bytes:
        if number == 2:
            raise RuntimeError("killed")
        return encode(self, number)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Encoder, "encode", dies_in_the_third)
        extract(folder, encoder, out)
    with pytest.raises(UserError, match="unfinished encoding; continue with --resume"):
        extract(folder, encoder, out)
    with pytest.raises(UserError, match=r"begun with features.input_size = 16, now it is 24"):
        extract(folder, encoder, out, "--resume", "--encoder-size", "24")
    extract(folder, encoder, out, "--resume")
    for name in (*map(shard_name, range(3)), "manifest.json"):
        assert (out / name).read_bytes() == (extracted / name).read_bytes()


def test_verification_finds_damage_and_another_encoder(
    extracted: Path, folder: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(folder, encoder, extracted, "--verify")
    assert "8 images, encoded again, have the features that are stored: cosine 1.0000" in capsys.readouterr().out
    manifest = json.loads((extracted / "manifest.json").read_text())
    with pytest.raises(UserError, match="gives other features than"):
        extract(folder, encoder, extracted, "--verify", "--grid", "4")
    assert manifest["source"]["images"] == IMAGES
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in extracted.iterdir():
        if file.is_file():
            (damaged / file.name).write_bytes(file.read_bytes())
    content = bytearray((damaged / shard_name(1)).read_bytes())
    content[-1] ^= 1
    (damaged / shard_name(1)).write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged \(checksum\); delete it"):
        features.verify(features.parse_arguments(["--verify", "--out", str(damaged)]))


def test_training_takes_the_features_of_its_own_images_and_their_mirror_images(
    extracted: Path, folder: Path, tmp_path: Path
) -> None:
    """The set has no split of its own: rows go through the split, and flips choose the mirrored image's features."""
    data = {"name": "imagefolder", "path": str(folder), "validation_fraction": 0.25, "horizontal_flip": True}
    options = {"repa_features": str(extracted), "repa_depth": 2, "repa_projector": "conv", "repa_normalise": True}
    config = changed(tiny_config(tmp_path / "whole", **options), data=data)
    task = create_task(config)
    images = task.train_data.images  # type: ignore[attr-defined]
    alignment = task.alignment  # type: ignore[attr-defined]
    rows = alignment.features.items
    assert len(rows) == len(images) < IMAGES
    everything = SOURCES["imagefolder"].images(str(folder)).datasets["all"]  # type: ignore[misc]
    for row in (0, len(rows) - 1):
        assert everything[int(rows[row])]["image"].tobytes() == images.dataset[row]["image"].tobytes()
    flips = np.array([True, False])
    planes = open_shards(extracted).moments(rows[:2], flips)
    assert np.array_equal(alignment.features.rows(np.arange(2), flips)[:, 1], planes[:, :, 0, 1].astype(np.float32))
    assert 0 < (rng.uniform(0, rng.Stream.FLIP, range(32)) < 0.5).sum() < 32  # both kinds occur in these steps
    run_training(config)
    run_training(changed(tiny_config(tmp_path / "parts", max_steps=2, **options), data=data))
    run_training(changed(tiny_config(tmp_path / "parts", **options), data=data), resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 4), tensors_of(tmp_path / "parts", 4))


@pytest.mark.parametrize(
    ("grid", "labels", "message"),
    [
        (4, None, "has 2x2 features an image, but the model 4x4 tokens; extract them with --grid 4"),
        (2, np.zeros(IMAGES, dtype=np.int64), "is of 23 other images than the 23 of this training"),
        (2, np.zeros(7, dtype=np.int64), "is of 23 other images than the 7 of this training"),
    ],
)
def test_features_that_do_not_fit_are_refused(extracted: Path, grid: int, labels: Any, message: str) -> None:
    labels = open_shards(extracted).labels if labels is None else labels
    with pytest.raises(UserError, match=message):
        open_features(str(extracted), grid, labels, 0)
    with pytest.raises(UserError, match="holds features, not latents"):
        open_latents(extracted)


def test_an_encoder_of_timm_with_weights_of_a_file(tmp_path: Path) -> None:
    """16 pixels in patches of 16 are one token; a class token has no place. A CNN gives planes."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    for name, size, grid in (("test_vit", 32, 2), ("test_resnet", 64, 2), ("test_vit", 64, 4)):
        net = timm.create_model(name, num_classes=0)
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "w.safetensors")
        found = FeatureNet(f"timm:{name}@{tmp_path / 'w.safetensors'}", 8, size)
        assert found.size == grid and found.spec()["dimensions"] == net.num_features
        again = FeatureNet(f"timm:{name}@{tmp_path / 'w.safetensors'}", 8, size, grid=1)
        images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        mean = found.moments(images).mean((2, 3), keepdim=True)
        torch.testing.assert_close(again.moments(images), mean, rtol=1e-4, atol=1e-4)


def test_planes_of_tokens_row_by_row() -> None:
    tokens = torch.arange(12.0).reshape(1, 4, 3)
    assert as_planes(tokens, "it")[0, 0].tolist() == [[0, 3], [6, 9]]
    with pytest.raises(UserError, match=r"it gives features of shape \[1, 3, 4\], which are no square plane"):
        as_planes(tokens.reshape(1, 3, 4), "it")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "x"], "--source is missing"),
        (["--source", "digits"], "--encoder is missing"),
        (["--source", "digits", "--encoder", "x", "--grid", "0"], "--grid is 0, but must be at least 1"),
        (["--verify", "--encoder", "x"], "give both or none"),
        (["--verify", "--resume"], "--verify and --resume contradict each other"),
    ],
)
def test_what_is_refused_before_anything_is_read(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        features.parse_arguments([*arguments, "--out", str(tmp_path / "out")])


def test_an_encoder_that_cannot_be_had_is_one_line(tmp_path: Path, folder: Path, encoder: str) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "empty"), "cannot be loaded: .*; give timm:NAME, a directory, or a hub name"),
        ("timm:no_such_net", "cannot be loaded: .*no_such_net"),
        ("timm:test_vit@absent.pth", "the file absent.pth does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            extract(folder, name, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not take images of 4 pixels"):
        extract(folder, encoder, tmp_path / "out", "--encoder-size", "4")
    assert not (tmp_path / "out").exists()

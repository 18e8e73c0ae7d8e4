"""Pipelines that are saved, published and loaded: the same images bit by bit, nothing pickled, no secrets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.utils import hub_utils
from huggingface_hub.errors import LocalEntryNotFoundError

from gspn_dit import model_card
from gspn_dit.checkpoint import checkpoint_directory
from gspn_dit.config import Config, LatentConfig
from gspn_dit.data.latents import latent_from_spec
from gspn_dit.errors import UserError
from gspn_dit.pipeline import GSPNPipeline
from tests.tiny import CLASS_NAMES, SIZE, tiny_manifest, tiny_model, write_run

DATA = {"name": "animals", "images": 1234, "fingerprint": "abc"}


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(output_dir="/home/someone/secret").to_dict()
    config["data"].update(name="imagefolder", path="/home/someone/images")
    config["training"]["initialize_from"] = "/home/someone/secret"
    return write_run(tmp_path_factory.mktemp("run"), data=DATA, config=config)


@pytest.fixture(scope="module")
def pipeline(run_directory: Path) -> GSPNPipeline:
    return GSPNPipeline.from_checkpoint(run_directory)


def draw(pipeline: GSPNPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, "bee", 4], num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    return np.asarray(images)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        GSPNPipeline.from_pretrained(*arguments, **options)
    return str(caught.value)


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_what_was_saved_draws_the_same_images(run_directory: Path, tmp_path: Path, weights: str) -> None:
    before = GSPNPipeline.from_checkpoint(run_directory, weights)
    before.save_pretrained(tmp_path / "one")
    once = GSPNPipeline.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    twice = GSPNPipeline.from_pretrained(str(tmp_path / "two"))
    for loaded in (once, twice):
        assert loaded.weights == weights
        assert loaded.class_names == CLASS_NAMES
        np.testing.assert_array_equal(draw(loaded), draw(before))
    assert len(np.unique(draw(before).reshape(3, -1), axis=0)) == 3
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert sorted(one) == ["README.md", "config.json", f"{weights}.safetensors"]


def test_every_kind_of_directory_can_be_loaded(run_directory: Path, pipeline: GSPNPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    for directory in (run_directory, checkpoint_directory(run_directory, 100)):
        np.testing.assert_array_equal(draw(GSPNPipeline.from_pretrained(directory)), draw(pipeline))
    np.testing.assert_array_equal(draw(GSPNPipeline.from_checkpoint(tmp_path)), draw(pipeline))


def test_which_weights(run_directory: Path, pipeline: GSPNPipeline, tmp_path: Path) -> None:
    live = GSPNPipeline.from_pretrained(run_directory, weights="model")
    assert live.weights == "model"
    assert not np.array_equal(draw(live), draw(pipeline))
    pipeline.save_pretrained(tmp_path)
    assert "model.safetensors cannot be read" in refusal(tmp_path, weights="model")


def test_an_autoencoder_travels_along(tmp_path: Path) -> None:
    """Saved, moved and loaded again: the pipeline no longer needs the directory it was trained with."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "autoencoder")
    latent = latent_from_spec({"name": "kl", "vae": str(tmp_path / "autoencoder"), "image_size": 2 * SIZE})
    config = Config(latent=LatentConfig("kl", str(tmp_path / "autoencoder"))).to_dict()
    before = GSPNPipeline.from_checkpoint(write_run(tmp_path / "run", channels=4, latent=latent.spec(), config=config))
    images = draw(before)
    assert images.shape == (3, 2 * SIZE, 2 * SIZE, 3) and images.std() > 0
    wide = before(0, num_inference_steps=1, height=12, width=4 * SIZE, output_type="np").images
    assert np.asarray(wide).shape == (1, 12, 4 * SIZE, 3)
    with pytest.raises(ValueError, match="height is 6 pixels, but must be a positive multiple of 4"):
        before(0, height=6)

    before.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "autoencoder")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    after = GSPNPipeline.from_pretrained(tmp_path / "moved")
    np.testing.assert_array_equal(draw(after), images)
    after.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(draw(GSPNPipeline.from_pretrained(tmp_path / "again")), images)
    text = "".join(path.read_text() for path in (tmp_path / "again").rglob("*.[jm]*"))
    assert str(tmp_path) not in text
    kinds = {path.suffix for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}


def test_places_on_the_machine_are_not_published(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    text = "".join(path.read_text() for path in (tmp_path / "config.json", tmp_path / "README.md"))
    assert "someone" not in text and "secret" not in text
    manifest = json.loads((tmp_path / "config.json").read_text())
    assert manifest["data"] == DATA
    assert manifest["step"] == 100
    assert manifest["config"]["data"] == {**Config().to_dict()["data"], "name": "imagefolder", "path": None}


def test_a_later_save_replaces_an_earlier_one(run_directory: Path, pipeline: GSPNPipeline, tmp_path: Path) -> None:
    write_run(tmp_path / "other", seed=10)
    GSPNPipeline.from_checkpoint(tmp_path / "other").save_pretrained(tmp_path / "saved")
    pipeline.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(draw(GSPNPipeline.from_pretrained(tmp_path / "saved")), draw(pipeline))


def test_what_cannot_be_saved(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"cannot save the model in .*file"):
        pipeline.save_pretrained(tmp_path / "file")
    for options in ({"safe_serialization": False}, {"variant": "fp16"}):
        with pytest.raises(ValueError, match="only safetensors without a variant are written"):
            pipeline.save_pretrained(tmp_path / "new", **options)
    with pytest.raises(ValueError, match="load that with from_checkpoint"):
        GSPNPipeline.from_pipe(pipeline, model=tiny_model(0)).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_damage_is_found(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(f"{path} is damaged (checksum)")


# -- the model card --------------------------------------------------------------------------------------------------


def read_card(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_model_card_says_what_it_is(pipeline: GSPNPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, license="cc-by-nc-4.0")
    front, body = read_card((tmp_path / "README.md").read_text())
    assert (front["license"], front["library_name"]) == ("cc-by-nc-4.0", "gspn-dit")
    for line in (
        "# GSPN-N/2, 5 classes",
        "- data: 1,234 images of 'animals'",
        "Weights: cc-by-nc-4.0. ",
        "0. ant",
        "4. 10",
        'GSPNPipeline.from_pretrained("DIR")',
    ):
        assert line in body
    huggingface_hub.ModelCard((tmp_path / "README.md").read_text())  # the Hub can read it


def test_the_example_of_the_card_runs(run_directory: Path, tmp_path: Path) -> None:
    text = model_card.model_card(tiny_manifest(), "ema", repo_id=str(run_directory))
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(names["images"]) == 2


# -- the Hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the Hub: remembers what was uploaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, card: str | None = None) -> None:
        self.uploads: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        generic = huggingface_hub.ModelCard(card or "---\ntags: []\n---\nsome generic card")
        monkeypatch.setattr(
            hub_utils, "create_repo", lambda name, **options: huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")
        )
        monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *arguments, **options: generic)
        monkeypatch.setattr(hub_utils, "upload_folder", self.upload)

    def upload(self, folder_path: str, **options: Any) -> str:
        self.uploads.append(options)
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return "done"


def test_push_to_hub_uploads_what_save_pretrained_writes(
    pipeline: GSPNPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    assert pipeline.push_to_hub("someone/animals", private=True) == "done"
    assert [upload["repo_id"] for upload in hub.uploads] == ["someone/animals"]
    pipeline.save_pretrained(tmp_path)
    assert sorted(hub.files) == ["README.md", "config.json", "ema.safetensors"]
    for name in ("config.json", "ema.safetensors"):
        assert hub.files[name] == (tmp_path / name).read_bytes()
    front, body = read_card(hub.files["README.md"].decode())
    assert front["library_name"] == "gspn-dit"
    assert 'GSPNPipeline.from_pretrained("someone/animals")' in body
    assert "0. ant" in body

    hub.files = {}
    pipeline.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="someone/again")
    assert hub.uploads[-1]["repo_id"] == "someone/again"
    assert sorted(hub.files) == ["README.md", "config.json", "ema.safetensors"]


def test_a_card_edited_on_the_hub_stays(pipeline: GSPNPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, card="---\nlibrary_name: gspn-dit\n---\n# Animals by hand\n")
    pipeline.push_to_hub("someone/animals")
    assert "# Animals by hand" in hub.files["README.md"].decode()


def test_a_repository_is_downloaded_and_loaded(
    pipeline: GSPNPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path / "cache")
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = GSPNPipeline.from_pretrained("someone/animals", revision="v1", token="secret", cache_dir="here")
    np.testing.assert_array_equal(draw(loaded), draw(pipeline))
    ((name, options),) = asked
    assert (name, options["revision"], options["token"], options["cache_dir"]) == (
        "someone/animals",
        "v1",
        "secret",
        "here",
    )
    assert options["allow_patterns"] == ["*.json", "*.safetensors", "README.md"]  # nothing that would be unpickled


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("offline\nand more"),
        OSError("offline\nand more"),
        ValueError("offline\nand more"),
    ],
)
def test_a_repository_that_cannot_be_had(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert refusal("someone/animals") == (
        "'someone/animals' is neither a directory nor a repository of the Hugging Face Hub that can be read: offline"
    )


@pytest.mark.parametrize("name", ["/no/such/place", "./animals", "runs/mine/checkpoints", "a b", "../x"])
def test_a_path_is_not_looked_for_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: pytest.fail("asked"))
    assert refusal(name) == f"{name} does not exist; give a directory or the id of a repository on the Hugging Face Hub"


def test_a_repository_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(tmp_path))
    assert refusal("facebook/DiT-XL-2-256") == f"{tmp_path} is not a complete checkpoint: it has no config.json"


# -- a pipeline of diffusers -----------------------------------------------------------------------------------------


def test_it_is_a_pipeline_of_diffusers(pipeline: GSPNPipeline) -> None:
    parts = {"model", "scheduler", "latent", "vae", "guide", "objective", "class_names"}
    assert set(pipeline.components) == parts
    np.testing.assert_array_equal(draw(GSPNPipeline(**pipeline.components)), draw(pipeline))
    assert "GSPNTransformer" in repr(pipeline)
    assert "GSPNTransformer" in repr(GSPNPipeline.from_pipe(pipeline))
    assert pipeline.to("cpu") is pipeline
    assert pipeline.to(torch.device("cpu"), torch.float32) is pipeline
    assert (pipeline.device, pipeline.dtype) == (torch.device("cpu"), torch.float32)

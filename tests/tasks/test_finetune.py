"""Fine-tuning: all weights but those of other classes come from the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gspn_dit.errors import UserError
from gspn_dit.tasks import create_task
from gspn_dit.tasks.finetune import LABEL_TABLE, resize_label_table
from gspn_dit.training import loop
from tests.tiny import save_checkpoint
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import tensors_of


def test_classes_are_matched_by_name_and_the_null_row_stays_last() -> None:
    table = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    fresh = torch.tensor([[-1.0], [-2.0], [-3.0], [-4.0], [-5.0]])
    resized = resize_label_table(table, ["ant", "bee", "cat"], fresh, ["cat", "dog", "ant", "eel"])
    assert resized.flatten().tolist() == [3, -2, 1, -4, 9]
    assert fresh.flatten().tolist() == [-1, -2, -3, -4, -5]
    assert torch.equal(resize_label_table(table, ["a", "b", "c"], torch.zeros(4, 1), ["a", "b", "c"]), table)
    assert resize_label_table(table, ["a", "b", "c"], torch.zeros(2, 1), ["x"]).flatten().tolist() == [0, 9]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the ten digits."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    run_training(tiny_config(run, max_steps=2))
    return run


@pytest.fixture
def own_classes(tmp_path: Path) -> Path:
    """Images of the classes 3, new and old."""
    for number, name in enumerate(("3", "new", "old") * 4):
        folder = tmp_path / "own" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    return tmp_path / "own"


def test_run_on_own_classes_starts_from_the_averaged_weights(
    pretrained: Path, own_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", max_steps=1, initialize_from=str(pretrained))
    config = changed(config, data={"name": "imagefolder", "path": str(own_classes)})
    scratch = create_task(config).model.state_dict()
    started: list[dict[str, torch.Tensor]] = []
    original = loop.Trainer.run
    monkeypatch.setattr(
        loop.Trainer,
        "run",
        lambda self: (
            started.append({k: v.clone() for k, v in self.state.ema.model.state_dict().items()}) or original(self)
        ),
    )
    run_training(config)
    source = {key.removeprefix("ema/"): v for key, v in tensors_of(pretrained, 2).items() if key.startswith("ema/")}
    (model,) = started
    assert set(model) == set(source)
    for name, tensor in model.items():
        if name != LABEL_TABLE:
            assert torch.equal(tensor, source[name]), name
    assert model[LABEL_TABLE].shape[0] == 4
    assert torch.equal(model[LABEL_TABLE][0], source[LABEL_TABLE][3])  # the class "3"
    assert torch.equal(model[LABEL_TABLE][1:3], scratch[LABEL_TABLE][1:3])
    assert torch.equal(model[LABEL_TABLE][3], source[LABEL_TABLE][10])  # no class
    run_training(changed(config, training={"max_steps": 2}), resume="auto")  # goes on from its own weights


def test_checkpoint_of_another_model_is_refused(pretrained: Path, tmp_path: Path) -> None:
    task = create_task(changed(tiny_config(tmp_path), model={"hidden_size": 32}))
    with pytest.raises(UserError, match=r"initialize_from .* belongs to another model: '.*' has shape \[.*\] there"):
        task.start_from(str(pretrained))
    with pytest.raises(UserError, match="does not exist; give a run directory"):
        run_training(tiny_config(tmp_path / "run", initialize_from=str(tmp_path / "absent")))
    assert not (tmp_path / "run").exists()


def test_weights_that_predict_something_else_are_refused(tmp_path: Path) -> None:
    """Data and velocities have one shape; a checkpoint from before there was a choice predicts velocities."""
    task = create_task(tiny_config(tmp_path))
    for name, objective, refused in (
        ("older", {}, False),
        ("velocity", {"prediction": "velocity"}, False),
        ("data", {"prediction": "data"}, True),
    ):
        manifest = {**task.describe(), "config": {"objective": objective}}
        saved = str(save_checkpoint(tmp_path / name, 1, {"ema": task.model.state_dict()}, manifest))
        if not refused:
            task.start_from(saved)
            continue
        with pytest.raises(UserError, match=r"to another model: objective.prediction is data there and velocity here"):
            task.start_from(saved)
        create_task(changed(tiny_config(tmp_path), objective={"prediction": "data"})).start_from(saved)


@pytest.mark.parametrize("kind", ["kl", "dc", "rae", "flux2"])
def test_weights_of_another_autoencoder_are_refused_whatever_its_kind(tmp_path: Path, kind: str) -> None:
    """Its latents have the same shape and mean something else; another size of image is no other autoencoder."""
    task = create_task(tiny_config(tmp_path))
    task.description["latent"] = {  # type: ignore[attr-defined]
        **{"name": kind, "vae": "here", "vae_hash": "a", "scale": 1.0, "shift": 0.0},
        **{"image_size": 8, "image_channels": 1},
    }
    for name, options in (("same", {"image_size": 16, "vae": "there"}), ("other", {"vae_hash": "b"})):
        manifest = {**task.describe(), "latent": {**task.describe()["latent"], **options}}
        saved = str(save_checkpoint(tmp_path / name, 1, {"ema": task.model.state_dict()}, manifest))
        if name == "same":
            task.start_from(saved)
            continue
        with pytest.raises(UserError, match=r"the latents are those of the VAE here \(hash b.*but given is .*hash a"):
            task.start_from(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("timestep_endpoint", True), ("num_heads", 2), ("scan_directions", ["left", "right", "down", "up"])],
        *[("norm", "rms"), ("rotary", True)],
    ],
)
def test_option_that_no_shape_shows_is_compared(tmp_path: Path, key: str, value: Any) -> None:
    model = {"name": "DiT-N/4", "hidden_size": 16, "depth": 1, "num_heads": 4}
    task = create_task(changed(tiny_config(tmp_path), model=model))
    for name, options in (("same", {}), ("other", {key: value})):
        manifest = {**task.describe(), "model": {**task.describe()["model"], **options}}
        saved = save_checkpoint(tmp_path / name, 1, {"ema": task.model.state_dict()}, manifest)
        if not options:
            task.start_from(str(saved))
            continue
        with pytest.raises(UserError, match=re.escape(f"belongs to another model: {key} is {value} there and")):
            task.start_from(str(saved))

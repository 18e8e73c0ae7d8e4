"""The trainer asks a task for what its interface says and no more: a model of two numbers trains and resumes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gspn_dit import rng
from gspn_dit.checkpoint import checkpoint_directory, load_tensors, read_manifest
from gspn_dit.config import Config
from gspn_dit.errors import UserError
from gspn_dit.tasks import TASKS, Task
from tests.training.conftest import run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of


class Line(Task):
    """Learns y = 3x - 1 from drawn x; a companion learns the same from the model's answers."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = nn.Linear(1, 1)
        self.critic = nn.Linear(1, 1)
        for module in (self.model, self.critic):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        self.companions = {"critic": self.critic}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return []

    def multiply_adds(self) -> int:
        return 1

    def _x(self, numbers: range, stream: rng.Stream) -> Tensor:
        return rng.normal(self.config.seed, stream, numbers, (1,))

    def loss(self, model: nn.Module, numbers: range) -> dict[str, Tensor]:
        x = self._x(numbers, rng.Stream.NOISE)
        answer = model(x)
        error = (answer - (3 * x - 1)).square().mean()
        agreement = (self.critic(x) - answer).square().mean()
        return {"loss": error + agreement, "error": error, "agreement": agreement}

    @property
    def validation_count(self) -> int:
        return 10

    def validate(self, model: nn.Module, indices: range) -> dict[str, tuple[Tensor, Tensor]]:
        x = self._x(indices, rng.Stream.VALIDATION_NOISE)
        errors = (model(x) - (3 * x - 1)).abs()
        return {"val_error": (errors.sum(), torch.tensor(len(x)))}

    def preview(self, model: nn.Module, path: Path) -> None:
        path.with_suffix(".txt").write_text(f"{[round(p.item(), 3) for p in model.parameters()]}")

    def describe(self) -> dict[str, Any]:
        return {"data": {"name": "line", "images": 100, "fingerprint": "3x-1"}}

    def summary(self) -> list[tuple[str, str]]:
        return [("data", "points of a line")]


@pytest.fixture(autouse=True)
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "line", Line)


def config(output_dir: Path, **training: Any) -> Config:
    return dataclasses.replace(tiny_config(output_dir, **training), task="line")


def test_losses_are_logged_by_name_and_survive_a_kill_between_two_lines(tmp_path: Path) -> None:
    """Bit for bit, with the companion, and with what was lost between the last line and the checkpoint."""
    every: dict[str, Any] = {"log_every": 3, "validate_every": 3, "max_steps": 6}
    run_training(config(tmp_path / "whole", **every))
    lines = metrics_of(tmp_path / "whole")
    trained, validated = ([line for line in lines if name in line] for name in ("loss", "val_error"))
    assert [line["step"] for line in trained] == [line["step"] for line in validated] == [3, 6]
    for line in trained:
        assert line["loss"] == pytest.approx(line["error"] + line["agreement"], rel=1e-5)
    assert validated[1]["val_error"] < validated[0]["val_error"]
    assert (tmp_path / "whole" / "samples" / "step-00000006.txt").exists()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (4, 6):
        shutil.rmtree(checkpoint_directory(tmp_path / "killed", step))
    manifest = read_manifest(checkpoint_directory(tmp_path / "killed", 2))
    assert len(manifest["losses_since_log"]) == 2
    assert {name: len(values) for name, values in manifest["metrics_since_log"].items()} == {"error": 2, "agreement": 2}
    run_training(config(tmp_path / "killed", **every), resume="auto")
    assert metrics_of(tmp_path / "killed") == lines
    assert_same_tensors(tensors_of(tmp_path / "whole", 6), tensors_of(tmp_path / "killed", 6))
    critics = [load_tensors(checkpoint_directory(tmp_path / name, 6), "critic") for name in ("whole", "killed")]
    assert_same_tensors(*critics)
    assert critics[0]["weight/weight"].item() != 0


def test_what_a_task_cannot_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for settings, message in (
        ({"fd_every": 2}, "training.fd_every: task line draws no images to score; leave it out"),
        ({"initialize_from": "runs/other"}, "training.initialize_from does not go with task line; leave it out"),
    ):
        with pytest.raises(UserError) as caught:
            run_training(config(tmp_path / "run", **settings))
        assert str(caught.value) == message
        assert not (tmp_path / "run").exists()


def test_other_data_are_noticed_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_training(config(tmp_path, max_steps=2))
    monkeypatch.setattr(Line, "describe", lambda self: {"data": {"name": "curve", "images": 7, "fingerprint": "x"}})
    with pytest.raises(UserError, match="was trained on other data: 100 images of 'line' then, 7 of 'curve' now"):
        run_training(config(tmp_path), resume="auto")

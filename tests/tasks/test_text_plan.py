"""What a dry run says of text-to-image, against the run itself: nothing is read, encoded or written for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import saved_bytes
from gspn_dit.config import Config, TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import Captioned
from gspn_dit.tasks import create_task
from gspn_dit.tasks.text_plan import COCO_IMAGES
from gspn_dit.tasks.text_to_image import TextToImage
from gspn_dit.training.dry_run import dry_run, estimate_memory
from tests.captioned import text_config, write_captioned, write_encoder
from tests.training.conftest import run_training

pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("captioned")
    return write_captioned(folder / "data"), write_encoder(folder / "encoder")


def plan_of(config: Config) -> Any:
    return TextToImage.plan(config)


@pytest.mark.parametrize("mixer", ["gspn", "attention"])
def test_a_plan_counts_what_the_run_has(tmp_path: Path, places: tuple[Path, str], mixer: str) -> None:
    config = text_config(tmp_path / "run", *places, {"text": {"max_tokens": 5}, "unet": {"mixer": mixer}})
    plan, task = plan_of(config), create_task(config)
    assert all(parameter.is_meta for parameter in plan.model.parameters())
    shapes = [[tuple(p.shape) for p in model.parameters()] for model in (plan.model, task.model)]
    assert shapes[0] == shapes[1]
    assert task.table.length == 5  # [CLS], three words and [SEP]: as long as the plan takes every caption to be
    assert plan.multiply_adds == task.multiply_adds()
    assert plan.images == 12 and "12 captioned images" in plan.data
    # Of the first level's 8×8 tokens of 8 channels: 12 logits and 8 gates for each.
    assert plan.working_elements == (64 * 8 * 20 * 2 if mixer == "gspn" else 0)


def test_activations_are_those_that_autograd_keeps(tmp_path: Path, places: tuple[Path, str]) -> None:
    config = text_config(tmp_path / "run", *places, {"text": {"max_tokens": 5}})
    counted = estimate_memory(plan_of(config), 3, TrainingConfig(), 1)
    task: Any = create_task(config)
    called = Captioned(task.model, task.table, 8)
    number = torch.full((3,), task.table.numbers["a red dog"])

    def forward() -> torch.Tensor:
        return called(torch.zeros(3, 3, 8, 8), torch.zeros(3), number).square()

    assert counted.activations == pytest.approx(saved_bytes(forward, list(task.model.parameters())), rel=0.02)


def test_of_a_student_the_scans_are_trained_and_its_teachers_attention_is_kept(
    tmp_path: Path, places: tuple[Path, str]
) -> None:
    teacher = tmp_path / "teacher"
    run_training(text_config(teacher, *places, {"unet": {"mixer": "attention"}}, max_steps=1))
    config = text_config(tmp_path / "run", *places, {"unet": {"teacher": str(teacher)}})
    plan, task = plan_of(config), create_task(config)
    trained = sum(weight.numel() for weight in task.model.parameters() if weight.requires_grad)
    assert sum(weight.numel() for weight in plan.model.parameters() if weight.requires_grad) == trained
    own = [part for name, part in task.distillation.teacher.named_modules() if name.endswith(".attn1")]
    assert plan.frozen_elements == sum(weight.numel() for part in own for weight in part.parameters())
    assert f"of which {trained:,} are trained to do as {teacher} does" in dict(plan.rows)["model"]


def test_the_report_needs_neither_data_nor_weights(
    tmp_path: Path, places: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = text_config(tmp_path / "run", Path("nowhere"), places[1], {"data": {"image_size": 8}}, max_steps=100)
    dry_run(config)
    told = capsys.readouterr().out
    parameters = sum(weight.numel() for weight in plan_of(config).model.parameters())
    assert f"UNet with scans, {parameters:,} parameters" in told
    assert "at most 8 tokens of 16 channels" in told
    assert f"100 steps, 400 images, {400 / COCO_IMAGES:.3g} epochs" in told
    assert "COCO 2014's training images" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"unet": {"channels": [12]}}, r"unet: unet.channels \[12\] must be multiples of 8"),
        ({"unet": {"channels": [8, 8, 8], "patch_size": 4}}, "8×8 are not divisible by 16"),
        ({"model": {"name": "GSPN-B/2"}}, "model.name is GSPN-B/2, but task text-to-image trains a diffusers UNet"),
        ({"unet": {"teacher": "nowhere"}}, "checkpoint nowhere does not exist"),
    ],
)
def test_a_plan_refuses_what_training_would(
    tmp_path: Path, places: tuple[Path, str], sections: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(text_config(tmp_path / "run", *places, sections))

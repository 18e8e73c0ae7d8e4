"""The classification task: what reaches the model, what is validated, exact resume, and the report of a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from gspn_dit import evaluate, rng
from gspn_dit.checkpoint import checkpoint_directory
from gspn_dit.classifier import ImageClassifier
from gspn_dit.config import ClassificationConfig, Config, config_from_dict
from gspn_dit.errors import UserError
from gspn_dit.models.classifiers import classifier_blocks, classifier_multiply_adds, create_classifier
from gspn_dit.tasks import create_task
from gspn_dit.tasks.classification import Classification
from gspn_dit.tasks.mistakes import Answers, wilson
from gspn_dit.training.dry_run import estimate, report
from tests.training.conftest import changed, fresh_accelerator, run_training  # noqa: F401 (a fixture for all tests)
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of

TINY = {"widths": [8, 16], "depths": [1, 1], "global_stages": [1], "proxy_channels": 2}
EVERYTHING = {
    "crop_scale": [0.5, 1.0],
    "crop_padding": 1,
    "colour_jitter": 0.4,
    "randaugment_magnitude": 9.0,
    "randaugment_deviation": 0.5,
    "erasing_probability": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}
"""Of `classification`: all augmentations."""


def config(output_dir: Path, classification: dict[str, Any] | None = None, **training: Any) -> Config:
    """A model of a few thousand weights on the digits; keywords override `training` keys."""
    settings = {
        "max_steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "log_every": 3,
        "checkpoint_every": 2,
        "sample_every": 6,
        "validate_every": 3,
        "validation_images": 40,
        "keep_last": 10,
        "trackers": [],
        **training,
    }
    return config_from_dict(
        {
            "task": "classification",
            "output_dir": str(output_dir),
            "model": {"name": "gspn_nano", "backbone_options": TINY, "drop_path_rate": 0.3},
            "data": {"horizontal_flip": True},
            "classification": classification or {},
            "training": settings,
        }
    )


class Recorder(nn.Module):
    """Answers zeros, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, *arguments: Tensor) -> Tensor:
        self.calls.append(arguments)
        return torch.zeros(len(arguments[0]), 10)


# -- training --------------------------------------------------------------------------------------------------------


def test_images_mask_and_labels_of_the_sample_numbers_reach_the_model(tmp_path: Path) -> None:
    task, model, numbers = create_task(config(tmp_path, EVERYTHING)), Recorder(), range(41, 48)
    assert isinstance(task, Classification)
    loss = task.loss(model, numbers)["loss"]
    ((images, keep_mask),) = model.calls
    expected, labels = task.train_data.shuffled(numbers)
    assert torch.equal(images, expected)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(7))
    rates = torch.tensor(task.model.drop_path_rates)  # type: ignore[arg-type]
    assert rates.tolist() == pytest.approx([0, 0, 0.3, 0.3])
    draws = rng.uniform(0, rng.Stream.STOCHASTIC_DEPTH, numbers, rates.shape)
    assert torch.equal(keep_mask, (draws >= rates).T)
    assert loss.item() == pytest.approx(np.log(10), rel=1e-5)  # whatever the labels: all classes are as likely


def test_the_loss_is_that_of_mixed_and_smoothed_labels(tmp_path: Path) -> None:
    task = create_task(config(tmp_path, EVERYTHING))
    assert isinstance(task, Classification)
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))

    class Answer(nn.Module):
        def forward(self, images: Tensor, keep_mask: Tensor) -> Tensor:
            return logits

    _, labels = task.train_data.shuffled(range(8))
    smoothed = 0.9 * labels + 0.1 / 10
    expected = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(task.loss(Answer(), range(8))["loss"], expected)


def test_a_batch_that_is_cut_between_partners_is_the_same(tmp_path: Path) -> None:
    """Any split of the numbers over processes and micro-steps, odd ones too, gives the samples of the whole batch."""
    task = create_task(config(tmp_path, EVERYTHING))
    assert isinstance(task, Classification)
    whole, labels = task.train_data.shuffled(range(8))
    for cut in (1, 3, 4):
        parts = [task.train_data.shuffled(part) for part in (range(cut), range(cut, 8))]
        assert torch.equal(torch.cat([images for images, _ in parts]), whole)
        assert torch.equal(torch.cat([each for _, each in parts]), labels)


def test_killed_and_resumed_through_augmentation_is_bit_identical(tmp_path: Path) -> None:
    options: dict[str, Any] = {"decay_vectors": False, "layer_decay": 0.7, "weight_decay": 0.05, "warmup_steps": 3}
    run_training(config(tmp_path / "whole", EVERYTHING, **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (4, 6):
        shutil.rmtree(checkpoint_directory(tmp_path / "killed", step))
    run_training(config(tmp_path / "killed", EVERYTHING, **options), resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 6), tensors_of(tmp_path / "killed", 6))
    lines = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "killed") == lines
    validated = [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in validated] == [3, 6]
    assert all(0 <= line["val_top1"] <= line["val_top5"] <= 1 for line in validated)
    assert "Validation accuracy" in (tmp_path / "whole" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "whole" / "samples" / "step-00000006.png").exists()


def test_accumulation_changes_the_order_of_sums_alone(tmp_path: Path) -> None:
    run_training(config(tmp_path / "one", EVERYTHING, max_steps=3))
    run_training(config(tmp_path / "two", EVERYTHING, max_steps=3, gradient_accumulation_steps=4))
    one, two = (tensors_of(tmp_path / name, 3) for name in ("one", "two"))
    for name in one:
        if name.startswith("ema/"):
            torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-5, msg=name)


def test_a_small_net_learns_the_digits(tmp_path: Path) -> None:
    wider = {"widths": [16, 32], "depths": [1, 1], "global_stages": [0, 1]}
    every = dict.fromkeys(("log_every", "validate_every", "checkpoint_every", "sample_every"), 320)
    options: dict[str, Any] = {
        "learning_rate_schedule": "cosine",
        "ema_decay": 0.9,
        "max_steps": 320,
        "warmup_steps": 20,
        **every,
    }
    settings = config(
        tmp_path, {"crop_padding": 1}, batch_size=32, learning_rate=3e-3, validation_images=360, **options
    )
    run_training(
        changed(settings, model={"drop_path_rate": 0.0, "backbone_options": wider}, data={"horizontal_flip": False})
    )
    assert metrics_of(tmp_path)[-1]["val_top1"] > 0.85


def test_running_statistics_are_evaluated_with_the_averaged_weights(tmp_path: Path) -> None:
    """A model with batch norm: its averaged copy has the buffers of the last step."""
    timm = pytest.importorskip("timm")
    assert timm
    model = {"name": "timm/resnet10t", "backbone_options": {"channels": [8, 8, 8, 8], "stem_width": 8}}
    run_training(changed(config(tmp_path, max_steps=2), model={**model, "drop_path_rate": 0.0}))
    tensors = tensors_of(tmp_path, 2)
    means = [name for name in tensors if name.startswith("ema/") and name.endswith("running_mean")]
    assert means and all(torch.equal(tensors[name], tensors["model/" + name[4:]]) for name in means)
    assert any(tensors[name].abs().sum() > 0 for name in means)


# -- validation and pictures -----------------------------------------------------------------------------------------


def test_validation_sums_do_not_depend_on_how_the_images_are_cut(tmp_path: Path) -> None:
    task = create_task(config(tmp_path))
    model = task.model.eval()
    assert task.validation_count == 40
    with torch.no_grad():
        whole = task.validate(model, range(40))
        parts = [task.validate(model, range(start, start + 8)) for start in range(0, 40, 8)]
    assert list(whole) == ["val_loss", "val_top1", "val_top5"]
    for name, (total, count) in whole.items():
        assert sum(part[name][0].item() for part in parts) == pytest.approx(total.item(), rel=1e-5)
        assert count.item() == sum(part[name][1].item() for part in parts) == 40
    assert isinstance(task, Classification) and task.validation_data is not None
    images, labels = task.validation_data.at(range(40))
    with torch.no_grad():
        logits = model(images)
    assert whole["val_loss"][0].item() == pytest.approx(F.cross_entropy(logits, labels).item() * 40, rel=1e-5)
    assert whole["val_top1"][0].item() == (logits.argmax(1) == labels).sum().item()


ANSWERS = Answers(
    probabilities=np.array(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.0, 0.9, 0.1]], dtype=np.float32
    ),
    labels=np.array([0, 1, 1, 2, 2]),
    class_names=("cat", "dog", "owl"),
)


def test_figures_of_answers_by_hand() -> None:
    assert ANSWERS.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert ANSWERS.top(1) == 3 / 5 and ANSWERS.top(2) == 1.0
    assert ANSWERS.loss == pytest.approx(-np.log([0.7, 0.8, 0.3, 0.5, 0.1]).mean(), rel=1e-6)
    assert ANSWERS.worst(5).tolist() == [4, 2]  # an owl for a dog at 90%, a dog for a cat at 60%
    assert [row["recall"] for row in ANSWERS.per_class()] == [1.0, 0.5, 0.5]
    assert [row["precision"] for row in ANSWERS.per_class()] == [0.5, 0.5, 1.0]
    assert evaluate.confusions(ANSWERS) == [
        {"class": "dog", "taken_for": "cat", "images": 1},
        {"class": "owl", "taken_for": "dog", "images": 1},
    ]
    absent = dataclasses.replace(ANSWERS, labels=np.array([0, 1, 1, 0, 0]))
    assert absent.per_class()[2] == {"class": "owl", "images": 0, "recall": None, "precision": 0.0}


def test_wilsons_interval_by_hand() -> None:
    """None of ten: from 0 to z² / (n + z²)."""
    low, high = wilson(0.0, 10)
    assert low == pytest.approx(0.0, abs=1e-12) and high == pytest.approx(1.959964**2 / (10 + 1.959964**2))


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on the digits."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("trained") / "run"
    run_training(config(run, {"evaluation_crop": 1.0}, max_steps=4, validation_images=360, validate_every=4))
    return run


def test_the_report_agrees_with_the_validation_of_training(trained: Path, tmp_path: Path) -> None:
    evaluate.main(["--checkpoint", str(trained), "--out", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    logged = next(line for line in metrics_of(trained) if "val_top1" in line)
    assert report["images"] == 360 and report["step"] == 4
    assert report["scores"]["top1"]["share"] == pytest.approx(logged["val_top1"])
    assert report["scores"]["top5"]["share"] == pytest.approx(logged["val_top5"])
    assert report["scores"]["loss"] == pytest.approx(logged["val_loss"], rel=1e-4)
    assert sum(row["images"] for row in report["classes"]) == 360
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")


def test_other_images_are_scored_by_the_names_of_their_classes(trained: Path, tmp_path: Path) -> None:
    """A folder of two classes, larger images: ids there differ from the model's."""
    classifier = ImageClassifier.from_checkpoint(trained)
    digits, _ = classifier.own_data()
    for name in ("7", "3"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = np.flatnonzero(digits.labels == int(name))[:5]
        for row, pixels in zip(rows, digits.pixels(rows), strict=True):
            Image.fromarray(pixels[:, :, 0]).resize((16, 16), Image.Resampling.NEAREST).save(
                tmp_path / "data" / name / f"{row}.png"
            )
    images = evaluate.open_images(classifier, f"imagefolder:{tmp_path / 'data'}", "all")
    report, picture = evaluate.evaluate(classifier, images, batch_size=3)
    counts = {row["class"]: row["images"] for row in report["classes"]}
    assert counts["3"] == counts["7"] == 5 and sum(counts.values()) == 10
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist; give a run directory"),
        (["--checkpoint", "{run}", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--checkpoint", "{run}", "--data", "photos:x"], "--source photos:x is unknown; give imagefolder:DIR"),
        (["--checkpoint", "{run}", "--data", "imagefolder:{tmp}/none"], "the data path {tmp}/none does not exist"),
        (["--checkpoint", "{run}", "--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--checkpoint", "{run}", "--out", "{run}"], "--out {run} holds something besides a report (checkpoints"),
        (["--checkpoint", "{run}", "--out", "{run}/config.yaml"], "--out {run}/config.yaml"),
        (["--checkpoint", "{run}", "--split", "test"], "argument --split: invalid choice: 'test'"),
    ],
)
def test_mistakes_of_evaluation_take_one_line(
    trained: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"run": str(trained), "tmp": str(tmp_path)}
    with pytest.raises(UserError) as caught:
        evaluate.main([word.format(**places) for word in arguments])
    assert str(caught.value).startswith(message.format(**places)) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    from tests.training.conftest import tiny_config

    run_training(tiny_config(tmp_path, max_steps=1))
    with pytest.raises(UserError, match="is not of task classification: class-conditional"):
        ImageClassifier.from_checkpoint(tmp_path)


# -- models, plans and mistakes --------------------------------------------------------------------------------------


def test_fine_tuning_keeps_the_rows_of_classes_of_the_same_name(trained: Path, tmp_path: Path) -> None:
    for name in ("3", "zebra"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for shade in range(8):
            Image.new("L", (8, 8), 20 * shade).save(tmp_path / "data" / name / f"{shade}.png")
    data = {"name": "imagefolder", "path": str(tmp_path / "data"), "validation_fraction": 0.25}
    task = create_task(changed(config(tmp_path / "run"), data=data))
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    task.start_from(str(trained))
    after, old = task.model.state_dict(), ImageClassifier.from_checkpoint(trained).model.state_dict()
    assert torch.equal(after["head.weight"][0], old["head.weight"][3])
    assert torch.equal(after["head.weight"][1], before["head.weight"][1])
    assert all(torch.equal(after[name], old[name]) for name in after if not name.startswith("head."))
    other = changed(config(tmp_path / "run"), model={"backbone_options": {**TINY, "widths": [8, 24]}})
    with pytest.raises(UserError, match="belongs to another model"):
        create_task(other).start_from(str(trained))


def test_the_dry_run_counts_what_the_model_has(tmp_path: Path) -> None:
    settings = config(tmp_path)
    figures, task = estimate(settings, 1), create_task(settings)
    assert figures.parameters == sum(parameter.numel() for parameter in task.model.parameters())
    assert figures.plan.multiply_adds == task.multiply_adds() > 0
    assert figures.memory.activations > 0 and figures.plan.working_elements > 0
    assert "gspn_nano" in report(settings, figures)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "gspn_tini"}}, "model: unknown classifier 'gspn_tini'; allowed are gspn_tiny, "),
        ({"model": {"name": "timm/no_such_net", "drop_path_rate": None}}, "model: timm/no_such_net cannot be built: "),
        ({"model": {"name": "timm/resnet10t", "backbone_options": {"drop_rate": 0.5}}}, "model: option drop"),
        ({"model": {"backbone_options": {"width": 3}}}, "model: unknown option 'width' of gspn_nano; allowed are "),
        ({"model": {"hidden_size": 8}}, "model.hidden_size does not go with task classification"),
        ({"data": {"name": "latents", "path": "x"}}, "data.name latents holds no images, which task classification"),
        ({"data": {"streaming": True, "name": "hf", "path": "x"}}, "data.streaming does not go with task classif"),
        ({"training": {"repa_features": "x.npy"}}, "training.repa_features does not go with task classification"),
        ({"classification": {"mean": [0.1, 0.2, 0.3]}}, "classification.mean has 3 numbers, but the images of 'dig"),
        ({"training": {"fd_every": 2}}, "training.fd_every: task classification draws no images to score; leave it"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_training(changed(config(tmp_path / "run"), **sections))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_blocks_of_known_families_are_found_in_order() -> None:
    timm = pytest.importorskip("timm")
    assert timm
    convnext = create_classifier("timm/convnext_atto", 2, 3, {"depths": [1, 2, 1, 1], "dims": [8, 8, 8, 8]})
    resnet = create_classifier("timm/resnet10t", 2, 3, {"channels": [8, 8, 8, 8], "stem_width": 8})
    ours = create_classifier("gspn_nano", 2, 3, TINY)
    assert [len(classifier_blocks(model)) for model in (convnext, resnet, ours)] == [5, 4, 2]
    assert classifier_multiply_adds(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), 3, 4) == 48 * 5


def test_settings_of_another_kind_are_no_function_of_the_task() -> None:
    assert not ClassificationConfig().mixes and ClassificationConfig(cutmix=0.1).mixes

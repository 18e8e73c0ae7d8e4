"""Classification: labelled images, augmented and mixed by sample number, and a model that names their classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit import rng
from gspn_dit.checkpoint import give_weights, load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.config import Config
from gspn_dit.data.classified import build_classified, check_stored
from gspn_dit.data.facts import data_facts
from gspn_dit.errors import UserError
from gspn_dit.models.classifiers import (
    classifier_blocks,
    classifier_multiply_adds,
    create_classifier,
    run_classifier,
    scans_working_elements,
)
from gspn_dit.tasks.base import Task
from gspn_dit.tasks.finetune import rows_by_name
from gspn_dit.tasks.plan import Plan, gigabytes


class Classification(Task):
    """A model learns to name the class of an image."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check(config)
        data = build_classified(config)
        self.train_data, self.validation_data = data.training, data.validation
        images = self.train_data.images
        self.class_names = images.class_names
        arguments = model_arguments(config, images.num_classes, images.channels)
        self.description = {
            "model": arguments,
            "image_size": images.image_size,
            "class_names": self.class_names,
            "data": {"name": images.name, "images": len(images), "fingerprint": data.fingerprint},
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(arguments)
        if config.training.layer_decay < 1 and not classifier_blocks(self.model):
            raise UserError(f"training.layer_decay: {config.model.name} does not tell its blocks; leave it out")
        self.drop_path_rates: Sequence[float] = getattr(self.model, "drop_path_rates", ())

    @classmethod
    def plan(cls, config: Config) -> Plan:
        _check(config)
        check_stored(config)
        facts = data_facts(config)
        with torch.device("meta"):
            model = build_model(model_arguments(config, facts.num_classes, facts.channels))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        multiply_adds = classifier_multiply_adds(model, facts.channels, facts.size)
        shape = f"{facts.channels}×{facts.size}×{facts.size}"
        return Plan(
            model=model,
            inputs=lambda batch: (torch.empty(batch, facts.channels, facts.size, facts.size),),
            multiply_adds=multiply_adds,
            images=facts.images,
            data=f"{facts.images:,} images of {facts.num_classes} classes, {gigabytes(facts.bytes)} ({facts.source})",
            rows=[
                ("model", f"{config.model.name}, {parameters:,} parameters"),
                ("forward", f"{multiply_adds / 1e9:.4g} G multiply-adds for an image of {shape}"),
            ],
            blocks=max(1, len(classifier_blocks(model))),
            working_elements=scans_working_elements(model, facts.size),
        )

    # -- where and how it runs -----------------------------------------------------------------------------------

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return classifier_blocks(model)

    def checkpoint_activations(self) -> None:
        self.model.set_grad_checkpointing(True)  # type: ignore[operator]

    def multiply_adds(self) -> int:
        return classifier_multiply_adds(self.model, self.train_data.images.channels, self.train_data.images.image_size)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, numbers: range) -> dict[str, Tensor]:
        """Return the cross-entropy with the mixed and smoothed labels of the samples with these numbers."""
        images, labels = self.train_data.shuffled(numbers)
        logits = run_classifier(model, images.to(self.device), self._keep_mask(numbers))
        smoothing = self.config.classification.label_smoothing
        return {"loss": F.cross_entropy(logits.float(), labels.to(self.device), label_smoothing=smoothing)}

    def _keep_mask(self, numbers: range) -> Tensor | None:
        """Return which blocks keep their branch for which samples, bool [blocks, B]; None where all do."""
        if not any(self.drop_path_rates):
            return None
        rates = torch.tensor(self.drop_path_rates)
        draws = rng.uniform(self.config.seed, rng.Stream.STOCHASTIC_DEPTH, numbers, rates.shape)
        return (draws >= rates).T.to(self.device)

    def validate(self, model: nn.Module, indices: range) -> dict[str, tuple[Tensor, Tensor]]:
        """Return cross-entropy, and which images have their class among the first one or five, without augmentation."""
        assert self.validation_data is not None
        images, labels = self.validation_data.at(indices)
        logits = model(images.to(self.device)).float().cpu()
        count = torch.tensor(len(labels))
        first = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        return {
            "val_loss": (F.cross_entropy(logits, labels, reduction="sum"), count),
            "val_top1": (first[:, 0].sum(), count),
            "val_top5": (first.sum(), count),
        }

    def preview(self, model: nn.Module, path: Path) -> None:
        """Draw which classes are taken for which, and the worst mistakes, on the validation images."""
        if self.validation_data is None:
            return
        from gspn_dit.tasks.mistakes import classify, draw_mistakes

        rows = range(self.validation_count)
        draw_mistakes(classify(model, self.validation_data, rows, self.device), self.validation_data, rows, path)

    # -- between runs --------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return self.description

    def summary(self) -> list[tuple[str, str]]:
        images = self.train_data.images
        parameters = sum(weight.numel() for weight in self.model.parameters())
        held_out = f"{self.validation_count:,} more" if self.validation_count else "none"
        data = f"{self.config.data.path or images.name}: {len(images):,} images of {images.num_classes:,} classes, "
        data += f"{images.image_size}x{images.image_size} {'grey' if images.channels == 1 else 'RGB'}; "
        return [
            ("data", f"{data}{held_out} for validation"),
            *(("", remark) for remark in images.remarks),
            ("model", f"{self.config.model.name}, {parameters:,} parameters"),
        ]

    def check_resumed(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        if "image_size" not in manifest:
            raise UserError(f"{checkpoint} is not of task classification; give another output_dir")
        super().check_resumed(checkpoint, manifest)

    def start_from(self, checkpoint: str) -> None:
        """Take the EMA weights of the same architecture; a class of the same name keeps its row of the last layer."""
        place = resolve_checkpoint(checkpoint)
        manifest, tensors, own = read_manifest(place), load_tensors(place, "ema"), self.model.state_dict()
        before, now = manifest.get("class_names", []), self.class_names
        for name in last_layer(self.model) if before != now else ():
            if name in tensors and tensors[name].shape[1:] == own[name].shape[1:]:  # else another model, refused below
                tensors[name] = rows_by_name(tensors[name], before, own[name], now)
        give_weights(self.model, tensors, place, "ema")


def last_layer(model: nn.Module) -> list[str]:
    """Return the names of the tensors that have a row for each class."""
    last = model.get_classifier()  # type: ignore[operator]
    (prefix,) = (name for name, module in model.named_modules() if module is last)
    return [f"{prefix}.{name}" for name in last.state_dict()]


def model_arguments(config: Config, num_classes: int, channels: int) -> dict[str, Any]:
    """Return what `create_classifier` is called with; a checkpoint's manifest holds it."""
    options = dict(config.model.backbone_options or {})
    if config.model.drop_path_rate is not None:
        options["drop_path_rate"] = config.model.drop_path_rate
    return {"name": config.model.name, "num_classes": num_classes, "in_channels": channels, "options": options}


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """Build the model of a manifest; raises UserError where it cannot be."""
    try:
        return create_classifier(**arguments)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def _check(config: Config) -> None:
    """Raise UserError for keys that mean nothing here."""
    ours = {"name", "drop_path_rate", "backbone_options"}
    for key, value in dataclasses.asdict(config.model).items():
        if key not in ours and value is not None:
            raise UserError(
                f"model.{key} does not go with task classification, whose models take model.backbone_options; "
                "leave it out"
            )
    if config.training.repa_features is not None:
        raise UserError("training.repa_features does not go with task classification; leave it out")

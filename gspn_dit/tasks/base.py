"""What the trainer asks of a task: data, model and loss by sample number, and what a person or a checkpoint sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gspn_dit.config import Config
from gspn_dit.diffusion import Guidance
from gspn_dit.errors import UserError
from gspn_dit.grid import class_grid, save_png
from gspn_dit.tasks.plan import Plan


class Task(ABC):
    """What a run learns. Everything random in it is a function of (config.seed, sample number).

    A subclass is built from a config, on the CPU, in every process alike, and raises UserError for whatever does not
    exist or does not fit. The trainer knows nothing of labels, captions or latents: it hands sample numbers in.
    """

    model: nn.Module
    """What is trained, averaged and saved; its weights are a function of the seed."""
    companions: Mapping[str, nn.Module]
    """Modules that are trained with the model, by an optimiser of their own, and left behind after training; each is
    saved in a checkpoint's file of its name. What is frozen (a teacher) is no companion: `to` moves it."""

    validation_data: Any = None
    """Batches of held-out data, whose set is their `images`; None where there are none."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = torch.device("cpu")
        self.companions = {}

    # -- before anything is built --------------------------------------------------------------------------------

    @classmethod
    def plan(cls, config: Config) -> Plan:
        """Return what a run of this config would take, for `--dry-run`; UserError for what training would refuse."""
        raise UserError(f"--dry-run is not known to task {config.task}; start without it")

    @classmethod
    def excludes_sharding(cls, config: Config) -> str | None:
        """Return what forbids splitting the state over processes, such as a key's name; None where nothing does."""
        return None

    # -- where and how it runs -----------------------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        """Move what `loss` uses beside the model and its companions, which the trainer moves itself."""
        self.device = device

    def look(self) -> None:
        """Look at the data, on the device and before anything is written; UserError for what no run should train on."""
        return  # which most tasks have done when they opened them

    def autocast(self) -> AbstractContextManager[None]:
        """Return the precision of `training.mixed_precision`, in which the trainer also runs the model it hands in."""
        bf16 = self.config.training.mixed_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the parts of the model, or of its average, that are compiled, and gathered under FSDP, one by one."""
        return list(model.blocks)  # type: ignore[arg-type]

    def checkpoint_activations(self) -> None:
        """Make the model keep the inputs of its blocks alone for the backward pass."""
        self.model.gradient_checkpointing = True  # type: ignore[assignment]

    @abstractmethod
    def multiply_adds(self) -> int:
        """Return those of the model's forward pass for one sample."""

    # -- training ------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, model: nn.Module, numbers: range) -> dict[str, Tensor]:
        """Return the mean "loss" of the samples with these numbers, and what else is logged beside it, all 0-d.

        `model` is this task's, perhaps wrapped; its output is differentiated. With companions their loss is included.
        """

    @property
    def validation_count(self) -> int:
        """How many samples `validate` has; 0 for none."""
        data = self.validation_data
        return 0 if data is None else min(self.config.training.validation_images, len(data.images))

    def validate(self, model: nn.Module, indices: range) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sum and count of each figure over the samples of these indices, of `validation_count`, 0-d.

        The trainer adds them up over batches and processes, and logs the means; "val_loss" is printed, too.
        """
        return {}

    @abstractmethod
    def preview(self, model: nn.Module, path: Path) -> None:
        """Write a picture of what the averaged model does, from the same noise at every step; or nothing."""

    # -- between runs --------------------------------------------------------------------------------------------

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint says of model and data, in plain JSON values.

        "data" holds at least name, images (how many) and fingerprint, by which other data are noticed.
        """

    @abstractmethod
    def summary(self) -> list[tuple[str, str]]:
        """Return what a person is told of data and model before the first step: rows of a word and a line."""

    def check_resumed(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        """Raise UserError if the checkpoint to resume was trained on other data."""
        before, now = manifest["data"], self.describe()["data"]
        if before["fingerprint"] != now["fingerprint"]:
            raise UserError(
                f"{checkpoint} was trained on other data: {before['images']} images of '{before['name']}' then, "
                f"{now['images']} of '{now['name']}' now; restore it, or start afresh"
            )

    def start_from(self, checkpoint: str) -> None:
        """Give the model the EMA weights of a run directory or checkpoint; UserError where they do not fit."""
        raise UserError(f"training.initialize_from does not go with task {self.config.task}; leave it out")


class GenerativeTask(Task):
    """A task whose model draws images that can be scored against real ones while training."""

    image_size: int
    """Height and width of an image in pixels."""
    image_channels: int

    @property
    @abstractmethod
    def conditions(self) -> Sequence[str]:
        """What there is to draw, by name, such as the classes or some prompts; previews show the first of them."""

    @abstractmethod
    def draw_conditions(self, model: nn.Module, conditions: Sequence[int], guidance: Guidance) -> np.ndarray:
        """Return an image of each condition, by its place in `conditions`, uint8 [n, H, W, C]; noise i is image i's."""

    def preview(self, model: nn.Module, path: Path) -> None:
        """Write a grid: a row of `per_class` guided images for each of the first conditions."""
        sampling = self.config.sampling
        names = self.conditions[: sampling.max_classes]
        rows = [row for row in range(len(names)) for _ in range(sampling.per_class)]
        guidance = Guidance(sampling.guidance_scale, sampling.guidance_interval, sampling.guidance_channels)
        save_png(class_grid(self.draw_conditions(model, rows, guidance), rows, names), path)

    @abstractmethod
    def draw(self, model: nn.Module, indices: range) -> np.ndarray:
        """Return images, uint8 [n, H, W, C], drawn without guidance; image i depends on (seed, i) alone."""

    @property
    @abstractmethod
    def reference_count(self) -> int:
        """How many real images there are to compare with; UserError where none can be asked for."""

    @abstractmethod
    def reference(self, indices: Sequence[int]) -> np.ndarray:
        """Return real images by index, uint8 [n, H, W, C], as they would be drawn: through the autoencoder."""

"""What a saved pipeline holds beside its weights: a manifest that fits its parts, and a scheduler of the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspn_dit.checkpoint import write_weights
from gspn_dit.config import config_from_dict
from gspn_dit.data.latents import Latent
from gspn_dit.diffusion import Objective, create_objective
from gspn_dit.diffusion.schedulers import is_default
from gspn_dit.errors import UserError
from gspn_dit.files import write_atomically
from gspn_dit.hub import CARD
from gspn_dit.model_card import model_card, public_manifest
from gspn_dit.models import DiffusionModel, create_model

SAVED_SCHEDULER = "scheduler"
"""Folder of a scheduler that took the place of the default sampler's, and its entry in the manifest."""


@dataclass(frozen=True)
class Parts:
    """What is saved of a pipeline: all that can be replaced in it."""

    model: DiffusionModel
    objective: Objective
    latent: Latent
    class_names: Sequence[str]
    scheduler: Any
    guide: DiffusionModel | None

    def write(self, directory: Path, license: str) -> None:
        """Write latent, scheduler, weights, manifest and card into a directory.

        Raises ValueError for parts that a checkpoint cannot hold, before anything is written, and OSError.
        """
        manifest, weights = self._manifest(), origin(self.model)[1]
        directory.mkdir(parents=True, exist_ok=True)
        manifest |= {"latent": self.latent.save(directory)}
        if not is_default(self.scheduler, self.objective):
            self.scheduler.save_pretrained(directory / SAVED_SCHEDULER)
            manifest |= {SAVED_SCHEDULER: SAVED_SCHEDULER}
        write_weights(directory, {weights: self.model.state_dict()}, manifest)
        write_atomically(directory / CARD, model_card(manifest, weights, license).encode())

    def _manifest(self) -> dict[str, Any]:
        """Return what is published of the model's manifest, with the classes of now."""
        manifest = origin(self.model)[0]
        if not manifest:
            raise ValueError(
                "a pipeline built from parts does not know the config of its model; load that with from_checkpoint"
            )
        _refuse_changed_model(self.model, manifest["model"])
        trained = create_objective(config_from_dict(manifest["config"]).objective, self.latent.natural_shift)
        if (type(self.objective), self.objective.config) != (type(trained), trained.config):
            raise ValueError("the objective is not the one that the model was trained with; put that back to save it")
        if self.guide is not None:
            raise ValueError("a guide is not saved with a pipeline; set guide = None, and use guide_with after loading")
        kind = type(self.scheduler)
        if _diffusers_class(kind.__name__) is not kind and not is_default(self.scheduler, self.objective):
            raise ValueError(f"only schedulers of diffusers are saved, not {kind.__module__}.{kind.__name__}")
        return {**public_manifest(manifest), "class_names": [*self.class_names]}


def origin(model: DiffusionModel) -> tuple[dict[str, Any], str]:
    """Return the manifest of the checkpoint that a model came from, empty if it was built by hand, and its weights."""
    return getattr(model, "origin", None) or ({}, "ema")


def _refuse_changed_model(model: DiffusionModel, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless a model has the tensors that its options, of `create_model`, ask for."""
    with torch.device("meta"):
        expected = create_model(**options).state_dict()
    mine, theirs = ({name: [*tensor.shape] for name, tensor in each.items()} for each in (model.state_dict(), expected))
    for name in sorted({*mine, *theirs}):
        if mine.get(name) != theirs.get(name):
            raise ValueError(
                f"the model was changed since it was loaded and cannot be saved: '{name}' has shape {mine.get(name)}, "
                f"its config asks for {theirs.get(name)}"
            )


def load_scheduler(directory: Path, manifest: Mapping[str, Any]) -> Any:
    """Read the scheduler that a manifest names, None if it names none; raises UserError if it cannot be read."""
    if SAVED_SCHEDULER not in manifest:
        return None
    from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

    folder = directory / str(manifest[SAVED_SCHEDULER])
    try:
        config = json.loads((folder / SCHEDULER_CONFIG_NAME).read_text(encoding="utf-8"))
        if (known := _diffusers_class(config["_class_name"])) is None:
            raise ValueError(f"this version of diffusers has no scheduler {config['_class_name']}")
        return known.from_config(config)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"the scheduler in {folder} cannot be read: {' '.join(str(error).split())}") from None


def _diffusers_class(name: str) -> Any:
    """Return the scheduler class of a name in diffusers, or None."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, SchedulerMixin) else None

"""From a config to the parts of a run: images, latent, objective, model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gspn_dit.config import Config
from gspn_dit.data.batches import Batches, LatentBatches
from gspn_dit.data.build import TrainingBatches, build_data
from gspn_dit.data.latents import Latent
from gspn_dit.diffusion import Objective, create_objective
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel, create_model


@dataclass(frozen=True)
class Parts:
    """What a config stands for, on the CPU."""

    training: TrainingBatches
    validation: Batches | LatentBatches | None
    """None if the source has no validation split and `data.validation_fraction` is 0."""
    latent: Latent
    objective: Objective
    model: DiffusionModel
    description: dict[str, Any]
    """What a checkpoint says of them: arguments of `create_model`, latent, class names, data."""


def build_parts(config: Config) -> Parts:
    """Build everything a config names; the model's weights are a function of the seed.

    Raises UserError for whatever does not exist or does not fit.
    """
    objective = create_objective(config.objective)
    objective.resolve_sampler(config.sampling.sampler, config.sampling.steps)
    data = build_data(config)
    latent, images = data.latent, data.training.images
    check_guided_channels(config, latent.channels)
    arguments = {
        "name": config.model.name,
        "num_classes": images.num_classes,
        "latent_channels": latent.channels,
        "latent_size": latent.size,
        "out_channels": objective.out_channels(latent.channels),
        **config.model.overrides(),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            model = create_model(**arguments)
        except ValueError as error:
            raise UserError(f"model: {error}") from None
    return Parts(
        training=data.training,
        validation=data.validation,
        latent=latent,
        objective=objective,
        model=model,
        description={
            "model": arguments,
            "latent": latent.spec(),
            "class_names": images.class_names,
            "data": data.facts,
        },
    )


def check_guided_channels(config: Config, latent_channels: int) -> None:
    """Raise UserError where more channels shall be guided than a latent has."""
    guided = config.sampling.guidance_channels
    if guided is not None and guided > latent_channels:
        raise UserError(f"sampling.guidance_channels is {guided}, but the latent has {latent_channels} channels")

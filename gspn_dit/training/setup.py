"""From a config to the parts of a run: images, latent, objective, model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gspn_dit.config import Config
from gspn_dit.data.batches import Batches
from gspn_dit.data.images import ImageSet, load_images
from gspn_dit.data.latents import Latent, create_latent
from gspn_dit.diffusion import Objective, create_objective
from gspn_dit.errors import LocalUserError, UserError
from gspn_dit.models import DiffusionModel, create_model

FINGERPRINT_IMAGES = 64
"""Evenly spaced images whose pixels enter the fingerprint of a data set."""


@dataclass(frozen=True)
class Parts:
    """What a config stands for, on the CPU."""

    training: Batches
    validation: Batches | None
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
    training = _load(config, "train")
    held_out = training.has_validation or config.data.validation_fraction > 0
    validation = _load(config, "validation") if held_out else None
    latent = create_latent(config.latent, training.image_size, training.channels)
    guided = config.sampling.guidance_channels
    if guided is not None and guided > latent.channels:
        raise UserError(f"sampling.guidance_channels is {guided}, but the latent has {latent.channels} channels")
    arguments = {
        "name": config.model.name,
        "num_classes": training.num_classes,
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
    batches = Batches(training, latent, config.seed, config.data.horizontal_flip)
    validation_batches = Batches(validation, latent, config.seed) if validation else None
    try:  # every process decodes the same images before anything is written, so one of them tells
        for part in filter(None, (batches, validation_batches)):
            part.decode_small_set()
        facts = {"name": training.name, "images": len(training), "fingerprint": fingerprint(training)}
    except LocalUserError as error:
        raise UserError(str(error)) from None
    return Parts(
        training=batches,
        validation=validation_batches,
        latent=latent,
        objective=objective,
        model=model,
        description={
            "model": arguments,
            "latent": latent.spec(),
            "class_names": training.class_names,
            "data": facts,
        },
    )


def _load(config: Config, split: str) -> ImageSet:
    data = config.data
    if data.name == "latents":
        raise UserError("data.name 'latents' is not available in this version; use digits, imagefolder or hf")
    return load_images(data.name, data.path, split, data.image_size, data.validation_fraction)


def fingerprint(images: ImageSet) -> str:
    """Return a hash of labels, class names, geometry and some of the pixels, by which another set is noticed."""
    facts = [images.class_names, images.image_size, images.channels, len(images)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(images.labels.astype("<i8").tobytes())
    some = np.linspace(0, len(images) - 1, min(len(images), FINGERPRINT_IMAGES)).astype(np.int64)
    digest.update(images.pixels(some).tobytes())
    return digest.hexdigest()[:16]

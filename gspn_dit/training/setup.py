"""From a config to the parts of a run: images, latent, objective, model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from gspn_dit.config import Config
from gspn_dit.data.batches import Batches
from gspn_dit.data.images import ImageSet, load_images
from gspn_dit.data.latents import Latent, create_latent
from gspn_dit.diffusion import Objective, create_objective
from gspn_dit.errors import UserError
from gspn_dit.models import GSPNTransformer, create_model


@dataclass(frozen=True)
class Parts:
    """What a config stands for, on the CPU."""

    training: Batches
    validation: Batches
    latent: Latent
    objective: Objective
    model: GSPNTransformer
    description: dict[str, Any]
    """What a checkpoint says of them: arguments of `create_model`, latent, class names, data."""


def build_parts(config: Config) -> Parts:
    """Build everything a config names; the model's weights are a function of the seed.

    Raises UserError for whatever does not exist or does not fit.
    """
    objective = create_objective(config.objective)
    training, validation = (_load(config, split) for split in ("train", "validation"))
    latent = create_latent(config.latent, training.image_size, training.channels)
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
    return Parts(
        training=Batches(training, latent, config.seed, config.data.horizontal_flip),
        validation=Batches(validation, latent, config.seed),
        latent=latent,
        objective=objective,
        model=model,
        description={
            "model": arguments,
            "latent": latent.spec(),
            "class_names": training.class_names,
            "data": {"name": training.name, "images": len(training), "fingerprint": fingerprint(training)},
        },
    )


def _load(config: Config, split: str) -> ImageSet:
    data = config.data
    if data.name == "latents":
        raise UserError("data.name 'latents' is not available in this version; use digits, imagefolder or hf")
    return load_images(data.name, data.path, split, data.image_size, data.validation_fraction)


def fingerprint(images: ImageSet) -> str:
    """Return a hash of the labels, class names and geometry of an image set, by which another set is noticed."""
    facts = [images.class_names, images.image_size, images.channels, len(images)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(images.labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]

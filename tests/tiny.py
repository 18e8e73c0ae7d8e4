"""A tiny trained-looking checkpoint, for tests of what reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn_dit.checkpoint import checkpoint_directory, write_checkpoint
from gspn_dit.config import Config
from gspn_dit.models import DiffusionModel, create_model

CLASS_NAMES = ["ant", "bee", "cat", "dog", "10"]
SIZE = 4
"""Height and width of an image in pixels."""


def tiny_model(seed: int, channels: int = 1) -> DiffusionModel:
    """A model of 2×2 tokens whose every weight is drawn, so that time, class and noise all show in its output."""
    model = create_model(**model_arguments(channels))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.class_embed.weight *= 4
    return model


def model_arguments(channels: int = 1) -> dict[str, Any]:
    """Arguments of `create_model`, as a checkpoint's manifest holds them."""
    return {
        "name": "GSPN-N/2",
        "num_classes": len(CLASS_NAMES),
        "latent_channels": channels,
        "latent_size": SIZE,
        "out_channels": channels,
        "hidden_size": 16,
        "depth": 2,
    }


def tiny_manifest(channels: int = 1, **changes: Any) -> dict[str, Any]:
    """What training writes beside the weights; keywords replace entries, None leaves one out."""
    manifest = {
        "model": model_arguments(channels),
        "latent": {"name": "identity", "image_size": SIZE, "image_channels": channels},
        "class_names": CLASS_NAMES,
        "config": Config().to_dict(),
        **changes,
    }
    return {key: value for key, value in manifest.items() if value is not None}


def tiny_tensors(channels: int = 1, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Different weights for "model" and "ema"."""
    return {
        "model": tiny_model(seed + 1, channels).state_dict(),
        "ema": tiny_model(seed, channels).state_dict(),
    }


def save_checkpoint(
    run_directory: Path, step: int, tensors: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step of a run and return its directory."""
    target = checkpoint_directory(run_directory, step)
    write_checkpoint(target, step, tensors, manifest)
    return target


def write_run(run_directory: Path, step: int = 100, channels: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of a run and return the run's directory."""
    save_checkpoint(run_directory, step, tiny_tensors(channels, seed), tiny_manifest(channels, **changes))
    return run_directory

"""What a run is about to do, in a few lines that are printed before its first step."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from gspn_dit.config import Config
from gspn_dit.training.setup import Parts


def summarise(config: Config, parts: Parts, directory: Path, step: int, accelerator: Accelerator) -> str:
    """Return what a run reads, trains and writes, a line each.

    Args:
        config: its config.
        parts: what the config stands for.
        directory: where it writes.
        step: the step it starts from.
        accelerator: on which processes and devices.
    """
    rows = [("data", _data(config, parts))]
    rows += [("", remark) for remark in parts.training.images.remarks]
    rows += [
        ("model", f"{config.model.name}, {sum(weight.numel() for weight in parts.model.parameters()):,} parameters"),
        ("run", _run(config, parts, step, accelerator)),
        ("writes", _writes(config, directory)),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in rows)


def _data(config: Config, parts: Parts) -> str:
    images, latent = parts.training.images, parts.latent
    text = f"{config.data.path or images.name}: {len(images):,} images of {images.num_classes:,} classes, "
    text += f"{latent.image_size}x{latent.image_size} {'grey' if latent.image_channels == 1 else 'RGB'}"
    if latent.factor > 1:
        text += f", as latents {latent.channels}x{latent.size}x{latent.size}"
    if parts.validation is None:
        return f"{text}; none for validation"
    held_out = len(parts.validation.images)
    used = min(held_out, config.training.validation_images)
    return f"{text}; {used:,}{f' of {held_out:,}' if used < held_out else ''} more for validation"


def _run(config: Config, parts: Parts, step: int, accelerator: Accelerator) -> str:
    settings, processes = config.training, accelerator.num_processes
    left = settings.max_steps - step
    epochs = left * settings.batch_size / len(parts.training.images)
    text = f"{left:,} steps of {settings.batch_size:,} images, {epochs:.3g} epochs, seed {config.seed}, "
    text += f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}, "
    text += {"no": "float32"}.get(settings.mixed_precision, settings.mixed_precision)
    return f"from step {step:,} on, {text}" if step else text


def _writes(config: Config, directory: Path) -> str:
    settings = config.training
    every = {
        "checkpoint": settings.checkpoint_every,
        "validation": settings.validate_every,
        "preview": settings.sample_every,
    }
    shown = ", ".join(f"a {what} every {steps:,}" for what, steps in every.items() if steps < settings.max_steps)
    return f"{directory.resolve()}: {shown + ' steps, and ' if shown else ''}all of them at the last step"

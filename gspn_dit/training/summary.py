"""What a run is about to do, in a few lines that are printed before its first step."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from gspn_dit.config import Config
from gspn_dit.tasks import Task
from gspn_dit.tasks.plan import epochs_of


def summarise(config: Config, task: Task, directory: Path, step: int, accelerator: Accelerator) -> str:
    """Return what a run reads, trains and writes, a line each.

    Args:
        config: its config.
        task: what it learns.
        directory: where it writes.
        step: the step it starts from.
        accelerator: on which processes and devices.
    """
    rows = [
        *task.summary(),
        ("run", _run(config, task, step, accelerator)),
        ("writes", _writes(config, directory)),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in rows)


def _run(config: Config, task: Task, step: int, accelerator: Accelerator) -> str:
    settings, processes = config.training, accelerator.num_processes
    left = settings.max_steps - step
    epochs = epochs_of(left * settings.batch_size, task.describe()["data"]["images"])
    text = f"{left:,} step{'s' if left != 1 else ''} of {settings.batch_size:,} images, {epochs} epochs, "
    text += f"seed {config.seed}, "
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

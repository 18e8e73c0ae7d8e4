"""What a run can learn. `TASKS` is the registry: a task is one class here, and all that training knows of it."""

from __future__ import annotations

from collections.abc import Callable

from gspn_dit.config import Config
from gspn_dit.errors import UserError, nearest
from gspn_dit.tasks.base import GenerativeTask, Task
from gspn_dit.tasks.class_conditional import ClassConditional

__all__ = ["TASKS", "GenerativeTask", "Task", "create_task"]


def _text_to_image(config: Config) -> Task:
    from gspn_dit.tasks.text_to_image import TextToImage  # diffusers' UNets take seconds to import

    return TextToImage(config)


TASKS: dict[str, Callable[[Config], Task]] = {"class-conditional": ClassConditional, "text-to-image": _text_to_image}
"""What builds each task, by the name that the config key `task` gives."""


def create_task(config: Config) -> Task:
    """Build the task of a config; raises UserError for an unknown one, and for whatever does not exist or fit."""
    if config.task not in TASKS:
        raise UserError(f"unknown task '{config.task}'; allowed are {', '.join(TASKS)}{nearest(config.task, TASKS)}")
    return TASKS[config.task](config)

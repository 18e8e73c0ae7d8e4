"""What a run can learn. `TASKS` is the registry: a task is one class here, and all that training knows of it."""

from __future__ import annotations

from gspn_dit.config import Config
from gspn_dit.errors import UserError, nearest
from gspn_dit.tasks.base import GenerativeTask, Task
from gspn_dit.tasks.class_conditional import ClassConditional

__all__ = ["TASKS", "GenerativeTask", "Task", "create_task"]

TASKS: dict[str, type[Task]] = {"class-conditional": ClassConditional}
"""By the name that the config key `task` gives."""


def create_task(config: Config) -> Task:
    """Build the task of a config; raises UserError for an unknown one, and for whatever does not exist or fit."""
    if config.task not in TASKS:
        raise UserError(f"unknown task '{config.task}'; allowed are {', '.join(TASKS)}{nearest(config.task, TASKS)}")
    return TASKS[config.task](config)

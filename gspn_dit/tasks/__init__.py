"""What a run can learn. `TASKS` is the registry: a task is one class here, and all that training knows of it."""

from __future__ import annotations

import pkgutil

from gspn_dit.config import Config
from gspn_dit.errors import UserError, nearest
from gspn_dit.tasks.base import GenerativeTask, Task
from gspn_dit.tasks.class_conditional import ClassConditional
from gspn_dit.tasks.plan import Plan

__all__ = ["TASKS", "GenerativeTask", "Plan", "Task", "create_task", "task_class"]

TASKS: dict[str, type[Task] | str] = {
    "class-conditional": ClassConditional,
    "classification": "gspn_dit.tasks.classification:Classification",  # torchvision's transforms are no other task's
    "text-to-image": "gspn_dit.tasks.text_to_image:TextToImage",  # diffusers' UNets take seconds to import
}
"""The class of each task, or where to find it, by the name that the config key `task` gives."""


def task_class(name: str) -> type[Task]:
    """Return the class of a task by its name; raises UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'; allowed are {', '.join(TASKS)}{nearest(name, TASKS)}")
    entry = TASKS[name]
    return pkgutil.resolve_name(entry) if isinstance(entry, str) else entry


def create_task(config: Config) -> Task:
    """Build the task of a config; raises UserError for an unknown one, and for whatever does not exist or fit."""
    return task_class(config.task)(config)

"""Figures over fixed samples that a task validates on, shared out over the processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from gspn_dit.tasks import Task


@torch.no_grad()
def validate(model: nn.Module, task: Task, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Return the mean of each of the task's figures over all its samples, the same in every process; {} without any.

    Sums are float64, so that how they are shared out changes their last digits alone.
    """
    count = task.validation_count
    if count == 0:
        return {}
    sums: dict[str, torch.Tensor] = {}
    # Every process needs the names, so one without a share of its own looks at the first sample and counts nothing.
    starts = range(accelerator.process_index * batch_size, count, accelerator.num_processes * batch_size)
    for start in starts or [0]:
        figures = task.validate(model, range(start, min(start + batch_size, count)) if starts else range(1))
        for name, pair in figures.items():
            both = torch.stack([value.detach().double().cpu() for value in pair])
            sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + (both if starts else 0 * both)
    whole = accelerator.reduce(torch.stack(list(sums.values())).to(accelerator.device), reduction="sum").cpu()
    return dict(zip(sums, (whole[:, 0] / whole[:, 1]).tolist(), strict=True))

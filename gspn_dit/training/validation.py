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
    starts = range(accelerator.process_index * batch_size, count, accelerator.num_processes * batch_size)
    shares = [(range(start, min(start + batch_size, count)), 1.0) for start in starts]
    # All processes must add up the same figures: one without a share looks at a sample, which tells their names.
    sums: dict[str, torch.Tensor] = {}
    for samples, weight in shares or [(range(1), 0.0)]:
        for name, pair in task.validate(model, samples).items():
            both = weight * torch.stack([value.detach().double().cpu() for value in pair])
            sums[name] = sums[name] + both if name in sums else both
    whole = accelerator.reduce(torch.stack(list(sums.values())).to(accelerator.device), reduction="sum").cpu()
    return dict(zip(sums, (whole[:, 0] / whole[:, 1]).tolist(), strict=True))

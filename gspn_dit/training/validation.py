"""The validation loss: fixed images, times and noise, so that two steps, and two runs, can be compared."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from gspn_dit.data.batches import Batches, LatentBatches
from gspn_dit.diffusion import Objective
from gspn_dit.training.draws import validation_draws

QUARTILES = 4


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Batches | LatentBatches,
    objective: Objective,
    seed: int,
    max_images: int,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return `val_loss` and `val_loss_q1` … `val_loss_q4`, the mean loss by quartile of t (q1: nearly clean).

    The images are shared out over the processes; every process returns the same values.
    """
    count = min(max_images, len(batches.images))
    weight = next(model.parameters())
    sums = torch.zeros(2, QUARTILES, dtype=torch.float64)  # losses, counts
    starts = range(accelerator.process_index * batch_size, count, accelerator.num_processes * batch_size)
    for start in starts:
        indices = range(start, min(start + batch_size, count))
        latents, labels = batches.validation(indices)
        draws = validation_draws(seed, indices, count, latents, labels, objective)
        losses = objective.loss(
            model,
            latents.to(weight),
            draws.class_labels.to(weight.device),
            draws.noise.to(weight),
            draws.timesteps.to(weight.device),
        )
        quartiles = (draws.timesteps * QUARTILES / 1000).long().clamp(0, QUARTILES - 1)
        sums[0].index_add_(0, quartiles, losses.double().cpu())
        sums[1].index_add_(0, quartiles, torch.ones(len(quartiles), dtype=torch.float64))
    sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    values = {"val_loss": (sums[0].sum() / sums[1].sum()).item()}
    by_quartile = (sums[0] / sums[1]).tolist()
    return {**values, **{f"val_loss_q{number + 1}": value for number, value in enumerate(by_quartile)}}

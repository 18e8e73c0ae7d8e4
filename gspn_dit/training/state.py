"""Between a trainer and its checkpoints: what is written, by whom, and how it comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gspn_dit.checkpoint import (
    begin_checkpoint,
    checkpoint_directory,
    finish_checkpoint,
    is_complete,
    load_tensors,
    partial_directory,
    remove_old_checkpoints,
)
from gspn_dit.training.ema import EMA, PowerEMA
from gspn_dit.training.optimizer import empty_optimizer_tensors, load_optimizer_tensors, optimizer_tensors
from gspn_dit.training.progress import Progress
from gspn_dit.training.sharding import FOLDER, load_shards, placed_like, save_shards, whole_tensors
from gspn_dit.training.zero import ZeroAdamW

if TYPE_CHECKING:
    from gspn_dit.training.loop import Trainer


def save_state(trainer: Trainer, manifest: Mapping[str, Any], progress: Progress) -> None:
    """Write the checkpoint of the trainer's step; all processes call it, the main one writes what is whole."""
    accelerator, run = trainer.accelerator, trainer.directory.path
    main, target = accelerator.is_main_process, checkpoint_directory(run, trainer.step)
    began = time.perf_counter()
    missing = main and not is_complete(target)
    if missing:
        begin_checkpoint(target)
    if accelerator.reduce(torch.tensor(float(missing), device=accelerator.device), reduction="sum") > 0:
        named: dict[str, Mapping[str, Tensor]] = {
            "model": trainer.model.state_dict(),
            "ema": trainer.ema.model.state_dict(),
            **{average.name: average.tensors for average in trainer.power_emas},
        }
        named |= {name: companion.state() for name, companion in trainer.companions.items()}
        if isinstance(trainer.optimizer, ZeroAdamW):
            named["optimizer"] = trainer.optimizer.tensors(keep=main)
        elif trainer.sharding == "fsdp":
            save_shards(partial_directory(target), optimizer_tensors(trainer.optimizer, trainer.model))
        else:
            named["optimizer"] = optimizer_tensors(trainer.optimizer, trainer.model)
        tensors = {stem: whole_tensors(of_stem, keep=main) for stem, of_stem in named.items()}
        if main:
            finish_checkpoint(partial_directory(target), target, trainer.step, tensors, manifest)
    if main:
        seconds = time.perf_counter() - began
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e9
        progress.write(f"saved {target}: {size:.3g} GB in {seconds:.2g} s ({seconds / size:.2g} s/GB)")
        settings = trainer.config.training
        remove_old_checkpoints(run, settings.keep_last, settings.keep_every)
    accelerator.wait_for_everyone()


def restore_tensors(
    checkpoint: Path,
    model: nn.Module,
    ema: EMA[Any],
    power_emas: Sequence[PowerEMA],
    optimizer: torch.optim.AdamW | ZeroAdamW,
) -> None:
    """Load what `save_state` wrote, by any number of processes, into tensors that are whole or split."""
    for stem, module in (("model", model), ("ema", ema.model)):
        module.load_state_dict(placed_like(load_tensors(checkpoint, stem), module.state_dict()))
    with torch.no_grad():
        for average in power_emas:
            for name, tensor in placed_like(load_tensors(checkpoint, average.name), average.tensors).items():
                average.tensors[name].copy_(tensor)
    state = empty_optimizer_tensors(model)
    if (checkpoint / FOLDER).is_dir():
        load_shards(checkpoint, state)
    else:
        state = placed_like(load_tensors(checkpoint, "optimizer"), state)
    if isinstance(optimizer, ZeroAdamW):
        optimizer.load(state)
    else:
        load_optimizer_tensors(optimizer, model, state)

"""Everything that a step changes and a checkpoint holds: weights, averages, optimiser and counters."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gspn_dit.checkpoint import (
    begin_checkpoint,
    checkpoint_directory,
    finish_checkpoint,
    is_complete,
    load_tensors,
    partial_directory,
    read_manifest,
)
from gspn_dit.config import TrainingConfig
from gspn_dit.tasks import Task
from gspn_dit.training.companions import Companion
from gspn_dit.training.ema import EMA, PowerEMA
from gspn_dit.training.guard import SpikeGuard
from gspn_dit.training.strategy import create_strategy


class TrainingState:
    """A task's model in training, at a step; laid out over the processes as `training.sharding` says."""

    def __init__(self, task: Task, settings: TrainingConfig, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.step = 0
        """Optimiser steps done, skipped ones included."""
        task.to(accelerator.device)
        self.model: nn.Module = task.model.to(accelerator.device)
        self.ema = EMA(self.model, settings.ema_decay)
        if settings.activation_checkpointing:
            task.checkpoint_activations()
        if settings.compile:
            for block in task.blocks(self.model):  # once for all blocks of a kind
                block.compile(fullgraph=True)
        self.strategy = create_strategy(task.config, accelerator)
        for model in (self.model, self.ema.model):
            self.strategy.split(task, model)
        self.power_emas = [PowerEMA(self.model.named_parameters(), length) for length in settings.ema_sigma_rel]
        self.strategy.prepare(self.model, task.blocks(self.model))
        self.companions = {name: Companion(module, settings, accelerator) for name, module in task.companions.items()}
        self.nonfinite_steps, self.nonfinite_in_a_row, self.longest_failure = (
            torch.zeros((), device=accelerator.device) for _ in range(3)
        )
        self.guard: SpikeGuard | None = None
        if settings.spike_ratio is not None:
            self.guard = SpikeGuard(settings.spike_ratio, settings.max_spikes, accelerator.device)
        self.losses: dict[str, list[Tensor]] = {}
        """This process's losses since the last line of metrics, by the task's names, 0-d."""

    # -- a step --------------------------------------------------------------------------------------------------

    def judge(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return 1.0 where the means of a step's losses are a spike to the guard, else 0.0, 0-d, in all processes."""
        if self.guard is None:
            return torch.zeros((), device=self.accelerator.device)
        watched = losses.get("error", losses["loss"]).float().clone()
        return self.guard.judge(self.accelerator.reduce(watched, reduction="mean"))

    def advance(self, losses: Mapping[str, Tensor], rate: float) -> Tensor:
        """Take the step whose gradients were added up, or skip it; return the gradients' norm, 0-d, on the device."""
        norm, took_step = self.strategy.step(rate)
        nonfinite = 1 - took_step
        if self.guard is not None:
            self.guard.follow(took_step)
            nonfinite = nonfinite * (1 - self.guard.spike)
        for companion in self.companions.values():
            companion.step(rate, took_step)
        self.ema.update(self.model, took_step)
        for average in self.power_emas:
            average.update(self.model, self.step + 1)
        self.nonfinite_steps += nonfinite
        self.nonfinite_in_a_row += 1
        self.nonfinite_in_a_row *= nonfinite
        torch.maximum(self.longest_failure, self.nonfinite_in_a_row, out=self.longest_failure)
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        self.step += 1
        return norm

    def failed_in_a_row(self) -> int:
        """Return the most steps in a row that were skipped since this was last asked; waits for the device."""
        failed = int(self.longest_failure)
        self.longest_failure.copy_(self.nonfinite_in_a_row)
        return failed

    def mean_losses(self) -> dict[str, float]:
        """Return the mean losses over processes and steps since this was last asked."""
        means = {name: torch.stack(values).mean() for name, values in self.losses.items()}
        self.losses.clear()
        return {name: self.accelerator.reduce(mean, reduction="mean").item() for name, mean in means.items()}

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, run_directory: Path, description: Mapping[str, Any]) -> tuple[Path, float]:
        """Write the checkpoint of this step, unless it is there; all processes call it, the main one writes.

        `description` is what the manifest says beside the state. Returns the directory and the seconds it took.
        """
        accelerator, target = self.accelerator, checkpoint_directory(run_directory, self.step)
        main, began = accelerator.is_main_process, time.perf_counter()
        manifest = {**description, **self._manifest()}
        missing = main and not is_complete(target)
        if missing:
            begin_checkpoint(target)
        if accelerator.reduce(torch.tensor(float(missing), device=accelerator.device), reduction="sum") > 0:
            growing = partial_directory(target)
            tensors = {stem: self.strategy.whole(named, keep=main) for stem, named in self._tensors().items()}
            if optimizer := self.strategy.save_optimizer(growing, keep=main):
                tensors["optimizer"] = optimizer
            if main:
                finish_checkpoint(growing, target, self.step, tensors, manifest)
        return target, time.perf_counter() - began

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of each file of a checkpoint but the optimiser's, by the file's stem."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            **{average.name: average.tensors for average in self.power_emas},
            **{name: companion.state() for name, companion in self.companions.items()},
        }

    def _manifest(self) -> dict[str, Any]:
        since_log = {name: self._over_processes(values) for name, values in self.losses.items()}
        return {
            "cpu_threads": torch.get_num_threads(),
            "ema": {"decay": self.ema.decay, "updates": self.ema.updates},
            "nonfinite_steps": int(self.nonfinite_steps),
            "nonfinite_in_a_row": int(self.nonfinite_in_a_row),
            **({} if self.guard is None else {"spike_guard": self.guard.state()}),
            "losses_since_log": since_log.pop("loss", []),
            **({"metrics_since_log": since_log} if since_log else {}),
        }

    def _over_processes(self, values: list[Tensor]) -> list[float | None]:
        """Return means over the processes, None for what is not finite."""
        means = self.accelerator.reduce(torch.stack(values), reduction="mean").tolist()
        return [mean if math.isfinite(mean) else None for mean in means]

    def restore(self, checkpoint: Path) -> None:
        """Load what `save` wrote, under any strategy and by any number of processes."""
        manifest = read_manifest(checkpoint)
        self.step = manifest["step"]
        self.nonfinite_steps.fill_(manifest["nonfinite_steps"])
        self.nonfinite_in_a_row.fill_(manifest["nonfinite_in_a_row"])
        self.longest_failure.fill_(manifest["nonfinite_in_a_row"])
        since_log = {"loss": manifest["losses_since_log"], **manifest.get("metrics_since_log", {})}
        for name, values in since_log.items():
            numbers = [math.nan if value is None else value for value in values]
            if numbers:
                self.losses[name] = [torch.tensor(number, device=self.accelerator.device) for number in numbers]
        if self.guard is not None:
            self.guard.restore(manifest["spike_guard"])
        self._restore_tensors(checkpoint, manifest["ema"]["updates"])

    def go_back(self, checkpoint: Path) -> None:
        """Take weights, averages and optimiser of an earlier step; the count of steps goes on, and with it the data."""
        self._restore_tensors(checkpoint, read_manifest(checkpoint)["ema"]["updates"])
        self.nonfinite_in_a_row.zero_()
        self.longest_failure.zero_()
        if self.guard is not None:
            self.guard.went_back()

    def _restore_tensors(self, checkpoint: Path, ema_updates: int) -> None:
        strategy, self.ema.updates = self.strategy, ema_updates
        for stem, module in (("model", self.model), ("ema", self.ema.model)):
            module.load_state_dict(strategy.placed_like(load_tensors(checkpoint, stem), module.state_dict()))
        with torch.no_grad():
            for average in self.power_emas:
                stored = strategy.placed_like(load_tensors(checkpoint, average.name), average.tensors)
                for name, tensor in stored.items():
                    average.tensors[name].copy_(tensor)
        strategy.load_optimizer(checkpoint)
        for name, companion in self.companions.items():
            companion.load(load_tensors(checkpoint, name))

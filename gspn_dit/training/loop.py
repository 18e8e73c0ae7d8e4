"""The training loop: deterministic, so that an interrupted run resumes bit-exactly on a CPU."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gspn_dit.checkpoint import find_checkpoints, read_manifest, remove_old_checkpoints
from gspn_dit.config import Config, TrainArguments
from gspn_dit.errors import UserError
from gspn_dit.locks import sole_job
from gspn_dit.tasks import Task, create_task
from gspn_dit.training.accelerator import choose_threads, create_accelerator, peak_memory_bytes
from gspn_dit.training.failures import explain_failures
from gspn_dit.training.guard import MAX_RETURNS, SpikeGuard
from gspn_dit.training.optimizer import learning_rate
from gspn_dit.training.progress import Progress
from gspn_dit.training.quick_fd import QuickFD, ScorerLoader, create_quick_fd
from gspn_dit.training.run_directory import RunDirectory, open_run_directory
from gspn_dit.training.state import TrainingState
from gspn_dit.training.stop import StopSignal
from gspn_dit.training.summary import summarise
from gspn_dit.training.trackers import start_trackers


def train(arguments: TrainArguments, load_scorer: ScorerLoader | None = None) -> None:
    """Train as `train.py` was asked to; raises UserError before anything is written if that cannot be done.

    `load_scorer` finds the feature extractor of `training.fd_every`. In a job of several processes the launcher prints
    the traceback of the process that failed first.
    """
    explain_failures(arguments.config, lambda: _train(arguments, load_scorer))


def _train(arguments: TrainArguments, load_scorer: ScorerLoader | None) -> None:
    accelerator = create_accelerator(arguments.config)
    with sole_job(Path(arguments.config.output_dir), "output_dir"):
        _train_alone(arguments, load_scorer, accelerator)


def _train_alone(arguments: TrainArguments, load_scorer: ScorerLoader | None, accelerator: Accelerator) -> None:
    config = arguments.config
    directory = open_run_directory(config, arguments.resume, arguments.overwrite)
    _check_same_step(directory, accelerator)
    choose_threads(config.training, directory.checkpoint, accelerator)
    task = create_task(config)
    if directory.checkpoint is not None:
        task.check_resumed(directory.checkpoint, read_manifest(directory.checkpoint))
    elif config.training.initialize_from is not None:
        task.start_from(config.training.initialize_from)
    task.to(accelerator.device)
    task.look()
    quick_fd = create_quick_fd(config, task, accelerator, load_scorer)
    accelerator.wait_for_everyone()  # all have read the directory before one of them changes it
    if accelerator.is_main_process:
        directory.begin(config, arguments.overwrite)
    accelerator.wait_for_everyone()
    try:
        Trainer(config, task, accelerator, directory, quick_fd).run()
    finally:
        accelerator.end_training()


def _check_same_step(directory: RunDirectory, accelerator: Accelerator) -> None:
    step = read_manifest(directory.checkpoint)["step"] if directory.checkpoint else 0
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes find checkpoints of different steps in {directory.path} ({sorted(set(steps))}); "
            "output_dir must lie on a file system that all machines share"
        )


class Trainer:
    """Moves a training state on: a task's losses by sample number, and what is logged, drawn and saved on the way."""

    def __init__(
        self,
        config: Config,
        task: Task,
        accelerator: Accelerator,
        directory: RunDirectory,
        quick_fd: QuickFD | None = None,
    ) -> None:
        self.config, self.task, self.accelerator, self.directory = config, task, accelerator, directory
        self.quick_fd = quick_fd
        self.flops_per_image = 6 * task.multiply_adds()
        """Two for each multiply-add, thrice the forward pass. What is computed twice to save memory counts once."""
        self.state = TrainingState(task, config.training, accelerator)
        self.saved_step: int | None = None
        if directory.checkpoint is not None:
            self.state.restore(directory.checkpoint)
            self.saved_step = self.step

    @property
    def step(self) -> int:
        """Optimiser steps done, skipped ones included."""
        return self.state.step

    # -- one step ------------------------------------------------------------------------------------------------

    def sample_numbers(self, step: int, micro_step: int) -> range:
        """Return the sample numbers n = step · batch_size + slot of this process in a micro-step."""
        settings, accelerator = self.config.training, self.accelerator
        size = settings.batch_size // (settings.gradient_accumulation_steps * accelerator.num_processes)
        first = step * settings.batch_size
        first += (micro_step * accelerator.num_processes + accelerator.process_index) * size
        return range(first, first + size)

    def micro_losses(self, numbers: range) -> dict[str, Tensor]:
        """Return the task's mean losses of the samples with these numbers, 0-d; "loss" is minimised."""
        return self.task.loss(self.state.strategy.forward_model, numbers)

    def train_step(self) -> Tensor:
        """Take one optimiser step; return the gradients' norm, 0-d, on the device."""
        state, parts = self.state, self.config.training.gradient_accumulation_steps
        totals: dict[str, Tensor] = {}
        for micro_step in range(parts):
            last = micro_step == parts - 1
            with contextlib.nullcontext() if last else state.strategy.no_sync():
                losses = self.micro_losses(self.sample_numbers(state.step, micro_step))
                for name, value in losses.items():
                    share = value.detach() / parts
                    totals[name] = totals[name] + share if name in totals else share
                loss = losses["loss"]
                refused = ~torch.isfinite(loss.detach())
                if last:
                    refused = refused | (state.judge(totals) > 0)
                # What is refused makes every gradient NaN, in all processes: the step will be skipped.
                poison = torch.where(refused, math.nan, 1.0)
                state.strategy.backward(loss * poison / parts)
        return state.advance(totals, learning_rate(self.config.training, state.step))

    def save(self, progress: Progress) -> None:
        """Write the checkpoint of this step and delete those no longer wanted."""
        if self.saved_step == self.step:
            return
        self._check_finite()
        settings, run, guard = self.config.training, self.directory.path, self.state.guard
        if guard is not None and self.step % settings.checkpoint_every == 0:
            guard.saved(self.step)
        target, seconds = self.state.save(run, {**self.task.describe(), "config": self.config.to_dict()})
        if self.accelerator.is_main_process:
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e9
            progress.write(f"saved {target}: {size:.3g} GB in {seconds:.2g} s ({seconds / size:.2g} s/GB)")
            needed = guard.needed if guard is not None else ()
            remove_old_checkpoints(run, settings.keep_last, settings.keep_every, needed)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to max_steps, with logs, validation, samples and checkpoints on the way; the last step saves."""
        settings = self.config.training
        if self.step >= settings.max_steps:
            self.accelerator.print(f"{self.directory.path} is already at step {self.step} of {settings.max_steps}")
            return
        if self.accelerator.is_main_process:
            print(summarise(self.config, self.task, self.directory.path, self.step, self.accelerator), flush=True)
        start_trackers(self.accelerator, self.config)
        progress = Progress(self.step, settings.max_steps, self.accelerator)
        with StopSignal(self.accelerator.num_processes) as stop, progress:
            asked = self._train_until_asked(stop, progress)
            if asked is not None:
                self.save(progress)
                progress.write(f"stopped by signal {asked}; --resume auto resumes from step {self.step}")
            if self.step == settings.max_steps and self.accelerator.is_main_process:
                self._judge(progress)

    def _train_until_asked(self, stop: StopSignal, progress: Progress) -> int | None:
        """Take steps to max_steps, or until a signal asks to end; return its number then, else None."""
        settings = self.config.training
        started, first_step = time.perf_counter(), self.step
        asked: int | None = None
        while self.step < settings.max_steps and asked is None:
            norm = self.train_step()
            progress.advance()
            if self.state.guard is not None and self.state.guard.must_go_back(self.step):
                self._go_back(self.state.guard, progress)
            if self._due(settings.log_every):
                seconds = time.perf_counter() - started
                self._log(norm, (self.step - first_step) * settings.batch_size / seconds, progress)
                started, first_step = time.perf_counter(), self.step
            with self._paused() as paused:
                self._do_what_is_due(progress)
                asked = stop.agreed()
                ends = asked is not None or self.step == settings.max_steps
                shown = (settings.validate_every, settings.sample_every, settings.checkpoint_every)
                if ends or any(self._due(every) for every in shown):
                    self._show(running=not ends)
            started += paused()
        return asked

    def _do_what_is_due(self, progress: Progress) -> None:
        """Validate, draw, score and save as the intervals ask at this step."""
        settings = self.config.training
        if self._due(settings.validate_every):
            self._validate(progress)
        if self._due(settings.sample_every):
            self._sample()
        if self.quick_fd is not None and settings.fd_every and self._due(settings.fd_every):
            self._score(self.quick_fd, progress)
        if self.state.power_emas and self._due(settings.ema_snapshot_every):
            self._snapshot()
        if self._due(settings.checkpoint_every):
            self.save(progress)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.training.max_steps

    def _log(self, norm: Tensor, images_per_second: float, progress: Progress) -> None:
        """Write the mean loss since the last line, and stop the run if steps keep failing."""
        values = {
            **self.state.mean_losses(),
            "learning_rate": learning_rate(self.config.training, self.step - 1),
            "grad_norm": norm.item(),
            "images_per_second": images_per_second,
            "model_flops_per_second": images_per_second * self.flops_per_image,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "nonfinite_steps": int(self.state.nonfinite_steps),
            **({"spikes": int(self.state.guard.spikes)} if self.state.guard is not None else {}),
        }
        self._record(values)
        progress.show(values)
        self._check_finite()

    def _check_finite(self) -> None:
        """Stop the run if too many steps in a row failed since the last look, which costs a wait for the device."""
        failed = self.state.failed_in_a_row()
        if failed >= self.config.training.max_nonfinite_steps:
            self._show(running=False)
            raise UserError(
                f"{failed} steps in a row up to step {self.step} had a non-finite loss or gradient and were skipped; "
                "the last checkpoint is untouched: look at the data, or start again in another output_dir with a lower "
                "training.learning_rate"
            )

    def _go_back(self, guard: SpikeGuard, progress: Progress) -> None:
        """Go back to the last good checkpoint; raises UserError where there is none, or it did not help."""
        checkpoints = find_checkpoints(self.directory.path)
        if guard.good not in checkpoints or guard.returns == MAX_RETURNS:
            tried = f"{MAX_RETURNS} returns to step {guard.good} did not help" if guard.returns else "none is good yet"
            self._show(running=False)
            raise UserError(
                f"the loss exploded in {guard.patience} steps in a row up to step {self.step}, and there is no "
                f"checkpoint to go back to ({tried}): start again in another output_dir with a lower "
                "training.learning_rate, or with a higher training.spike_ratio if the loss only rose"
            )
        self.state.go_back(checkpoints[guard.good])
        progress.write(
            f"step {self.step}: {guard.patience} steps in a row were skipped as the loss exploded; weights, averages "
            f"and optimiser are those of step {guard.good} again"
        )

    def _record(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.directory.log({"step": self.step, **values})
            if self.config.training.trackers:
                self.accelerator.log(values, step=self.step)

    def _validate(self, progress: Progress) -> None:
        from gspn_dit.training.validation import validate

        with self.state.strategy.gathered(self.state.ema.model):
            values = validate(self.state.ema.model, self.task, len(self.sample_numbers(0, 0)), self.accelerator)
        if values:
            self._record(values)
        if "val_loss" in values:
            progress.write(f"step {self.step}: validation loss {values['val_loss']:.4f}")

    def _sample(self) -> None:
        with self.state.strategy.gathered(self.state.ema.model):
            if self.accelerator.is_main_process:
                folder = self.directory.path / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                self.task.preview(self.state.ema.model, folder / f"step-{self.step:08d}.png")
            self.accelerator.wait_for_everyone()

    def _score(self, quick_fd: QuickFD, progress: Progress) -> None:
        samples = self.config.training.fd_samples
        with self.state.strategy.gathered(self.state.ema.model):
            value = quick_fd(self.state.ema.model)
        self._record({"quick_fd": value, "quick_fd_samples": samples, "quick_fd_comparable": False})
        progress.write(
            f"step {self.step}: quick {quick_fd.name} {value:.4g} of {samples:,} samples (not comparable with others)"
        )

    def _show(self, running: bool) -> None:
        """Write the page by which a person watches the run."""
        from gspn_dit.training.run_page import write_run_page

        if self.accelerator.is_main_process:
            write_run_page(self.directory.path, self.config.training.max_steps, running)

    def _judge(self, progress: Progress) -> None:
        """Say whether the loss is where other runs of this config ended, if the package knows any."""
        from gspn_dit.training.charts import read_metrics
        from gspn_dit.training.reference import find_reference

        reference = find_reference(self.config.to_dict(), self.task.describe()["data"]["fingerprint"])
        if reference is not None and (verdict := reference.judge(read_metrics(self.directory.metrics)["loss"])):
            progress.write(verdict)

    def _snapshot(self) -> None:
        """Write the power-function averages of this step, from which others are made later."""
        from gspn_dit.training.post_hoc_ema import save_snapshot

        for average in self.state.power_emas:
            tensors = self.state.strategy.whole(average.tensors, keep=self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                dtype = self.config.training.ema_snapshot_dtype
                save_snapshot(self.directory.path, self.step, average.sigma_rel, tensors, dtype)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _paused(self) -> Iterator[Callable[[], float]]:
        """Measure what is not training; the yielded function returns the seconds spent inside."""
        began = time.perf_counter()
        ended: list[float] = []
        yield lambda: ended[0] - began
        ended.append(time.perf_counter())

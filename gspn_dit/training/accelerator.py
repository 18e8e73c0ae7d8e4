"""The Accelerator of a run: processes, devices, precision, and what a launcher may not decide."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, patch_environment

from gspn_dit.checkpoint import read_manifest
from gspn_dit.config import Config, TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.training.strategy import choose_strategy
from gspn_dit.training.trackers import FOLDER, check_trackers


def create_accelerator(config: Config) -> Accelerator:
    """Return the Accelerator of a config; raises UserError where the batch cannot be shared out."""
    settings = config.training
    check_trackers(settings.trackers)
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):  # its engine is made in strategy/zero.py
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            cpu=not torch.accelerator.is_available(),
            log_with=list(settings.trackers) or None,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir) / FOLDER)),
        )
    # The loop divides by the config's accumulation steps; a launcher's own setting shall not divide once more.
    accelerator.gradient_accumulation_steps = 1
    processes = accelerator.num_processes
    if settings.num_processes not in (None, processes):
        raise UserError(
            f"training.num_processes is {settings.num_processes}, but {processes} are running; "
            f"start with torchrun --nproc-per-node {settings.num_processes} or accelerate launch --multi_gpu"
        )
    shares = processes * settings.gradient_accumulation_steps
    if settings.batch_size % shares:
        raise UserError(
            f"training.batch_size {settings.batch_size} is not divisible by {processes} processes × "
            f"{settings.gradient_accumulation_steps} accumulation steps"
        )
    choose_strategy(config, accelerator)  # refuses what it cannot do before anything is written
    _choose_precision(settings)
    return accelerator


def choose_threads(settings: TrainingConfig, checkpoint: Path | None, accelerator: Accelerator) -> None:
    """Compute with the number of CPU threads that a run began with, unless its config names another.

    PyTorch cuts the sums behind weights' gradients into a part per thread, so another number changes their last bits.
    """
    if accelerator.device.type != "cpu":
        return
    offered = torch.get_num_threads()
    began_with = read_manifest(checkpoint).get("cpu_threads") if checkpoint is not None else None
    threads = settings.cpu_threads or began_with or offered
    torch.set_num_threads(threads)
    if threads != offered and settings.cpu_threads is None:
        s = "s" if threads > 1 else ""
        accelerator.print(
            f"computes with {threads} CPU thread{s} per process, as it began and not {offered}, "
            f"so that its results stay the same; --training.cpu_threads {offered} to change that"
        )


def _choose_precision(settings: TrainingConfig) -> None:
    """Say how float32 products and convolutions round, whatever this version of torch does by default."""
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: on the accelerator, else resident."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)

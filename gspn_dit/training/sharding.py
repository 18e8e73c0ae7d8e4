"""Training state split over processes by torch's `fully_shard` (FSDP 2), and how to read and write it whole.

Everything here is the identity for a model that is not sharded, so the loop has one path. A weight is sharded where it
is a `DTensor`; the project's files hold whole tensors, but for the optimiser's state, which each process writes itself.
What DeepSpeed splits is in `gspn_dit.training.zero`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.training.zero import STAGES, check_installed, launched_zero

FOLDER = "sharded"
"""Directory of a checkpoint with the optimiser's state in torch's distributed format."""


def chosen_sharding(settings: TrainingConfig, accelerator: Accelerator) -> str:
    """Return what the config, or the launch file, asks for, as `training.sharding` names it; alone there is "none".

    Raises UserError for what cannot be had, or where launch file and config contradict each other.
    """
    launched = launched_zero()
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("the launch file asks for FSDP 1; set fsdp_config: {fsdp_version: 2} in it")
        launched = "fsdp"
    if launched is not None and settings.sharding not in ("none", launched):
        raise UserError(
            f"the launch file asks for {launched}, training.sharding for {settings.sharding}; leave one out"
        )
    chosen = launched or settings.sharding
    if chosen != "none" and settings.repa_features is not None:
        raise UserError(f"training.repa_features does not go with sharding ({chosen}); leave one of them out")
    if accelerator.num_processes == 1:
        return "none"
    if chosen in STAGES:
        check_installed()
    return chosen


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the weights of a model in place: one group per block, which is gathered while the block runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole weights in every process, so that each can call the model without the others; no training."""
    from torch.distributed.fsdp import FSDPModule

    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


@contextlib.contextmanager
def no_gradient_exchange(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let a backward pass add up gradients in this process alone, for all but the last micro-step."""
    switch = getattr(model, "set_requires_gradient_sync", None)  # FSDP's
    switch = switch or getattr(model, "set_gradient_accumulation_boundary", None)  # DeepSpeed's
    if switch is None:
        with accelerator.no_sync(model):
            yield
        return
    switch(False)
    try:
        yield
    finally:
        switch(True)


def backward(model: nn.Module, loss: Tensor, accelerator: Accelerator) -> None:
    """Add the gradients of a loss; `model` is what gave it, and DeepSpeed's engine must see it pass."""
    runs_backward = hasattr(model, "set_gradient_accumulation_boundary")
    (model if runs_backward else accelerator).backward(loss)  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the CPU where `keep` is set, else nothing; every process must ask."""
    result = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            result[name] = full.cpu()
    return result


def placed_like(tensors: Mapping[str, Tensor], models: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors split as those of the same name are; others stay whole."""
    return {name: _split(tensor, models[name]) if name in models else tensor for name, tensor in tensors.items()}


def _split(tensor: Tensor, model: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    # Every process has read the same file, so nothing needs to be sent.
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def save_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what each process holds of these tensors into a growing checkpoint; every process must call it."""
    from torch.distributed import checkpoint

    checkpoint.save(dict(tensors), storage_writer=checkpoint.FileSystemWriter(directory / FOLDER))


def load_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, split over any number of processes or whole, from what `save_shards` wrote."""
    from torch.distributed import checkpoint

    checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(directory / FOLDER))

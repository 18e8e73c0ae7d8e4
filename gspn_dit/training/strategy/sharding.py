"""Weights, gradients, averages and optimiser state split over the processes by torch's `fully_shard` (FSDP 2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gspn_dit.tasks import Task
from gspn_dit.training.optimizer import clip_gradients, create_optimizer, optimizer_tensors, step_where, took_step
from gspn_dit.training.strategy.parallel import SHARDS, Strategy


class FullySharded(Strategy):
    """A weight is a `DTensor`, of which each process holds a part; the optimiser's state is written by its holders."""

    def split(self, task: Task, model: nn.Module) -> None:
        """Make one group per block, which is gathered while the block runs."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (torch.distributed.get_world_size(),))
        for block in task.blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        self.model, self.optimizer = model, create_optimizer(model, self.settings, blocks)
        self.forward_model = self._under_autocast(model)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.forward_model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self.forward_model.set_requires_gradient_sync(True)  # type: ignore[operator]

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        norm = whole(clip_gradients(self.model, self.settings.max_grad_norm))
        took = took_step(norm)
        step_where(took, self.optimizer, rate)
        return norm, took

    @contextlib.contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
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

    def whole(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        gathered = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())  # of one tensor at a time, by every process
            if keep:
                gathered[name] = full.cpu()
        return gathered

    def placed_like(self, tensors: Mapping[str, Tensor], models: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _split(tensor, models[name]) if name in models else tensor for name, tensor in tensors.items()}

    def save_optimizer(self, growing: Path, keep: bool) -> dict[str, Tensor]:
        from torch.distributed import checkpoint

        state = dict(optimizer_tensors(self.optimizer, self.model))
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(growing / SHARDS))
        return {}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its parts; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _split(tensor: Tensor, model: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    # Every process has read the same file, so nothing needs to be sent.
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)

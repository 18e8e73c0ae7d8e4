"""Training with whole weights: in one process, or replicated by DDP; and the interface of what splits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from gspn_dit.checkpoint import load_tensors
from gspn_dit.config import TrainingConfig
from gspn_dit.tasks import Task
from gspn_dit.training.optimizer import (
    create_optimizer,
    empty_optimizer_tensors,
    load_optimizer_tensors,
    optimizer_step,
    optimizer_tensors,
)

SHARDS = "sharded"
"""Directory of a checkpoint with the optimiser's state in torch's distributed format."""


class Strategy:
    """Lays model, gradients and optimiser out over the processes; here all is whole in each, gradients are averaged.

    The loop calls `split`, then `prepare`, then in each step `backward` once per micro-step, all but the last inside
    `no_sync`, and `step`. All processes call every method, and files hold whole tensors whatever the strategy.
    """

    forward_model: nn.Module
    """What the loss calls: the model under autocast, wrapped as the strategy needs."""

    def __init__(self, name: str, settings: TrainingConfig, accelerator: Accelerator) -> None:
        self.name, self.settings, self.accelerator = name, settings, accelerator

    # -- setting up ----------------------------------------------------------------------------------------------

    def split(self, task: Task, model: nn.Module) -> None:
        """Split the weights of the task's model, or of its average, in place."""

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        """Make the optimiser and what the loss calls; `blocks` are those by which training.layer_decay counts."""
        self.model, self.optimizer = model, create_optimizer(model, self.settings, blocks)
        self.forward_model = self._under_autocast(model, replicate=self.accelerator.num_processes > 1)

    def _under_autocast(self, model: nn.Module, replicate: bool = False) -> nn.Module:
        return self.accelerator.prepare_model(model, evaluation_mode=not replicate)

    # -- a step --------------------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Let a backward pass add up gradients in this process alone."""
        return self.accelerator.no_sync(self.forward_model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.accelerator.backward(loss)

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """Clip the gradients, step unless one is not finite in any process, and clear them; see `optimizer_step`."""
        return optimizer_step(self.optimizer, self.model, rate, self.settings.max_grad_norm)

    # -- whole tensors -------------------------------------------------------------------------------------------

    def gathered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hold the whole weights in every process, so that each can call the model without the others; no training."""
        return nullcontext()

    def whole(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Return whole tensors on the CPU where `keep` is set, else nothing."""
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()} if keep else {}

    def placed_like(self, tensors: Mapping[str, Tensor], models: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors split as those of the same name are."""
        return dict(tensors)

    # -- the optimiser's state in a checkpoint -------------------------------------------------------------------

    def save_optimizer(self, growing: Path, keep: bool) -> dict[str, Tensor]:
        """Return the state as whole "<parameter>.<state>" tensors where `keep` is set, or write it into `growing`."""
        return self.whole(optimizer_tensors(self.optimizer, self.model), keep)

    def load_optimizer(self, checkpoint: Path) -> None:
        """Restore what any strategy saved, over any number of processes; the weights are loaded before."""
        state = empty_optimizer_tensors(self.optimizer, self.model)
        if (checkpoint / SHARDS).is_dir():
            from torch.distributed import checkpoint as distributed

            distributed.load(state, storage_reader=distributed.FileSystemReader(checkpoint / SHARDS))
        else:
            state = self.placed_like(load_tensors(checkpoint, "optimizer"), state)
        self._take_up(state)

    def _take_up(self, state: dict[str, Tensor]) -> None:
        load_optimizer_tensors(self.optimizer, self.model, state)

"""What is trained beside the model, by an optimiser of its own, and left behind when training ends."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig
from gspn_dit.training.optimizer import (
    create_optimizer,
    empty_optimizer_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
    step_where,
)


class Companion:
    """A module of a task beside its model, whole in every process; its gradients are averaged over the processes."""

    def __init__(self, module: nn.Module, settings: TrainingConfig, accelerator: Accelerator) -> None:
        self.module, self.accelerator = module.to(accelerator.device), accelerator
        self.optimizer = create_optimizer(self.module, settings)

    def step(self, rate: float, took_step: Tensor) -> None:
        """Average the gradients over the processes and step where the model did."""
        for parameter in self.module.parameters():
            assert parameter.grad is not None
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        step_where(took_step, self.optimizer, rate)

    def state(self) -> dict[str, Tensor]:
        """Return the module and its optimiser as named tensors."""
        weights = {f"weight/{name}": tensor for name, tensor in self.module.state_dict().items()}
        moments = optimizer_tensors(self.optimizer, self.module)
        return weights | {f"optimizer/{name}": tensor for name, tensor in moments.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.module.load_state_dict(part("weight/"))
        state = empty_optimizer_tensors(self.optimizer, self.module)
        state.update(part("optimizer/"))
        load_optimizer_tensors(self.optimizer, self.module, state)

"""AdamW under DeepSpeed's ZeRO (arXiv 1910.02054): its state, and in stage 2 the gradients, split over the processes.

The weights stay whole in every process, so model, averages and files are those of replicated training. DeepSpeed's
engine exchanges and clips the gradients and steps. It is made here rather than by accelerate, whose own way needs
`transformers` and takes the step inside the backward pass.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.errors import UserError
from gspn_dit.training.optimizer import create_optimizer
from gspn_dit.training.strategy.parallel import Strategy

STAGES = {"zero1": 1, "zero2": 2}
BUCKET_ELEMENTS = 50_000_000
"""At most so many are exchanged at once; DeepSpeed's own 500 million would take 2 GB of each GPU."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NOT_DRIVEN = ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
"""What a launch file can ask for, too, by accelerate's environment variables."""


def launched_zero() -> str | None:
    """Return the sharding that a DeepSpeed launch file of accelerate asks for, or None if it asks for none.

    Raises UserError for what this trainer does not do with DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    asked = {name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none") for name in _NOT_DRIVEN}
    beyond = [name.lower() for name, value in asked.items() if value.lower() != "none"]
    if beyond:
        raise UserError(
            f"the launch file asks DeepSpeed for {beyond[0]}, which this trainer does not do; "
            "give it zero_stage 1 or 2 alone, as configs/accelerate/deepspeed.yaml does"
        )
    name = f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if name not in STAGES:
        raise UserError(
            f"the launch file asks for DeepSpeed's ZeRO stage {name[4:]}, but this trainer drives 1 and 2; "
            "configs/accelerate/fsdp.yaml splits the weights, too, as stage 3 does"
        )
    return name


def bucket_elements(model: nn.Module) -> int:
    """Return how many gradients or weights are exchanged at once; DeepSpeed keeps a buffer for them."""
    return min(BUCKET_ELEMENTS, sum(parameter.numel() for parameter in model.parameters()))


def check_installed() -> None:
    """Raise UserError where DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is asked for but not installed; pip install 'gspn-dit[deepspeed]', "
            "or let torch split the state: configs/accelerate/fsdp.yaml, training.sharding fsdp"
        )


class Zero(Strategy):
    """The weights of the model become views of one buffer, whole in every process; DeepSpeed's engine steps AdamW."""

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        import deepspeed

        model = self._under_autocast(model)
        self.model, self.optimizer = model, create_optimizer(model, self.settings, blocks)
        shares = self.accelerator.num_processes * self.settings.gradient_accumulation_steps
        self.engine: Any = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,  # from here on it holds this process's part of the weights
            config={
                "train_micro_batch_size_per_gpu": self.settings.batch_size // shares,
                "gradient_accumulation_steps": 1,  # the loop divides the loss, and says which micro-step is the last
                "gradient_clipping": self.settings.max_grad_norm or 0.0,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": sys.maxsize,
                "zero_optimization": {
                    "stage": STAGES[self.name],
                    "reduce_bucket_size": bucket_elements(model),
                    "allgather_bucket_size": bucket_elements(model),
                },
            },
            dist_init_required=False,
        )[0]
        self.forward_model = self.engine
        (part,) = self.optimizer.param_groups[0]["params"]
        # Made now and not by the first step, so that it can be loaded before, and saved if that step is skipped.
        self.state = {key: torch.zeros_like(part) for key in _MOMENTS}
        self.state["step"] = torch.zeros((), device=part.device)
        self.optimizer.state[part] = self.state

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        self.optimizer.param_groups[0]["lr"] = rate
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.state["step"].device)
        skipped = self.engine.optimizer.overflow
        return norm.detach(), torch.full_like(self.state["step"], float(not skipped))

    def save_optimizer(self, growing: Path, keep: bool) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"{name}.step"] = self.state["step"].cpu().clone()  # one for each: a file of tensors shares nothing
            for key in _MOMENTS:
                whole = torch.zeros_like(parameter.detach(), memory_format=torch.contiguous_format)
                for of_whole, of_state in self._parts(parameter, whole, key):
                    of_whole.copy_(of_state)
                torch.distributed.all_reduce(whole)  # the processes' parts do not overlap
                if keep:
                    tensors[f"{name}.{key}"] = whole.cpu()
        return tensors if keep else {}

    def _take_up(self, state: dict[str, Tensor]) -> None:
        self.engine.optimizer.refresh_fp32_params()  # the weights were loaded into the model
        for name, parameter in self.model.named_parameters():
            self.state["step"].copy_(state[f"{name}.step"])
            for key in _MOMENTS:
                for of_whole, of_state in self._parts(parameter, state[f"{name}.{key}"], key):
                    of_state.copy_(of_whole)

    def _parts(self, parameter: Tensor, whole: Tensor, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the views of a parameter's whole state and of this process's part of all state that are the same."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's, None where no part is here
        if mapping is not None:
            in_whole, in_state = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield (
                whole.view(-1).narrow(0, in_whole.start, in_whole.numel),
                self.state[key].narrow(0, in_state.start, in_state.numel),
            )

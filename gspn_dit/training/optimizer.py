"""AdamW, its step-indexed learning rate, and steps that are skipped without asking the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig


def create_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return fused AdamW, which can skip a step on the device."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step (0 is the first): linear warm-up, then constant or half a cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(model: nn.Module, max_grad_norm: float | None) -> Tensor:
    """Scale the gradients down to a norm at most, None for any; return their norm before, 0-d."""
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)


def took_step(norm: Tensor) -> Tensor:
    """Return 1.0 where gradients of this norm are stepped by, 0.0 where the step is skipped, 0-d."""
    return torch.isfinite(norm).to(torch.float32)


def step_where(took: Tensor, optimizer: torch.optim.AdamW, rate: float) -> None:
    """Step if `took` is 1, and clear the gradients, without waiting for the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = 1 - took  # type: ignore[attr-defined]  # fused AdamW skips where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def optimizer_step(
    optimizer: torch.optim.AdamW, model: nn.Module, rate: float, max_grad_norm: float | None
) -> tuple[Tensor, Tensor]:
    """Clip the gradients, step unless they are not finite, and clear them.

    Returns:
        The gradients' norm before clipping, and 1.0 if the step was taken, 0.0 if skipped; 0-d tensors.
    """
    norm = clip_gradients(model, max_grad_norm)
    took = took_step(norm)
    step_where(took, optimizer, rate)
    return norm, took


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state as "<parameter>.<state>" tensors."""
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}.{key}": value for index, values in state.items() for key, value in values.items()}


def empty_optimizer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return tensors with the names, shapes and places of those that AdamW keeps after a step."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"{name}.step"] = torch.zeros(())
        tensors |= {f"{name}.{key}": torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave."""
    indices = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Any]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        state.setdefault(indices[name], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

"""The optimiser, its step-indexed learning rate, and steps that are skipped without asking the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig
from gspn_dit.training.muon import Muon


def create_optimizer(model: nn.Module, config: TrainingConfig, blocks: Sequence[nn.Module] = ()) -> torch.optim.AdamW:
    """Return what `training.optimizer` names: fused AdamW or `Muon`, either of which can skip a step on the device.

    Args:
        model: whose parameters it moves.
        config: `optimizer`, `weight_decay`, `decay_vectors`, `layer_decay` and others.
        blocks: parts of the model, from its input on, by which `layer_decay` counts, and whose matrices Muon moves.
    """
    groups = parameter_groups(model, config, blocks)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.adam_betas}
    if config.optimizer == "muon":
        return Muon(groups, config.muon_momentum, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


def parameter_groups(
    model: nn.Module, config: TrainingConfig, blocks: Sequence[nn.Module] = ()
) -> list[dict[str, Any]]:
    """Return groups of parameters that share a learning rate and a weight decay: one group by the defaults.

    A group's "rate_scale" is layer_decay^(n + 1 - l), where n blocks there are and l is the number of blocks that begin
    at or before the parameter, in the order in which the model registers them; what follows the last one is layer n + 1
    (arXiv 2106.08254, appendix). Its "matrices" says whether Muon moves it. Without `decay_vectors` no weight decay is
    for what has at most one dimension, nor for what the model's `no_weight_decay()` names.
    """
    named = dict(model.named_parameters())
    kept: set[str] = getattr(model, "no_weight_decay", set)()  # timm's convention
    layers = _layers(model, blocks)
    matrices = {id(matrix) for matrix in muon_matrices(config, blocks)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        scale = config.layer_decay ** (len(blocks) + 1 - layers[name]) if config.layer_decay < 1 else 1.0
        decayed = config.decay_vectors or (parameter.ndim > 1 and name not in kept)
        key = (scale, config.weight_decay if decayed else 0.0, id(parameter) in matrices)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "rate_scale": scale, "weight_decay": decay, "matrices": moved_by_muon}
        for (scale, decay, moved_by_muon), parameters in groups.items()
    ]


def muon_matrices(config: TrainingConfig, blocks: Sequence[nn.Module]) -> list[Tensor]:
    """Return what Muon moves: the weights of linear maps in blocks, not embeddings nor the output."""
    if config.optimizer != "muon":
        return []
    maps = (part for block in blocks for part in block.modules() if isinstance(part, nn.Linear))
    return [linear.weight for linear in maps]


def _layers(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """Return the layer of each parameter by name; see `parameter_groups`."""
    of_block = {id(parameter): number for number, block in enumerate(blocks, 1) for parameter in block.parameters()}
    layers, begun = {}, 0
    for name, parameter in model.named_parameters():
        begun = of_block.get(id(parameter), len(blocks) + 1 if begun >= len(blocks) else begun)
        layers[name] = begun
    return layers


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step (0 is the first): linear warm-up, then constant or half a cosine down."""
    first, full, last = config.initial_learning_rate, config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return first + (full - first) * (step + 1) / config.warmup_steps
    if config.learning_rate_schedule == "constant":
        return full
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return last + (full - last) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(model: nn.Module, max_grad_norm: float | None) -> Tensor:
    """Scale the gradients down to a norm at most, None for any; return their norm before, 0-d."""
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)


def took_step(norm: Tensor) -> Tensor:
    """Return 1.0 where gradients of this norm are stepped by, 0.0 where the step is skipped, 0-d."""
    return torch.isfinite(norm).to(torch.float32)


def step_where(took: Tensor, optimizer: torch.optim.AdamW, rate: float) -> None:
    """Step if `took` is 1, and clear the gradients, without waiting for the device."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
    optimizer.found_inf = 1 - took  # type: ignore[attr-defined]  # which skip where it is 1
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


def _ordered_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Return the parameters' names in the order by which the optimiser's state dict counts them: group by group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state as "<parameter>.<state>" tensors."""
    names, state = _ordered_names(optimizer, model), optimizer.state_dict()["state"]
    return {f"{names[index]}.{key}": value for index, values in state.items() for key, value in values.items()}


def empty_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return tensors with the names, shapes and places of those that the optimiser keeps after a step."""
    groups = [group for group in optimizer.param_groups if group.get("matrices")]
    matrices = {id(parameter) for group in groups for parameter in group["params"]}
    tensors = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in matrices:
            tensors[f"{name}.momentum_buffer"] = torch.zeros_like(parameter.detach())
            continue
        tensors[f"{name}.step"] = torch.zeros(())
        tensors |= {f"{name}.{key}": torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave."""
    indices = {name: index for index, name in enumerate(_ordered_names(optimizer, model))}
    state: dict[int, dict[str, Any]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        state.setdefault(indices[name], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

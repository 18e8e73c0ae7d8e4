"""How a run is laid out over its processes: plain or replicated, split by FSDP, or by DeepSpeed's ZeRO."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from gspn_dit.config import Config
from gspn_dit.errors import UserError
from gspn_dit.tasks import task_class
from gspn_dit.training.strategy.parallel import Strategy
from gspn_dit.training.strategy.sharding import FullySharded
from gspn_dit.training.strategy.zero import STAGES, Zero, check_installed, launched_zero

__all__ = ["Strategy", "check_sharding", "choose_strategy", "create_strategy"]


def check_sharding(config: Config, chosen: str) -> None:
    """Raise UserError for what does not go with a kind of sharding, as `training.sharding` names it, on any device."""
    if chosen == "none":
        return
    excluded = task_class(config.task).excludes_sharding(config)
    if excluded is not None:
        raise UserError(f"{excluded} does not go with sharding ({chosen}); leave one of them out")
    if config.training.optimizer == "muon":
        raise UserError(
            f"training.optimizer muon needs whole matrices, so no sharding ({chosen}); leave one of them out"
        )


def choose_strategy(config: Config, accelerator: Accelerator) -> str:
    """Return what the config, or the launch file, asks for, as `training.sharding` names it; alone there is "none".

    Raises UserError for what cannot be had, or where launch file and config contradict each other.
    """
    settings, launched = config.training, launched_zero()
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("the launch file asks for FSDP 1; set fsdp_config: {fsdp_version: 2} in it")
        launched = "fsdp"
    if launched is not None and settings.sharding not in ("none", launched):
        raise UserError(
            f"the launch file asks for {launched}, training.sharding for {settings.sharding}; leave one out"
        )
    chosen = launched or settings.sharding
    check_sharding(config, chosen)
    if accelerator.num_processes == 1:
        return "none"
    if chosen in STAGES:
        if not settings.decay_vectors or settings.layer_decay < 1:
            key = "layer_decay" if settings.decay_vectors else "decay_vectors"
            raise UserError(f"training.{key} does not go with sharding ({chosen}); use fsdp, or leave it out")
        check_installed()
    return chosen


def create_strategy(config: Config, accelerator: Accelerator) -> Strategy:
    """Build the strategy that `choose_strategy` names."""
    chosen = choose_strategy(config, accelerator)
    kinds: dict[str, type[Strategy]] = {"none": Strategy, "fsdp": FullySharded, **dict.fromkeys(STAGES, Zero)}
    return kinds[chosen](chosen, config.training, accelerator)

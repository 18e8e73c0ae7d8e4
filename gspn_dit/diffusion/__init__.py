"""Objectives, guidance and sampling; a model is any callable `model(latents, timesteps, class_labels)`."""

from collections.abc import Mapping
from typing import Any

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion.epsilon import EpsilonObjective
from gspn_dit.diffusion.flow_map import FlowMapObjective
from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.mean_flow import MeanFlowObjective
from gspn_dit.diffusion.objective import Conditioned, Denoiser, Objective
from gspn_dit.diffusion.sampling import (
    CHUNK,
    SAMPLERS,
    STEP_NOISE,
    draw_latents,
    draw_noise,
    sample_latents,
)
from gspn_dit.diffusion.scheduled import ScheduledObjective
from gspn_dit.diffusion.velocity import VelocityObjective
from gspn_dit.errors import UserError, nearest

__all__ = [
    "CHUNK",
    "OBJECTIVES",
    "SAMPLERS",
    "STEP_NOISE",
    "Conditioned",
    "Denoiser",
    "Guidance",
    "Objective",
    "create_objective",
    "draw_latents",
    "draw_noise",
    "objective_of",
    "sample_latents",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "velocity": VelocityObjective,
    "epsilon": EpsilonObjective,
    "flow_map": FlowMapObjective,
    "mean_flow": MeanFlowObjective,
}
"""By the name that the config key `objective.name` gives."""


def create_objective(config: ObjectiveConfig, natural_shift: float = 1.0) -> Objective:
    """Build the objective a config names; raises UserError for an unknown one.

    `natural_shift` is that of the latents, for an objective that takes it where the config leaves its shifts open.
    """
    if config.name not in OBJECTIVES:
        known = f"{', '.join(OBJECTIVES)}{nearest(config.name, OBJECTIVES)}"
        raise UserError(f"unknown objective.name '{config.name}'; allowed are {known}")
    objective = OBJECTIVES[config.name](config)
    objective.natural_shift = natural_shift
    return objective


def objective_of(config: ObjectiveConfig, schedule: Mapping[str, Any] | None, natural_shift: float = 1.0) -> Objective:
    """Return the objective that a pipeline's scheduler stands for, or, without one, the config's.

    `natural_shift` is as in `create_objective`; `schedule` is the config of a diffusers scheduler: of flow matching, or
    of betas. Raises UserError as both do.
    """
    if schedule is None:
        return create_objective(config, natural_shift)
    if str(schedule.get("_class_name", "")).startswith("FlowMatch"):
        return VelocityObjective(config)
    return ScheduledObjective(config, schedule)

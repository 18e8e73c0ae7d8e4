"""A diffusers scheduler of the user's choice in place of an objective's own samplers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.diffusion.objective import Objective

LEARNED = ("learned", "learned_range")
MEAN_VELOCITY = "FlowMatchEulerDiscreteScheduler"
"""The scheduler that adds the length of a step times the prediction, and nothing else."""


def default_scheduler(objective: Objective) -> Any:
    """Return the scheduler of an objective's default sampler."""
    return objective.make_scheduler(objective.samplers[0], 50)  # any number of steps: its config is what counts


def is_default(scheduler: Any, objective: Objective) -> bool:
    """Tell whether a scheduler is that of an objective's default sampler, whatever its timesteps."""
    own = default_scheduler(objective)
    return (type(scheduler), scheduler.config) == (type(own), own.config)


def ready_scheduler(
    scheduler: Any,
    objective: Objective,
    sampler: str | None,
    num_inference_steps: int,
    sampling_shift: float | None = None,
) -> Any:
    """Return the scheduler of one call, its timesteps set: the named sampler's, or `scheduler` as a copy.

    `sampling_shift` is in place of the objective's. Raises UserError for a sampler or a shift that does not go with the
    objective, ValueError as `prepare_scheduler`, or for a shift of a scheduler that has its own.
    """
    if sampler is not None or is_default(scheduler, objective):
        objective = objective.with_sampling_shift(sampling_shift)
        return objective.make_scheduler(objective.resolve_sampler(sampler, num_inference_steps), num_inference_steps)
    if sampling_shift is not None:
        raise ValueError(
            f"sampling_shift is {sampling_shift:g}, but {type(scheduler).__name__} took the place of the sampler and "
            "shifts times by its own config; set that, or name a sampler"
        )
    return prepare_scheduler(scheduler, objective, num_inference_steps)


def prepare_scheduler(scheduler: Any, objective: Objective, num_inference_steps: int) -> Any:
    """Return a copy of a scheduler, its timesteps set, that fits an objective's model.

    Flow-matching schedulers get the times 1, 1 - 1/steps, …, 1/steps, which they shift as their config says. A
    variance is kept for DDPM alone: every other scheduler would take it for more channels, or cut it off at the third.

    Raises ValueError for a scheduler of another kind of prediction, or one that does not step by mean velocities.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    from gspn_dit.diffusion.flow_schedulers import uniform_times

    name, predicts = type(scheduler).__name__, prediction_type(scheduler)
    if predicts != objective.prediction_type:
        raise ValueError(
            f"scheduler {name} takes a prediction of type '{predicts}', but the model predicts "
            f"'{objective.prediction_type}'"
        )
    if objective.second_time and (name != MEAN_VELOCITY or scheduler.config.get("stochastic_sampling")):
        raise ValueError(
            f"the model predicts mean velocities, by which a deterministic {MEAN_VELOCITY} alone steps, not this {name}"
        )
    scheduler = copy.deepcopy(scheduler)
    if scheduler.config.get("variance_type") in LEARNED and not isinstance(scheduler, DDPMScheduler):
        scheduler.register_to_config(variance_type=None)
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if takes_sigmas and predicts == "flow_prediction":
        scheduler.set_timesteps(sigmas=uniform_times(num_inference_steps))
    else:
        scheduler.set_timesteps(num_inference_steps)
    return scheduler


def prediction_type(scheduler: Any) -> str:
    """Return what a scheduler takes: "flow_prediction", or the `prediction_type` of its config."""
    config = scheduler.config
    if config.get("use_flow_sigmas") or type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return config.get("prediction_type", "epsilon")


def step_noise_options(
    scheduler: Any, seed: int, indices: Sequence[int], draw: Callable[[int], Tensor]
) -> Callable[[int], dict[str, Any]]:
    """Return what gives a scheduler's step its random numbers, by the number of the step.

    They are what `draw` returns where a scheduler takes them. Others draw them from a generator: each image's own, so
    that image i depends on (seed, i) alone there, too.
    """
    parameters = inspect.signature(scheduler.step).parameters
    if "noise" in parameters:
        return lambda step: {"noise": draw(step)}
    if "variance_noise" in parameters:  # of DDIM, deterministic as it is called here, and of the DPM-Solvers
        stochastic = str(scheduler.config.get("algorithm_type")).startswith("sde")
        return lambda step: {"variance_noise": draw(step)} if stochastic else {}
    if "generator" not in parameters:
        return lambda step: {}
    words = [np.random.SeedSequence((seed, index)).generate_state(2) for index in indices]
    generators = [torch.Generator().manual_seed(int(high) << 32 | int(low)) for high, low in words]
    return lambda step: {"generator": generators}

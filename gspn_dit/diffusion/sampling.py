"""Drawing latents with a trained model through a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.objective import Model, Objective
from gspn_dit.diffusion.schedulers import LEARNED, step_noise_options
from gspn_dit.errors import UserError

OnStepEnd = Callable[[int, Tensor, Tensor], Tensor]
"""`on_step_end(step, timestep, latents) -> latents`, the step counted from 0."""

SAMPLERS = ("euler", "heun", "dpm++", "sde", "ddpm", "ddim", "unipc")
"""The samplers of all objectives: the first four of velocity, the first of the few-step ones, dpm++ and the last three
of epsilon."""

CHUNK = 64
"""Images generated at a time. Fixed, and the last chunk is padded: the size of a batch can change its rounding."""

STEP_NOISE = "Philox, counted by image and step"
"""How stochastic samplers draw, for what is kept beside images: sets whose noise was drawn otherwise do not mix."""


def choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """Return the seed that a call means: its own, what its generator draws, or 0; raises ValueError for both."""
    if generator is None:
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
            raise ValueError(f"seed is {seed!r}, but must be a whole number in [0, 2^63)")
        return int(seed or 0)
    if seed is not None:
        raise ValueError("seed and generator exclude each other; give one of them")
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a {type(generator).__name__}, but must be one torch.Generator, which draws the seed of all "
            "images: image i depends on (seed, i) alone"
        )
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def draw_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the starting noise of images by index, float32 [len(indices), *shape]; image i depends on (seed, i)."""
    return rng.normal(seed, rng.Stream.SAMPLE, indices, shape)


def draw_step_noise(seed: int, indices: Sequence[int], shape: Sequence[int], step: int) -> Tensor:
    """Return the noise of a stochastic sampler's step, counted from 0, float32 [len(indices), *shape].

    Image i's depends on (seed, i, step).
    """
    return rng.normal(seed, rng.Stream.SAMPLE_STEP, indices, shape, step)


@torch.no_grad()
def sample_latents(
    model: Model,
    objective: Objective,
    noise: Tensor,
    class_labels: Tensor,
    null_label: int,
    num_inference_steps: int,
    guidance: Guidance | None = None,
    sampler: str | None = None,
    on_step: Callable[[], object] | None = None,
    seed: int | None = None,
    indices: Sequence[int] | None = None,
    guide: Model | None = None,
    scheduler: Any = None,
    on_step_end: OnStepEnd | None = None,
) -> Tensor:
    """Integrate from noise to latents.

    Args:
        model: predicts from (latents, timesteps, class_labels), and from `spans` where the objective has a second time.
        objective: the one the model was trained with.
        noise: [B, C, H, W].
        class_labels: int64 [B].
        null_label: the id that means "no class".
        num_inference_steps: steps of the scheduler, at least 1.
        guidance: None for no guidance.
        sampler: one of the objective's; None for its default.
        on_step: called after each scheduler step.
        seed, indices: what the noise of the steps of a stochastic sampler is a function of; indices are the B images'.
        guide: a weaker model of the same latents and classes to guide away from (autoguidance, arXiv 2406.02507); None
            guides away from the model's own prediction without a class.
        scheduler: one whose timesteps are set, in place of the sampler's own.
        on_step_end: returns the latents for the next step.

    Returns:
        Latents [B, C, H, W].

    Raises:
        UserError: a sampler that the objective does not have, or that cannot take so many steps; guidance of a model
            that has learnt its own.
        ValueError: a stochastic sampler without `seed` and `indices`, or guidance of more channels than there are.
    """
    guidance = _checked(guidance, objective, noise.shape[1])
    if scheduler is None:
        sampler = objective.resolve_sampler(sampler, num_inference_steps)
        scheduler = objective.make_scheduler(sampler, num_inference_steps)
        random = _noise_of_sampler(objective, sampler, noise, seed, indices)
    else:
        random = _noise_of_scheduler(scheduler, noise, seed, indices)
    guide = guide and objective.sampled(guide)
    predict = _prediction(objective.sampled(model), objective, class_labels, null_label, guidance, guide, scheduler)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    ends = torch.cat([scheduler.timesteps[1:], scheduler.timesteps.new_zeros(1)])
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        output = predict(scaled, timestep, ends[step])
        latents = scheduler.step(output.to(noise), timestep, latents, return_dict=False, **random(step))[0]
        if on_step is not None:
            on_step()
        if on_step_end is not None:
            latents = on_step_end(step, timestep, latents)
    return latents


def _checked(guidance: Guidance | None, objective: Objective, channels: int) -> Guidance:
    """Return the guidance; raises UserError if none can be had, ValueError if it is of more channels than there are."""
    guidance = guidance or Guidance()
    if objective.second_time and guidance.scale != 1:
        raise UserError(
            f"guidance of scale {guidance.scale:g} does not go with objective {objective.config.name}, whose guidance "
            "the model has learnt (objective.guidance_scale); leave it at 1"
        )
    if guidance.channels is not None and guidance.channels > channels:
        raise ValueError(f"guidance of {guidance.channels} channels, but the latent has {channels}")
    return guidance


def _step_noise(like: Tensor, seed: int, indices: Sequence[int]) -> Callable[[int], Tensor]:
    """Return what maps a step to its noise, in the place of `like`."""
    return lambda step: draw_step_noise(seed, indices, like.shape[1:], step).to(like)


def _noise_of_sampler(
    objective: Objective, sampler: str, like: Tensor, seed: int | None, indices: Sequence[int] | None
) -> Callable[[int], dict[str, Any]]:
    """Return what maps a step to the options by which the sampler's scheduler gets its noise, if it draws any."""
    if sampler not in objective.stochastic_samplers:
        return lambda step: {}
    if seed is None or indices is None:
        raise ValueError(f"sampler '{sampler}' draws noise at every step; give seed and indices")
    draw = _step_noise(like, seed, indices)
    return lambda step: {"noise": draw(step)}


def _noise_of_scheduler(
    scheduler: Any, like: Tensor, seed: int | None, indices: Sequence[int] | None
) -> Callable[[int], dict[str, Any]]:
    """Return what maps a step to the options by which a scheduler of the caller's gets its noise."""
    if seed is None or indices is None:
        raise ValueError("a scheduler may draw noise at every step; give seed and indices")
    return step_noise_options(scheduler, seed, indices, _step_noise(like, seed, indices))


def _prediction(
    model: Model,
    objective: Objective,
    class_labels: Tensor,
    null_label: int,
    guidance: Guidance,
    guide: Model | None,
    scheduler: Any,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return what maps (latents, timestep, timestep where the step ends) to what the scheduler takes.

    That is the prediction, guided, and, if the scheduler reads it, the variance, which guidance must not touch.
    """
    reads_variance = scheduler.config.get("variance_type") in LEARNED
    both = torch.cat([class_labels, torch.full_like(class_labels, null_label)])

    def joined(prediction: Tensor, variance: Tensor | None) -> Tensor:
        return torch.cat([prediction, variance], dim=1) if reads_variance and variance is not None else prediction

    def predict(latents: Tensor, timestep: Tensor, end: Tensor) -> Tensor:
        times = timestep.to(latents).expand(len(latents))
        if objective.second_time:
            return model(latents, times, class_labels, spans=times - end.to(latents))
        if not guidance.acts(float(timestep) / scheduler.config.num_train_timesteps):
            return joined(*objective.split_output(model(latents, times, class_labels)))
        if guide is None:
            strong, weak = model(latents.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        else:
            strong, weak = (network(latents, times, class_labels) for network in (model, guide))
        (conditional, variance), (weaker, _) = (objective.split_output(output) for output in (strong, weak))
        return joined(guidance.combine(conditional, weaker), variance)

    return predict


def draw_latents(
    model: Any,
    objective: Objective,
    shape: Sequence[int],
    class_labels: Tensor,
    null_label: int,
    num_inference_steps: int,
    seed: int,
    indices: Sequence[int],
    device: torch.device | None = None,
    **options: Any,
) -> Tensor:
    """Return latents [B, *shape] by class and index; latent i depends on (seed, i) and its label.

    They are float32 on `device`, or, where that is None, in dtype and place the model's weights' own. `options` are
    those of `sample_latents`, whose errors are raised.
    """
    noise = draw_noise(seed, indices, shape)
    noise = noise.to(next(model.parameters())) if device is None else noise.to(device)
    labels = class_labels.to(noise.device)
    return sample_latents(
        model, objective, noise, labels, null_label, num_inference_steps, seed=seed, indices=indices, **options
    )

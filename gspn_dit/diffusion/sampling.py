"""Drawing latents with a trained model through a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit import rng
from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.objective import Objective

Model = Callable[..., Tensor]
"""`model(latents [B, C, H, W], timesteps [B], class_labels [B]) -> [B, out_channels, H, W]`."""

SAMPLERS = ("euler", "heun", "ddpm", "ddim", "dpm++", "unipc")
"""The samplers of all objectives: the first two of velocity, the others of epsilon."""

CHUNK = 64
"""Images generated at a time. Fixed, and the last chunk is padded: the size of a batch can change its rounding."""

STEP_NOISE = "Philox, counted by image and step"
"""How stochastic samplers draw, for what is kept beside images: sets whose noise was drawn otherwise do not mix."""


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
    on_step: Callable[[], None] | None = None,
    seed: int | None = None,
    indices: Sequence[int] | None = None,
    guide: Model | None = None,
) -> Tensor:
    """Integrate from noise to latents.

    Args:
        model: predicts from (latents, timesteps, class_labels).
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

    Returns:
        Latents [B, C, H, W].

    Raises:
        UserError: a sampler that the objective does not have, or that cannot take so many steps.
        ValueError: a stochastic sampler without `seed` and `indices`, or guidance of more channels than there are.
    """
    guidance = guidance or Guidance()
    if guidance.channels is not None and guidance.channels > noise.shape[1]:
        raise ValueError(f"guidance of {guidance.channels} channels, but the latent has {noise.shape[1]}")
    sampler = objective.resolve_sampler(sampler, num_inference_steps)
    scheduler = objective.make_scheduler(sampler, num_inference_steps)
    stochastic = sampler in objective.stochastic_samplers
    if stochastic and (seed is None or indices is None):
        raise ValueError(f"sampler '{sampler}' draws noise at every step; give seed and indices")
    predict = _prediction(model, objective, class_labels, null_label, guidance, guide)
    latents = noise
    for step, timestep in enumerate(scheduler.timesteps):
        guided = guidance.acts(float(timestep) / scheduler.config.num_train_timesteps)
        prediction, variance = predict(latents, timestep.to(noise).expand(len(noise)), guided)
        if variance is not None and scheduler.config.get("variance_type") == "learned_range":
            prediction = torch.cat([prediction, variance], dim=1)
        options: dict[str, Any] = {}
        if stochastic:
            assert seed is not None and indices is not None
            options["noise"] = draw_step_noise(seed, indices, noise.shape[1:], step).to(noise)
        latents = scheduler.step(prediction.to(noise), timestep, latents, return_dict=False, **options)[0]
        if on_step is not None:
            on_step()
    return latents


def _prediction(
    model: Model,
    objective: Objective,
    class_labels: Tensor,
    null_label: int,
    guidance: Guidance,
    guide: Model | None,
) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    """Return what maps (latents, timesteps, whether to guide) to the prediction and what guidance must not touch."""
    both = torch.cat([class_labels, torch.full_like(class_labels, null_label)])

    def predict(latents: Tensor, times: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        if not guided:
            return objective.split_output(model(latents, times, class_labels))
        if guide is None:
            strong, weak = model(latents.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        else:
            strong, weak = (network(latents, times, class_labels) for network in (model, guide))
        (conditional, variance), (weaker, _) = (objective.split_output(output) for output in (strong, weak))
        return guidance.combine(conditional, weaker), variance

    return predict


def draw_latents(
    model: nn.Module,
    objective: Objective,
    shape: Sequence[int],
    class_labels: Tensor,
    null_label: int,
    num_inference_steps: int,
    seed: int,
    indices: Sequence[int],
    **options: Any,
) -> Tensor:
    """Return latents [B, *shape] by class and index on the model's device; latent i depends on (seed, i) and its label.

    `options` are those of `sample_latents`, whose errors are raised.
    """
    weight = next(model.parameters())
    noise = draw_noise(seed, indices, shape).to(weight)
    labels = class_labels.to(weight.device)
    return sample_latents(
        model, objective, noise, labels, null_label, num_inference_steps, seed=seed, indices=indices, **options
    )

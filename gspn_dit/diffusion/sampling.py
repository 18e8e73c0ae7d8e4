"""Drawing latents with a trained model through a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gspn_dit import rng
from gspn_dit.diffusion.guidance import Guidance
from gspn_dit.diffusion.objective import Model, Objective

SAMPLERS = ("euler", "heun")

CHUNK = 64
"""Images generated at a time. Fixed, and the last chunk is padded: the size of a batch can change its rounding."""


def draw_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the starting noise of images by index, float32 [len(indices), *shape]; image i depends on (seed, i)."""
    return rng.normal(seed, rng.Stream.SAMPLE, indices, shape)


@torch.no_grad()
def sample_latents(
    model: Model,
    objective: Objective,
    noise: Tensor,
    class_labels: Tensor,
    null_label: int,
    num_inference_steps: int,
    guidance: Guidance | None = None,
    sampler: str = "euler",
    on_step: Callable[[], None] | None = None,
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
        sampler: one of the objective's.
        on_step: called after each scheduler step.

    Returns:
        Latents [B, C, H, W].
    """
    guidance = guidance or Guidance()
    scheduler = objective.make_scheduler(sampler, num_inference_steps)
    latents, null_labels = noise, torch.full_like(class_labels, null_label)
    for timestep in scheduler.timesteps:
        times = timestep.to(noise).expand(len(noise))
        if guidance.acts(float(timestep) / scheduler.config.num_train_timesteps):
            output = model(latents.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([class_labels, null_labels]))
            conditional, unconditional = (objective.split_output(half) for half in output.chunk(2))
            prediction = guidance.combine(conditional[0], unconditional[0])
        else:
            prediction, _ = objective.split_output(model(latents, times, class_labels))
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step()
    return latents

"""What a model learns, and how its output drives a sampler: the interface that every objective implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.errors import UserError

Model = Callable[..., Tensor]
"""`model(latents [B, C, H, W], timesteps [B], class_labels [B]) -> [B, out_channels, H, W]`."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""`denoise(latents [B, C, H, W], timesteps [B]) -> [B, out_channels, H, W]`: a model that knows its conditioning."""


class Objective(ABC):
    """A loss with its time distribution, and the schedulers that sample from a model trained with it."""

    prediction_type: str
    """What diffusers' schedulers call what the model predicts."""
    samplers: tuple[str, ...]
    """Names of the samplers that `make_scheduler` takes, the default first."""
    stochastic_samplers: tuple[str, ...] = ()
    """Those whose every step draws noise."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def times(self, uniforms: Tensor) -> Tensor:
        """Map uniform draws [B] in [0, 1) to times t [B] in [0, 1], 1 for noise.

        This is the inverse distribution function of t, which is uniform or logit-normal and then shifted.
        """
        t = uniforms
        if self.config.timestep_sampling == "logit_normal":
            t = torch.sigmoid(self.config.logit_normal_mean + self.config.logit_normal_std * torch.special.ndtri(t))
        shift = self.config.timestep_shift
        return shift * t / (1 + (shift - 1) * t)

    def resolve_sampler(self, sampler: str | None, num_inference_steps: int) -> str:
        """Return a sampler's name, the default for None; raises UserError if there is none, or not of so many steps."""
        name = sampler or self.samplers[0]
        if name not in self.samplers:
            raise UserError(f"unknown sampler '{name}'; allowed are {', '.join(self.samplers)}")
        most = self.most_steps(name)
        if most is not None and num_inference_steps > most:
            raise UserError(f"sampler '{name}' takes at most {most} steps, not {num_inference_steps}")
        return name

    def most_steps(self, sampler: str) -> int | None:
        """Return how many steps a sampler can take, or None for any number."""
        return None

    @abstractmethod
    def out_channels(self, latent_channels: int) -> int:
        """Return how many channels the model predicts."""

    @abstractmethod
    def timesteps(self, uniforms: Tensor) -> Tensor:
        """Map uniform draws [B] in [0, 1) to training timesteps [B] in [0, 1000]."""

    @abstractmethod
    def loss(self, denoise: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the loss of each sample, [B], in float32 or better.

        latents and noise are [B, C, H, W], timesteps [B] in [0, 1000].
        """

    @abstractmethod
    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return a diffusers scheduler whose timesteps are set."""

    @abstractmethod
    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a model's output into the prediction [B, C, H, W] and what guidance must not touch (a variance)."""

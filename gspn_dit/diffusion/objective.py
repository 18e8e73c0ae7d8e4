"""What a model learns, and how its output drives a sampler: the interface that every objective implements."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.errors import UserError

TIMESTEP_SCALE = 1000
"""A model of flow matching receives 1000·t."""

Times = TypeVar("Times", float, Tensor, np.ndarray)

Model = Callable[..., Tensor]
"""`model(latents [B, C, H, W], timesteps [B], class_labels [B]) -> [B, out_channels, H, W]`."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""`denoise(latents [B, C, H, W], timesteps [B]) -> [B, out_channels, H, W]`: a model that knows its conditioning."""


@dataclass(frozen=True)
class Conditioned:
    """A `Denoiser` of a batch's classes that can also be asked for some of its rows, without a class, or for a step.

    Args:
        model: called as `model(latents, timesteps, class_labels, keep_mask)`, and by `spans` where they are given.
        class_labels: int64 [B]; `null_label` means "no class".
        null_label: the id that means "no class".
        keep_mask: of stochastic depth, bool [blocks, B], or None.
    """

    model: Model
    class_labels: Tensor
    null_label: int
    keep_mask: Tensor | None = None

    def __call__(self, latents: Tensor, timesteps: Tensor, spans: Tensor | None = None) -> Tensor:
        """Predict from noisy latents [B, C, H, W] and timesteps [B]; spans [B] are timesteps minus those led to."""
        told = {} if spans is None else {"spans": spans}
        return self.model(latents, timesteps, self.class_labels, self.keep_mask, **told)

    def __getitem__(self, rows: Tensor) -> Conditioned:
        """Return the denoiser of some rows, int64 [n]."""
        keep_mask = None if self.keep_mask is None else self.keep_mask[:, rows]
        return replace(self, class_labels=self.class_labels[rows], keep_mask=keep_mask)

    def without_class(self) -> Conditioned:
        """Return the denoiser that is told no class."""
        return replace(self, class_labels=torch.full_like(self.class_labels, self.null_label))

    @property
    def has_class(self) -> Tensor:
        """Which rows have a class, bool [B]."""
        return self.class_labels != self.null_label


def shifted(t: Times, shift: float) -> Times:
    """Return s·t / (1 + (s-1)·t): times t in [0, 1], moved towards noise where s > 1 (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


class Objective(ABC):
    """A loss with its time distribution, and the schedulers that sample from a model trained with it."""

    prediction_type: str
    """What diffusers' schedulers call what the model predicts."""
    samplers: tuple[str, ...]
    """Names of the samplers that `make_scheduler` takes, the default first."""
    stochastic_samplers: tuple[str, ...] = ()
    """Those whose every step draws noise."""
    second_time: bool = False
    """Whether the model is told how far a step goes. It predicts the mean velocity over the step then, and guidance is
    part of what it learns: sampling adds none."""
    uniforms: int = 1
    """Uniform draws from which the times of a training sample are made."""
    flows: bool = False
    """Whether its samplers go from t = 1 to t = 0 along times that can be shifted."""
    shifts_by_size: bool = False
    """Whether a shift that the config leaves open is `natural_shift`; else it is 1."""
    natural_shift: float = 1.0
    """What suits the size of the latents, see `gspn_dit.data.latents.Latent.natural_shift`."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self._check_sampling_shift(config.sampling_shift)

    def _check_sampling_shift(self, shift: float | None) -> None:
        if shift is not None and not self.flows:
            raise UserError(
                f"a sampling shift of {shift:g} does not go with objective {self.config.name}, whose samplers visit "
                "the timesteps of its schedule; leave it out"
            )

    @property
    def training_shift(self) -> float:
        """By how much training times are shifted towards noise; 1 is not at all."""
        given = self.config.timestep_shift
        return given if given is not None else self.natural_shift if self.shifts_by_size else 1.0

    @property
    def sampling_shift(self) -> float:
        """By how much a sampler's times are shifted towards noise: as in training, unless the config says otherwise."""
        given = self.config.sampling_shift
        return given if given is not None else self.training_shift if self.flows else 1.0

    def with_sampling_shift(self, shift: float | None) -> Objective:
        """Return this objective with another shift in sampling, itself for None; UserError where it has none."""
        if shift is None:
            return self
        self._check_sampling_shift(shift)
        other = copy.copy(self)
        other.config = replace(self.config, sampling_shift=shift)
        return other

    def times(self, uniforms: Tensor) -> Tensor:
        """Map uniform draws [B] in [0, 1) to times t [B] in [0, 1], 1 for noise.

        This is the inverse distribution function of t, which is uniform or logit-normal and then shifted.
        """
        t = uniforms
        if self.config.timestep_sampling == "logit_normal":
            t = torch.sigmoid(self.config.logit_normal_mean + self.config.logit_normal_std * torch.special.ndtri(t))
        return shifted(t, self.training_shift)

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

    def training_timesteps(self, uniforms: Tensor, progress: Tensor) -> Tensor:
        """Return what `training_loss` takes: [B], or [B, n] of an objective with several times, in [0, 1000].

        uniforms are [B, self.uniforms] in [0, 1), progress [B] in [0, 1) is the place of a sample in its run.
        """
        return self.timesteps(uniforms[:, 0])

    def training_loss(
        self, denoise: Conditioned, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> dict[str, Tensor]:
        """Return the "loss" of each sample that is minimised, [B], and what else is logged.

        latents and noise are [B, C, H, W]; timesteps are what `training_timesteps` gave, still on the CPU. An "error"
        is a mean square without the weights of the loss, by which explosions are noticed.
        """
        return {"loss": self.loss(denoise, latents, noise, timesteps.to(latents.device))}

    @abstractmethod
    def loss(self, denoise: Denoiser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the loss of each sample at one time, [B], in float32 or better; validation is by this one.

        latents and noise are [B, C, H, W], timesteps [B] in [0, 1000].
        """

    @abstractmethod
    def make_scheduler(self, sampler: str, num_inference_steps: int) -> Any:
        """Return a diffusers scheduler whose timesteps are set."""

    def sampled(self, model: Model) -> Model:
        """Return the model whose output `split_output` takes, called in sampling as the trained one is."""
        return model

    @abstractmethod
    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a model's output into the prediction [B, C, H, W] and what guidance must not touch (a variance)."""

"""Class-conditional generation: labelled images, the latent behind them, and a model that is told the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gspn_dit import rng
from gspn_dit.config import Config
from gspn_dit.data.buckets import BucketBatches
from gspn_dit.data.build import build_data
from gspn_dit.data.facts import data_facts
from gspn_dit.data.latents import refuse_other_vae
from gspn_dit.data.self_check import check_latents
from gspn_dit.diffusion import Conditioned, Guidance, Objective, create_objective, draw_latents
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.models.flops import forward_multiply_adds
from gspn_dit.models.mixer import Mixer
from gspn_dit.models.scans import GSPNMixer
from gspn_dit.sampling_options import check_guided_channels
from gspn_dit.tasks.alignment import create_alignment
from gspn_dit.tasks.base import GenerativeTask
from gspn_dit.tasks.draws import Draws, by_quartile, training_draws, validation_draws
from gspn_dit.tasks.finetune import pretrained_weights
from gspn_dit.tasks.plan import Plan, cache_rows, gigabytes, shift_rows


class ClassConditional(GenerativeTask):
    """A model learns to denoise latents given their class, or none."""

    model: DiffusionModel

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        create_objective(config.objective).resolve_sampler(config.sampling.sampler, config.sampling.steps)
        _check_derivative(config)
        data = build_data(config)
        self.train_data, self.validation_data, self.latent = data.training, data.validation, data.latent
        self.objective = create_objective(config.objective, self.latent.natural_shift)
        self.image_size, self.image_channels = self.latent.size * self.latent.factor, self.latent.image_channels
        check_guided_channels(config.sampling.guidance_channels, self.latent.channels, "sampling.guidance_channels")
        self.class_names = self.train_data.images.class_names
        arguments = _model_arguments(
            config, self.train_data.images.num_classes, self.latent.channels, self.latent.size, self.objective
        )
        self.description = {
            "model": arguments,
            "latent": self.latent.spec(),
            "class_names": self.class_names,
            "data": data.facts,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = _create_model(arguments)
        _check_buckets(config, self.latent.factor * self.model.patch_size)
        self.latents_found: tuple[str, ...] = ()
        """What a look at a few of them said."""
        labels = np.array([]) if config.data.streaming else self.train_data.images.labels  # type: ignore[attr-defined]
        self.alignment = create_alignment(config, self.model, labels, self.latent.size)
        if self.alignment is not None:
            self.companions = {"repa": self.alignment.projector}

    @classmethod
    def plan(cls, config: Config) -> Plan:
        sampling, facts = config.sampling, data_facts(config)
        objective = create_objective(config.objective, facts.natural_shift)
        _check_derivative(config)
        sampler = objective.resolve_sampler(sampling.sampler, sampling.steps)
        check_guided_channels(sampling.guidance_channels, facts.channels, "sampling.guidance_channels")
        with torch.device("meta"):
            model = _create_model(_model_arguments(config, facts.num_classes, facts.channels, facts.size, objective))
        channels, size, side = facts.channels, facts.size, facts.size // model.patch_size
        mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        scans = sum(mixer.scan_multiply_adds(side, side) for mixer in mixers if isinstance(mixer, GSPNMixer))
        multiply_adds = forward_multiply_adds(model, size, size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows = [
            ("model", f"{config.model.name}, {parameters:,} parameters"),
            ("forward", f"{multiply_adds / 1e9:.4g} G multiply-adds for an image of {channels}×{size}×{size}"),
        ]
        if scans:
            rows.append(("", f"{scans / 1e9:.3g} G of them in scans, 6 for each token, channel and direction"))
        rows.append(("objective", f"{config.objective.name}; previews by {sampler} in {sampling.steps} steps"))
        rows += [*shift_rows(objective), *cache_rows(config, facts)]
        size_text = f"{gigabytes(facts.bytes)} ({facts.source})"
        return Plan(
            model=model,
            inputs=lambda batch: (
                torch.empty(batch, channels, size, size),
                torch.empty(batch),
                torch.zeros(batch, dtype=torch.int64),
            ),
            multiply_adds=multiply_adds,
            images=facts.images,
            data=f"{facts.images:,} images of {facts.num_classes} classes, {size_text}",
            rows=rows,
            blocks=len(model.blocks),
            working_elements=max(mixer.working_elements(side, side) for mixer in mixers),
        )

    @classmethod
    def excludes_sharding(cls, config: Config) -> str | None:
        """Buckets: each process calls the model once per size in its share, and sharded weights are gathered by call.

        Processes with other numbers of calls would wait for each other for ever.
        """
        return "data.buckets" if config.data.buckets else None

    def to(self, device: torch.device) -> None:
        if self.config.objective.derivative == "jvp" and device.type != "cpu":
            raise UserError(
                f"objective.derivative jvp runs on CPUs alone, and this is {device.type}, where scans have no forward "
                "mode; set objective.derivative differences"
            )
        super().to(device)
        self.latent.to(device)

    def look(self) -> None:
        batches = self.validation_data if self.config.data.streaming else self.train_data
        self.latents_found = check_latents(self.latent, batches, self.config.latent.check)

    def multiply_adds(self) -> int:
        return forward_multiply_adds(self.model, self.latent.size, self.latent.size)

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, numbers: range) -> dict[str, Tensor]:
        if not isinstance(self.train_data, BucketBatches):
            return self._loss(model, numbers)
        parts = self.train_data.parts(numbers)
        shares = [(len(part) / len(numbers), self._loss(model, part)) for part in parts]
        return {name: sum(share * means[name] for share, means in shares) for name in shares[0][1]}  # type: ignore[misc]

    def _loss(self, model: nn.Module, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return the mean losses of samples of one size."""
        settings = self.config.training
        latents, labels = self.train_data.shuffled(numbers)
        draws = training_draws(
            self.config.seed,
            numbers,
            latents,
            labels,
            self.objective,
            settings.class_dropout,
            self.model.null_label,
            self.model.drop_path_rates,
            settings.max_steps * settings.batch_size,
        )
        with self.alignment.reading(self.model) if self.alignment else nullcontext():
            losses = self.objective.training_loss(*self._inputs(model, latents, draws), draws.timesteps)
        means = {name: loss.mean() for name, loss in losses.items()}
        if self.alignment is not None:
            with self.autocast():
                images = rng.data_indices(self.config.seed, numbers, len(self.train_data.images))
                means["loss"] = means["loss"] + self.alignment.loss(numbers, images)
        return means

    def _inputs(self, model: nn.Module, latents: Tensor, draws: Draws) -> tuple[Conditioned, Tensor, Tensor]:
        """Return what an objective's losses take before the timesteps: the denoiser, latents and noise."""
        weight = next(self.model.parameters())
        keep_mask = None if draws.keep_mask is None else draws.keep_mask.to(weight.device)
        denoise = Conditioned(model, draws.class_labels.to(weight.device), self.model.null_label, keep_mask)
        latents, noise = (tensor.to(weight.device, weight.dtype) for tensor in (latents, draws.noise))
        return denoise, latents, noise

    def validate(self, model: nn.Module, indices: range) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the loss of fixed images, times and noise, and the same by quartile of t."""
        if not isinstance(self.validation_data, BucketBatches):
            return self._validate(model, indices)
        parts = [self._validate(model, part) for part in self.validation_data.parts_at(indices)]
        summed = {name: [sum(pair) for pair in zip(*(part[name] for part in parts))] for name in parts[0]}
        return {name: (total, count) for name, (total, count) in summed.items()}

    def _validate(self, model: nn.Module, indices: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the figures of images of one size."""
        assert self.validation_data is not None
        latents, labels = self.validation_data.at(indices)
        draws = validation_draws(self.config.seed, indices, self.validation_count, latents, labels, self.objective)
        losses = self.objective.loss(*self._inputs(model, latents, draws), draws.timesteps.to(self.device))
        return by_quartile(losses, draws.timesteps)

    # -- images --------------------------------------------------------------------------------------------------

    @property
    def conditions(self) -> Sequence[str]:
        return self.class_names

    def draw_conditions(self, model: nn.Module, conditions: Sequence[int], guidance: Guidance) -> np.ndarray:
        return self._sample(model, torch.tensor(conditions), range(len(conditions)), guidance)

    def draw(self, model: nn.Module, indices: range) -> np.ndarray:
        """Return images of all classes in turn."""
        return self._sample(model, torch.tensor(indices) % self.model.num_classes, indices, None)

    def _sample(self, model: nn.Module, labels: Tensor, indices: range, guidance: Guidance | None) -> np.ndarray:
        sampling = self.config.sampling
        if self.objective.second_time:
            guidance = None  # which the model has learnt
        latents = draw_latents(
            model,
            self.objective,
            (self.latent.channels, self.latent.size, self.latent.size),
            labels,
            self.model.null_label,
            sampling.steps,
            self.config.seed,
            indices,
            guidance=guidance,
            sampler=sampling.sampler,
        )
        return self.latent.decode(latents)

    @property
    def _reference(self) -> Any:
        """Training images; of a stream, which cannot be asked for one, the held-out ones; None of several sizes."""
        if self.config.data.buckets:
            return None
        return self.validation_data if self.config.data.streaming else self.train_data

    @property
    def reference_count(self) -> int:
        if self.config.data.buckets:
            raise UserError("training.fd_every does not go with data.buckets, whose images share no size; leave it out")
        if self._reference is None:
            raise UserError("training.fd_every: a stream without a validation split has no images to compare with")
        return len(self._reference.images)

    def reference(self, indices: Sequence[int]) -> np.ndarray:
        latents, _ = self._reference.at(indices)
        return self.latent.decode(latents.to(self.device))

    # -- between runs --------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return self.description

    def summary(self) -> list[tuple[str, str]]:
        parameters = sum(weight.numel() for weight in self.model.parameters())
        return [
            ("data", self._data_summary()),
            *(("", remark) for remark in self.train_data.images.remarks),
            *(("latents", line) for line in self.latents_found),
            *shift_rows(self.objective),
            ("model", f"{self.config.model.name}, {parameters:,} parameters"),
        ]

    def _data_summary(self) -> str:
        images, latent = self.train_data.images, self.latent
        text = f"{self.config.data.path or images.name}: {len(images):,} images of {images.num_classes:,} classes, "
        text += f"{latent.image_size}x{latent.image_size} {'grey' if latent.image_channels == 1 else 'RGB'}"
        if isinstance(self.train_data, BucketBatches):
            text += f" and in buckets {self.train_data.describe()}"
        if latent.factor > 1:
            text += f", as latents {latent.channels}x{latent.size}x{latent.size}"
        if self.validation_data is None:
            return f"{text}; none for validation"
        used, held_out = self.validation_count, len(self.validation_data.images)
        return f"{text}; {used:,}{f' of {held_out:,}' if used < held_out else ''} more for validation"

    def check_resumed(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        refuse_other_vae(manifest["latent"], self.latent.spec())
        super().check_resumed(checkpoint, manifest)

    def start_from(self, checkpoint: str) -> None:
        """Take EMA weights; a class of the same name keeps its row of the label table."""
        prediction = self.config.objective.prediction
        self.model.load_state_dict(pretrained_weights(checkpoint, self.model, self.description, prediction))


def _check_buckets(config: Config, multiple: int) -> None:
    """Raise UserError for sizes that are not divisible by a patch's side in pixels."""
    for height, width in config.data.bucket_sizes():
        if height % multiple or width % multiple:
            raise UserError(
                f"data.buckets: {height}x{width} is not divisible by {multiple}, the pixels of a patch's side; "
                "choose other sizes"
            )


def _check_derivative(config: Config) -> None:
    """Raise UserError where derivatives in forward mode cannot be had, or nothing asks for them."""
    if config.objective.derivative != "jvp":
        return
    if config.objective.name != "mean_flow":
        raise UserError(f"objective.derivative jvp is for mean_flow, but objective.name is {config.objective.name}")
    if config.training.compile:
        raise UserError("objective.derivative jvp does not go with training.compile; leave one of them out")


def _model_arguments(
    config: Config, num_classes: int, channels: int, latent_size: int, objective: Objective
) -> dict[str, Any]:
    """Return what `create_model` is called with; a checkpoint's manifest holds it."""
    return {
        "name": config.model.name,
        "num_classes": num_classes,
        "latent_channels": channels,
        "latent_size": latent_size,
        "out_channels": objective.out_channels(channels),
        **({"second_time": True} if objective.second_time else {}),
        **config.model.overrides(),
    }


def _create_model(arguments: Mapping[str, Any]) -> DiffusionModel:
    try:
        return create_model(**arguments)
    except ValueError as error:
        raise UserError(f"model: {error}") from None

"""Text-to-image: captioned images, a frozen text encoder, and a UNet with scans or attention that is told the caption.

A caption is handled as a class is elsewhere: by its number in a table of encoded captions, one of which stands for "no
caption". The UNet is trained from scratch, or its scans alone are, by distillation from one with attention.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gspn_dit import rng
from gspn_dit.config import Config
from gspn_dit.data.captions import caption_variants
from gspn_dit.data.images import evenly_spaced
from gspn_dit.data.latents import refuse_other_vae
from gspn_dit.data.self_check import check_latents
from gspn_dit.diffusion import Guidance, draw_latents, objective_of
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import (
    Captioned,
    create_unet,
    describe_unet,
    mount_scans,
    pooled_width,
    smallest_side,
    unet_cost,
)
from gspn_dit.tasks.base import GenerativeTask
from gspn_dit.tasks.captioned import encode_texts, open_captioned, text_width
from gspn_dit.tasks.distillation import Distillation, frozen_copy, load_teacher
from gspn_dit.tasks.draws import Draws, by_quartile, training_draws, validation_draws
from gspn_dit.tasks.plan import Plan, shift_rows
from gspn_dit.tasks.text_plan import plan_unet
from gspn_dit.text import is_pipeline

MODEL_NAME = "UNet"


class TextToImage(GenerativeTask):
    """A UNet learns to denoise latents given a caption, or none."""

    model: Any
    """A `UNet2DConditionModel`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check(config)
        schedule = _schedule(config)
        self.objective = objective_of(config.objective, schedule)
        self.objective.resolve_sampler(config.sampling.sampler, config.sampling.steps)
        if self.objective.second_time:
            raise UserError(
                f"objective.name {config.objective.name} does not go with task text-to-image, whose UNet is told one "
                "time alone; set velocity"
            )
        training, validation = open_captioned(config)
        self.train_data, self.captions = training.images, training.captions
        self.validation_data = None if validation is None else validation.images
        self.validation_captions = [] if validation is None else validation.captions
        self.latent = self.train_data.latent
        self.objective.natural_shift = self.latent.natural_shift
        self.image_size, self.image_channels = self.latent.image_size, self.latent.image_channels
        self.latents_found: tuple[str, ...] = ()
        """What a look at a few of them said."""
        self.distillation: Distillation | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                self.model = self._build_model(text_width(config))
            except ValueError as error:
                raise UserError(f"unet: {error}") from None
        side, least = self.latent.size, smallest_side(self.model, config.unet.patch_size)
        if side % least:
            raise UserError(
                f"latents of {side}×{side} are not divisible by {least}, as this UNet needs; choose another "
                "data.image_size, unet.patch_size or number of unet.channels"
            )
        self.prompts = config.text.prompts or self._captions_to_show()
        texts = {text for variants in (*self.captions, *self.validation_captions) for text in variants}
        self.table, text = encode_texts(config, texts | set(self.prompts))
        self._check_pooled()
        images, facts = self.train_data.images, [training.fingerprint(), self.captions]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.description: dict[str, Any] = {
            "model": describe_unet(self.model, config.unet),
            "latent": self.latent.spec(),
            "text": text,
            "schedule": schedule,
            "class_names": [],
            "data": {"name": images.name, "images": len(images), "fingerprint": digest},
        }

    @classmethod
    def plan(cls, config: Config) -> Plan:
        _check(config)
        return plan_unet(config, objective_of(config.objective, _schedule(config)), text_width(config))

    @classmethod
    def excludes_sharding(cls, config: Config) -> str | None:
        return "task text-to-image"

    def _build_model(self, text_width: int) -> Any:
        """Return the UNet that is trained; with a teacher, its scans alone ask for gradients."""
        options, channels = self.config.unet, self.latent.channels
        if options.teacher is None:
            unet = create_unet(options, channels, self.objective.out_channels(channels), text_width)
            if options.mixer == "gspn":
                mount_scans(unet, options)
            return unet
        unet, manifest = load_teacher(options.teacher)
        self._check_teacher(unet, manifest, text_width)
        teacher = frozen_copy(unet)
        adapter = mount_scans(unet, options)
        adapter.requires_grad_(True)
        self.distillation = Distillation(teacher, unet, options.teacher_inputs)
        return unet

    def _check_teacher(self, unet: Any, manifest: Mapping[str, Any], text_width: int) -> None:
        options, channels = self.config.unet, self.latent.channels * self.config.unet.patch_size**2
        where = f"unet.teacher {options.teacher}"
        for what, given, needed in (
            ("channels of a latent", unet.config.in_channels, channels),
            ("channels of a text", unet.config.cross_attention_dim, text_width),
            ("patch_size", manifest.get("model", {}).get("patch_size", options.patch_size), options.patch_size),
        ):
            if given != needed:
                raise UserError(f"{where} is of another shape: its {what} is {given}, and {needed} is needed here")
        if manifest:
            refuse_other_vae(manifest["latent"], self.latent.spec())

    def _check_pooled(self) -> None:
        pooled, needed = self.table.parts[0].pooled, pooled_width(self.model.config)
        given = None if pooled is None else pooled.shape[1]
        if needed is not None and needed != given:
            raise UserError(
                f"unet.teacher {self.config.unet.teacher} asks for pooled texts of {needed} channels, and text.encoder "
                f"{self.config.text.encoder} gives {given or 'none'}; set text.encoder to the pipeline's directory"
            )

    def _captions_to_show(self) -> list[str]:
        variants = self.validation_captions or self.captions
        return [variants[index][0] for index in evenly_spaced(len(variants), self.config.sampling.max_classes)]

    # -- where and how it runs -----------------------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.latent.to(device)
        if self.distillation is not None:
            self.distillation.teacher.to(device)  # type: ignore[arg-type]

    def look(self) -> None:
        self.latents_found = check_latents(self.latent, self.train_data, self.config.latent.check)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return [module for module in model.modules() if type(module).__name__ == "BasicTransformerBlock"]

    def checkpoint_activations(self) -> None:
        self.model.enable_gradient_checkpointing()

    def multiply_adds(self) -> int:
        size = self.latent.size
        return unet_cost(self.description["model"], size, size, self.table.length).multiply_adds

    # -- training ------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, numbers: range) -> dict[str, Tensor]:
        seed, images = self.config.seed, self.train_data.images
        latents, _ = self.train_data.shuffled(numbers)
        chosen = [self.captions[index] for index in rng.data_indices(seed, numbers, len(images))]
        variants = caption_variants(seed, numbers, [len(texts) for texts in chosen])
        texts = self._numbers([texts[variant] for texts, variant in zip(chosen, variants, strict=True)])
        dropout = self.config.training.class_dropout
        draws = training_draws(seed, numbers, latents, texts, self.objective, dropout, self.table.null, [0.0])
        losses = self._losses(model, latents, draws).mean()
        return {"loss": losses} if self.distillation is None else self.distillation.losses(losses)

    def _numbers(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.table.numbers[text] for text in texts], dtype=torch.int64)

    def _called(self, model: nn.Module) -> Captioned:
        return Captioned(model, self.table, self.image_size, self.config.unet.patch_size)

    def _losses(self, model: nn.Module, latents: Tensor, draws: Draws) -> Tensor:
        """Return the loss of each sample, [B]; where the student is trained, its teacher is asked as well."""
        weight = next(self.model.parameters())
        student, training = self._called(model), torch.is_grad_enabled()

        def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
            if self.distillation is None or not training:
                return student(noisy, timesteps, draws.class_labels)
            teacher = self._called(self.distillation.teacher)
            return self.distillation(
                lambda: student(noisy, timesteps, draws.class_labels),
                lambda: self._as_teacher(teacher, noisy, timesteps, draws.class_labels),
            )

        latents, noise = (tensor.to(weight.device, weight.dtype) for tensor in (latents, draws.noise))
        return self.objective.loss(denoise, latents, noise, draws.timesteps.to(weight.device))

    def _as_teacher(self, teacher: Captioned, noisy: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        with self.autocast():
            return teacher(noisy, timesteps, texts)

    def validate(self, model: nn.Module, indices: range) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the loss of fixed images, captions, times and noise, and the same by quartile of t."""
        assert self.validation_data is not None
        latents, _ = self.validation_data.at(indices)
        texts = self._numbers([self.validation_captions[index][0] for index in indices])
        draws = validation_draws(self.config.seed, indices, self.validation_count, latents, texts, self.objective)
        return by_quartile(self._losses(model, latents, draws), draws.timesteps)

    # -- images --------------------------------------------------------------------------------------------------

    @property
    def conditions(self) -> Sequence[str]:
        return self.prompts

    def draw_conditions(self, model: nn.Module, conditions: Sequence[int], guidance: Guidance) -> np.ndarray:
        return self._sample(model, [self.prompts[i] for i in conditions], range(len(conditions)), guidance)

    def draw(self, model: nn.Module, indices: range) -> np.ndarray:
        """Return images of the training captions in turn."""
        return self._sample(model, [self.captions[i % len(self.captions)][0] for i in indices], indices, None)

    def _sample(self, model: nn.Module, texts: list[str], indices: range, guidance: Guidance | None) -> np.ndarray:
        sampling, size = self.config.sampling, self.latent.size
        latents = draw_latents(
            self._called(model),
            self.objective,
            (self.latent.channels, size, size),
            self._numbers(texts),
            self.table.null,
            sampling.steps,
            self.config.seed,
            indices,
            guidance=guidance,
            sampler=sampling.sampler,
        )
        return self.latent.decode(latents)

    @property
    def reference_count(self) -> int:
        return len(self.train_data.images)

    def reference(self, indices: Sequence[int]) -> np.ndarray:
        latents, _ = self.train_data.at(indices)
        return self.latent.decode(latents.to(self.device))

    # -- between runs --------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return self.description

    def summary(self) -> list[tuple[str, str]]:
        images, parameters = self.train_data.images, list(self.model.parameters())
        total = sum(weight.numel() for weight in parameters)
        trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
        data = f"{self.config.data.path}: {len(images):,} images of {self.image_size}x{self.image_size}, "
        data += f"{len(self.table.numbers) - 1:,} distinct captions; {self.validation_count:,} more for validation"
        mixer = "scans" if self.config.unet.mixer == "gspn" else "attention"
        model = f"UNet with {mixer}, {total:,} parameters"
        if self.distillation is not None:
            model += f", of which {trained:,} are trained to do as {self.config.unet.teacher} does"
        told = [("", remark) for remark in images.remarks] + [("latents", line) for line in self.latents_found]
        told += shift_rows(self.objective)
        return [("data", data), *told, ("text", f"{self.config.text.encoder}"), ("model", model)]

    def check_resumed(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        refuse_other_vae(manifest["latent"], self.latent.spec())
        if manifest["text"] != self.description["text"]:
            raise UserError(f"{checkpoint} was trained with another text encoder: {manifest['text']}; restore it")
        super().check_resumed(checkpoint, manifest)


def _check(config: Config) -> None:
    """Raise UserError for what does not go together."""
    if config.model.name != MODEL_NAME:
        raise UserError(
            f"model.name is {config.model.name}, but task text-to-image trains a diffusers UNet; set model.name UNet "
            "and describe it by the keys of unet"
        )
    if config.training.repa_features is not None:
        raise UserError("training.repa_features does not go with task text-to-image; leave it out")
    if config.unet.teacher is not None and config.training.compile:
        raise UserError("training.compile does not go with unet.teacher, whose layers are read; leave one of them out")
    if config.unet.teacher_inputs and config.training.activation_checkpointing:
        raise UserError("training.activation_checkpointing does not go with unet.teacher_inputs; leave one out")


def _schedule(config: Config) -> dict[str, Any] | None:
    """Return the scheduler's config of a teacher that is a pipeline, else None."""
    place = Path(config.unet.teacher or "")
    if config.unet.teacher is None or not is_pipeline(config.unet.teacher):
        return None
    try:
        return json.loads((place / "scheduler" / "scheduler_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"unet.teacher {place} has no readable scheduler: {error}") from None

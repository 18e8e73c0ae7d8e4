"""What a text-to-image run would take, found without a GPU, the data, or any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from gspn_dit.config import Config
from gspn_dit.data.captions import load_captioned
from gspn_dit.data.facts import DataFacts, cache_of, data_facts, unseen_facts
from gspn_dit.diffusion import Objective
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import (
    blank_texts,
    call_unet,
    create_unet,
    describe_unet,
    mount_scans,
    smallest_side,
    unet_cost,
)
from gspn_dit.tasks.distillation import describe_teacher
from gspn_dit.tasks.plan import Plan, cache_rows, gigabytes, shift_rows
from gspn_dit.text import Encoded

COCO_IMAGES = 82_783
"""Of COCO 2014's training split, which stand in for data that are not there."""


class PlannedUNet(nn.Module):
    """A UNet called with plain tensors, with the switch for checkpointing that other models have."""

    def __init__(self, unet: UNet2DConditionModel, patch_size: int) -> None:
        super().__init__()
        self.unet, self.patch_size = unet, patch_size

    @property
    def gradient_checkpointing(self) -> bool:
        return self.unet.is_gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        unet: Any = self.unet
        unet.enable_gradient_checkpointing() if wanted else unet.disable_gradient_checkpointing()

    def forward(self, latents: Tensor, timesteps: Tensor, states: Tensor, mask: Tensor, pooled: Any = None) -> Tensor:
        texts = Encoded(states, mask, pooled)
        return call_unet(self.unet, latents, timesteps, texts, self.patch_size, latents.shape[-1])


def plan_unet(config: Config, objective: Objective, text_width: int) -> Plan:
    """Return what a run of this config would take; raises UserError for what training would refuse."""
    options, facts = config.unet, _facts(config)
    channels, size, length = facts.channels, facts.size, config.text.max_tokens
    objective.natural_shift = facts.natural_shift
    sampler = objective.resolve_sampler(config.sampling.sampler, config.sampling.steps)
    frozen = 0
    try:
        with torch.device("meta"):
            if options.teacher is None:
                unet: Any = create_unet(options, channels, objective.out_channels(channels), text_width)
            else:
                unet = UNet2DConditionModel.from_config(describe_teacher(options.teacher)[0]["config"])
                unet.requires_grad_(False)
                attentions = [part for name, part in unet.named_modules() if name.endswith(".attn1")]
                frozen = sum(weight.numel() for part in attentions for weight in part.parameters())
            if options.mixer == "gspn":
                mount_scans(unet, options).requires_grad_(True)
    except ValueError as error:
        raise UserError(f"unet: {error}") from None
    side = smallest_side(unet, options.patch_size)
    if size % side:
        raise UserError(f"latents of {size}×{size} are not divisible by {side}, as this UNet needs")
    cost, config_of_unet = unet_cost(describe_unet(unet, options), size, size, length), dict(unet.config)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        texts = blank_texts(config_of_unet, batch, length)
        parts = torch.zeros(batch, channels, size, size), torch.zeros(batch), texts.states, texts.mask, texts.pooled
        return tuple(part for part in parts if part is not None)

    parameters = list(unet.parameters())
    total = sum(weight.numel() for weight in parameters)
    trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
    learnt = f", of which {trained:,} are trained to do as {options.teacher} does" if trained < total else ""
    mixer = "scans" if options.mixer == "gspn" else "attention"
    name = config.objective.name
    return Plan(
        model=PlannedUNet(unet, options.patch_size),
        inputs=inputs,
        multiply_adds=cost.multiply_adds,
        images=facts.images,
        data=f"{facts.images:,} captioned images, {gigabytes(facts.bytes)} ({facts.source})",
        rows=[
            ("model", f"UNet with {mixer}, {total:,} parameters{learnt}"),
            ("text", f"{config.text.encoder}, at most {length} tokens of {text_width} channels"),
            ("forward", f"{cost.multiply_adds / 1e9:.4g} G multiply-adds for an image of {channels}×{size}×{size}"),
            ("objective", f"{name}; previews by {sampler} in {config.sampling.steps} steps"),
            *shift_rows(objective),
            *cache_rows(config, facts),
        ],
        blocks=4 * options.layers_per_level + 2,  # residual and transformer blocks of the first, largest level
        working_elements=cost.working_elements,
        frozen_elements=frozen,
    )


def _facts(config: Config) -> DataFacts:
    data = config.data
    if not (data.path and Path(data.path).exists()):
        return unseen_facts(config, COCO_IMAGES, "COCO 2014's training images")
    if data.name == "latents":
        return data_facts(config)
    from gspn_dit.data.latents import create_latent

    images = load_captioned(data, "train").images
    latent = create_latent(config.latent, images.image_size, images.channels)
    size_bytes = len(images) * latent.image_size**2 * latent.image_channels
    written = cache_of(latent, len(images))
    return DataFacts(len(images), 0, latent.channels, latent.size, size_bytes, str(data.path), written)

"""A diffusers UNet that is told a caption: how it is made, described for a checkpoint, called, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from gspn_dit.config import UNetConfig
from gspn_dit.models.flops import attention_multiply_adds, scan_multiply_adds
from gspn_dit.models.unet import GSPNAdapter
from gspn_dit.models.unet_scans import GSPNSelfAttention
from gspn_dit.text import Encoded, TextTable

ADAPTER_OPTIONS = ("variant", "window", "proxy_ratio", "skip", "weight_groups")


def create_unet(options: UNetConfig, in_channels: int, out_channels: int, text_width: int) -> UNet2DConditionModel:
    """Build a UNet in which every level has transformer blocks that see a text; its self-attention is diffusers'.

    Args:
        options: widths and layers.
        in_channels, out_channels: of a latent and of the prediction, before squares of pixels become channels.
        text_width: channels of the text's states.

    Raises:
        ValueError: widths that the heads, or 8 groups of a norm, do not divide.
    """
    widths, head, squares = options.channels, options.head_channels, options.patch_size**2
    groups = math.gcd(*widths, 32)
    if groups < 8 or any(width % head for width in widths):
        raise ValueError(f"unet.channels {widths} must be multiples of 8 and of unet.head_channels {head}")
    return UNet2DConditionModel(
        in_channels=in_channels * squares,
        out_channels=out_channels * squares,
        block_out_channels=tuple(widths),
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        layers_per_block=options.layers_per_level,
        # Diffusers' name misleads: it is the number of heads.
        attention_head_dim=tuple(width // head for width in widths),
        cross_attention_dim=text_width,
        norm_num_groups=groups,
    )


def mount_scans(unet: UNet2DConditionModel, options: UNetConfig) -> GSPNAdapter:
    """Put scans in place of a UNet's self-attention, as a config says; raises ValueError where they do not fit."""
    return GSPNAdapter.create(unet, **{name: getattr(options, name) for name in ADAPTER_OPTIONS}).mount(unet)


def describe_unet(unet: Any, options: UNetConfig) -> dict[str, Any]:
    """Return plain JSON values from which `rebuild_unet` makes the same UNet, without its weights."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    scans = {name: getattr(options, name) for name in ADAPTER_OPTIONS} if options.mixer == "gspn" else None
    return {"name": "UNet", "config": config, "scans": scans, "patch_size": options.patch_size}


def rebuild_unet(description: Mapping[str, Any]) -> UNet2DConditionModel:
    """Build the UNet that `describe_unet` described, with scans where it had some; its weights are random."""
    unet: Any = UNet2DConditionModel.from_config(dict(description["config"]))
    if description["scans"] is not None:
        GSPNAdapter.create(unet, **description["scans"]).mount(unet)
    return unet


@dataclasses.dataclass(frozen=True)
class Captioned:
    """A UNet as the samplers call a model, in which a caption's number in a table stands for a class."""

    unet: nn.Module
    """Perhaps wrapped, by DDP say."""
    table: TextTable
    image_size: int
    """Height and width in pixels, of which UNets such as SDXL's are told."""
    patch_size: int = 1

    def __call__(self, latents: Tensor, timesteps: Tensor, numbers: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Predict from noisy latents [B, C, H, W], timesteps [B] and numbers of captions, int64 [B]."""
        texts = self.table.batch(numbers.cpu()).to(latents.device, latents.dtype)
        return call_unet(self.unet, latents, timesteps, texts, self.patch_size, self.image_size)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the UNet's."""
        return self.unet.parameters()


def call_unet(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, texts: Encoded, patch_size: int, image_size: int
) -> Tensor:
    """Predict [B, out_channels, H, W] from noisy latents [B, C, H, W] and texts.

    `smallest_side` divides H and W. Where texts have pooled states, the UNet is told as well, as SDXL's, that images
    were of so many pixels, not cropped, and are to be of as many (arXiv 2307.01952).
    """
    folded, added = F.pixel_unshuffle(latents, patch_size), None
    if texts.pooled is not None:
        sizes = [image_size, image_size, 0, 0, image_size, image_size]
        added = {"text_embeds": texts.pooled, "time_ids": latents.new_tensor(sizes).expand(len(latents), -1)}
    (output,) = unet(
        folded,
        timesteps,
        texts.states,
        encoder_attention_mask=texts.mask,
        added_cond_kwargs=added,
        return_dict=False,
    )
    return F.pixel_shuffle(output, patch_size)


def pooled_width(config: Mapping[str, Any]) -> int | None:
    """Return the channels of the pooled states that a UNet of this config asks for; None where it asks for none."""
    if config.get("addition_embed_type") != "text_time":
        return None
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]


def blank_texts(config: Mapping[str, Any], batch: int, length: int) -> Encoded:
    """Return zeros of the shape that a UNet of this config asks for, on the default device."""
    width, pooled = config["cross_attention_dim"], pooled_width(config)
    given = None if pooled is None else torch.zeros(batch, pooled)
    return Encoded(torch.zeros(batch, length, width), torch.ones(batch, length, dtype=torch.bool), given)


def smallest_side(unet: Any, patch_size: int = 1) -> int:
    """Return what must divide height and width of a latent, so that a UNet can halve it from level to level."""
    return patch_size * 2 ** (len(unet.config["block_out_channels"]) - 1)


@dataclasses.dataclass(frozen=True)
class UNetCost:
    """What a forward pass of one latent takes."""

    multiply_adds: int
    """Of linear maps, convolutions, attention and scans."""
    working_elements: int
    """Logits and gates of the largest scan, which a backward pass recomputes; 0 without scans."""


def unet_cost(description: Mapping[str, Any], height: int, width: int, text_length: int) -> UNetCost:
    """Count what a UNet takes for a latent of height × width and a text of so many tokens; nothing is computed."""
    products, working = 0, 0

    def count(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        nonlocal products, working
        if isinstance(module, nn.Linear):
            products += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            products += output.numel() * module.weight[0].numel()
        elif isinstance(module, GSPNSelfAttention):
            _, tokens, channels = output.shape
            mixer = module.mixer
            maps = (mixer.to_logits, mixer.to_input_gate, mixer.to_output_gate, mixer.to_skip)
            products += tokens * sum(linear.weight.numel() for linear in maps if linear is not None)
            products += scan_multiply_adds(tokens, channels)
            working = max(working, mixer.working_elements(*kwargs["gspn_grid"]))
        elif isinstance(module, Attention):
            context = kwargs.get("encoder_hidden_states")
            keys = output.shape[1] if context is None else context.shape[1]
            products += attention_multiply_adds(output.shape[1], module.inner_dim) * keys // output.shape[1]

    with torch.device("meta"):
        unet, patch = rebuild_unet(description), description["patch_size"]
        for module in unet.modules():
            module.register_forward_hook(count, with_kwargs=True)
        latents = torch.zeros(1, unet.config["in_channels"] // patch**2, height, width)
        texts = blank_texts(unet.config, 1, text_length)
        with torch.no_grad():
            call_unet(unet, latents, torch.zeros(1), texts, patch, height)
    return UNetCost(products, working)

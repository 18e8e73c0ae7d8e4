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
from gspn_dit.models.text import TextTable
from gspn_dit.models.unet import GSPNAdapter, GSPNSelfAttention

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
    patch_size: int = 1

    def __call__(self, latents: Tensor, timesteps: Tensor, numbers: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Predict from noisy latents [B, C, H, W], timesteps [B] and numbers of captions, int64 [B]."""
        states, mask = (part.to(latents.device) for part in self.table.batch(numbers.cpu()))
        return call_unet(self.unet, latents, timesteps, states.to(latents.dtype), mask, self.patch_size)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the UNet's."""
        return self.unet.parameters()


def call_unet(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, states: Tensor, mask: Tensor, patch_size: int
) -> Tensor:
    """Predict [B, out_channels, H, W] from noisy latents [B, C, H, W], text states [B, L, D] and mask, bool [B, L].

    `smallest_side` divides H and W.
    """
    folded = F.pixel_unshuffle(latents, patch_size)
    (output,) = unet(folded, timesteps, states, encoder_attention_mask=mask, return_dict=False)
    return F.pixel_shuffle(output, patch_size)


def smallest_side(unet: Any, patch_size: int = 1) -> int:
    """Return what must divide height and width of a latent, so that a UNet can halve it from level to level."""
    return patch_size * 2 ** (len(unet.config["block_out_channels"]) - 1)


def unet_multiply_adds(description: Mapping[str, Any], height: int, width: int, text_length: int) -> int:
    """Count the multiply-adds of a forward pass of one latent: linear maps, convolutions, attention and scans."""
    total = 0

    def count(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, GSPNSelfAttention):
            _, tokens, channels = output.shape
            mixer = module.mixer
            maps = (mixer.to_logits, mixer.to_input_gate, mixer.to_output_gate, mixer.to_skip)
            total += tokens * sum(linear.weight.numel() for linear in maps if linear is not None)
            total += scan_multiply_adds(tokens, channels)
        elif isinstance(module, Attention):
            context = kwargs.get("encoder_hidden_states")
            keys = output.shape[1] if context is None else context.shape[1]
            total += attention_multiply_adds(output.shape[1], module.inner_dim) * keys // output.shape[1]

    with torch.device("meta"):
        unet, patch = rebuild_unet(description), description["patch_size"]
        for module in unet.modules():
            module.register_forward_hook(count, with_kwargs=True)
        latents = torch.zeros(1, unet.config["in_channels"] // patch**2, height, width)
        states, mask = torch.zeros(1, text_length, unet.config["cross_attention_dim"]), torch.ones(1, text_length)
        with torch.no_grad():
            call_unet(unet, latents, torch.zeros(1), states, mask.bool(), patch)
    return total

"""What every denoising model shares: signature, embeddings, output, stochastic depth, checkpointing of blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.embeddings import (
    SMOOTH,
    ClassEmbedding,
    ModulatedOutput,
    Modulation,
    TimestepEmbedding,
    patchify,
    sincos_positions,
    unpatchify,
)
from gspn_dit.ops.contract import autocast_dtype


class DiffusionModel(nn.Module, ABC):
    """A class-conditional denoiser: `model(latents, timesteps, class_labels, keep_mask=None, spans=None)`.

    Args:
        num_classes: class ids are 0 … num_classes-1; `num_classes` itself means "no class".
        in_channels: channels of the latent.
        out_channels: channels of the prediction; None for `in_channels`.
        hidden_size: width C.
        patch_size: side of a patch in latent pixels.
        timestep_endpoint: see `TimestepEmbedding`.
        second_time: be told as well how far a step goes, as few-step objectives ask; starts without effect.
        positions: add fixed sines and cosines of the place to the patches, computed for the grid that comes; 4 divides
            hidden_size then.
        grid: rows and columns of patches of a training latent.
        interpolate_positions: squeeze the coordinates of any other grid into the training grid's range.
        stem_conv: add a depthwise 3×3 convolution of the embedded patches to them, once.

    Raises:
        ValueError: a value out of range.
    """

    blocks: nn.ModuleList
    output: ModulatedOutput
    drop_path_rates: list[float]
    """Probability of each block that stochastic depth drops its branch."""
    on_block: Callable[[nn.Module, Tensor], None] | None = None
    """Called with each block and the tokens that it gave, compiled or recomputed as it may be."""
    origin: tuple[dict[str, Any], str] | None = None
    """Manifest of the checkpoint that the weights are from, and which of its weights: "ema" or "model"."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        out_channels: int | None,
        hidden_size: int,
        patch_size: int,
        timestep_endpoint: bool = False,
        second_time: bool = False,
        *,
        positions: bool = False,
        grid: tuple[int, int] = (16, 16),
        interpolate_positions: bool = False,
        stem_conv: bool = False,
    ) -> None:
        super().__init__()
        if positions and hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by 4, which the positions need")
        self.has_positions, self.grid, self.interpolate_positions = positions, grid, interpolate_positions
        self.num_classes, self.patch_size, self.second_time = num_classes, patch_size, second_time
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.gradient_checkpointing = False
        """Keep the inputs of blocks alone, and recompute each block in the backward pass."""
        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.timestep_embed = TimestepEmbedding(
            hidden_size, endpoint=timestep_endpoint, scale=SMOOTH if second_time else 1.0
        )
        self.class_embed = ClassEmbedding(num_classes, hidden_size)
        self.stem = DepthwiseConv(hidden_size, 3, bias=False) if stem_conv else None

    def _finish(self, drop_path_rate: float) -> None:
        """Build what follows the blocks and draw the weights: the last act of a constructor."""
        self.output = ModulatedOutput(self.patch_embed.out_features, self.patch_size, self.out_channels)
        last = max(1, len(self.blocks) - 1)
        self.drop_path_rates = [drop_path_rate * layer / last for layer in range(len(self.blocks))]
        self._initialise()
        if self.second_time:  # last, so that every other weight is that of a model without it
            self.span_embed = TimestepEmbedding(self.patch_embed.out_features, scale=SMOOTH)
            for weight in self.span_embed.mix.parameters():
                nn.init.zeros_(weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.patch_embed.weight.dtype

    @property
    def null_label(self) -> int:
        """The class id that means "no class"."""
        return self.num_classes

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        class_labels: Tensor,
        keep_mask: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy latents.

        Args:
            latents: [B, in_channels, H, W]; the patch size divides H and W.
            timesteps: [B], in [0, 1000].
            class_labels: int64 [B]; `num_classes` means "no class".
            keep_mask: bool [blocks, B], False where stochastic depth drops a sample's branch; None keeps all.
            spans: [B], timesteps minus those that the step leads to, for a model with `second_time`; None for 0.

        Returns:
            [B, out_channels, H, W].
        """
        conditioning = self.timestep_embed(timesteps) + self.class_embed(class_labels)  # [B, C]
        if self.second_time:
            conditioning = conditioning + self.span_embed(torch.zeros_like(timesteps) if spans is None else spans)
        elif spans is not None:
            raise ValueError("spans are given, but the model has no second time; create it with second_time=True")
        tokens = self.transform(self.embed(latents), conditioning, self._branch_scales(keep_mask))
        return unpatchify(self.output(tokens, conditioning), self.patch_size)

    def embed(self, latents: Tensor) -> Tensor:
        """Turn latents [B, in_channels, H, W] into tokens [B, h, w, C], which know their places if they are told."""
        tokens = self.patch_embed(patchify(latents, self.patch_size))
        if self.stem is not None:
            tokens = tokens + self.stem(tokens)
        if self.has_positions:
            tokens = tokens + self.positions(*tokens.shape[1:3]).to(self.patch_embed.weight.dtype)
        return tokens

    def positions(self, height: int, width: int) -> Tensor:
        """Return the positions of a grid of patches, float32 [height, width, C]."""
        weight = self.patch_embed.weight
        rows, columns = (torch.arange(size, device=weight.device, dtype=torch.float32) for size in (height, width))
        if self.interpolate_positions:
            rows, columns = rows * (self.grid[0] / height), columns * (self.grid[1] / width)
        return sincos_positions(rows, columns, weight.shape[0])

    def in_float32(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor, spans: Tensor | None = None
    ) -> Tensor:
        """Predict float32 from float32, whatever the dtype of the weights; float16 and bfloat16 run under autocast."""
        if self.dtype not in (torch.float16, torch.bfloat16):
            latents, timesteps = latents.to(self.dtype), timesteps.to(self.dtype)
            return self(latents, timesteps, class_labels, spans=spans).float()
        with torch.autocast(latents.device.type, self.dtype):
            return self(latents, timesteps, class_labels, spans=spans).float()

    @abstractmethod
    def transform(self, tokens: Tensor, conditioning: Tensor, branch_scales: list[Tensor | None]) -> Tensor:
        """Run the blocks over embedded patches [B, h, w, C], with conditioning [B, C] and a scale [B] per block."""

    def run_block(self, block: nn.Module, tokens: Tensor, *arguments: Any) -> Tensor:
        """Run a block on the residual stream, recomputed in the backward pass where `gradient_checkpointing` is set.

        Under autocast the stream is float32, whatever made the tokens: beside a bfloat16 stream most of a small branch
        would be rounded away.
        """
        if autocast_dtype(tokens.device.type) is not None:
            tokens = tokens.float()
        if self.gradient_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens = block(tokens, *arguments)
        if self.on_block is not None:
            self.on_block(block, tokens)
        return tokens

    def _branch_scales(self, keep_mask: Tensor | None) -> list[Tensor | None]:
        """Return what each block's branch is multiplied by: keep / probability of keeping."""
        if keep_mask is None:
            return [None] * len(self.blocks)
        if keep_mask.shape[0] != len(self.blocks):
            raise ValueError(f"keep_mask has {keep_mask.shape[0]} layers, but the model has {len(self.blocks)} blocks")
        return [mask / (1 - rate) for mask, rate in zip(keep_mask, self.drop_path_rates, strict=True)]

    def _initialise(self) -> None:
        """Xavier for linear maps and small class vectors; what modulates or predicts stays at zero."""
        for module in self.modules():
            if (
                isinstance(module, nn.Linear)
                and not isinstance(module, Modulation)
                and module is not self.output.linear
            ):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)

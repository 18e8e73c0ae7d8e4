"""Depthwise convolutions over channels-last tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is made contiguous: a batched product takes a strided one matrix by matrix."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution over channels-last tokens [B, H, W, C] of the same size."""

    def __init__(self, channels: int, kernel_size: int, bias: bool) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)
        # The layout its gradient has over channels-last tokens; another one makes DDP copy and warn.
        self.to(memory_format=torch.channels_last)

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = tokens.shape[1:3]
        if height * width <= self.weight[0].numel():
            return self._as_matrices(tokens)
        return super().forward(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _as_matrices(self, tokens: Tensor) -> Tensor:
        """Convolve a grid of no more positions than the kernel has taps by one matrix per channel.

        That is no more work, and the convolution's weight gradient is far slower on grids that small.
        """
        batch, height, width, channels = tokens.shape
        size, reach = self.kernel_size[0], self.kernel_size[0] // 2
        rows, columns = (torch.arange(n, device=tokens.device) for n in (height, width))
        down = (rows[:, None] - rows + reach)[:, None, :, None]  # [from row, 1, to row, 1]
        right = (columns[:, None] - columns + reach)[None, :, None, :]
        inside = (down >= 0) & (down < size) & (right >= 0) & (right < size)
        taps = torch.where(inside, down * size + right, size**2).flatten(2).flatten(0, 1)  # [positions, positions]
        matrices = F.pad(self.weight.flatten(1), (0, 1))[:, taps]  # [C, from, to]
        mixed = tokens.flatten(1, 2).permute(2, 0, 1).contiguous() @ matrices.contiguous()  # [C, B, positions]
        if not torch.compiler.is_compiling():  # which lays gradients out itself, and does not trace a custom jvp
            mixed = _ContiguousGradient.apply(mixed)
        if self.bias is not None:
            mixed = mixed + self.bias[:, None, None].to(mixed.dtype)  # autocast's, as the convolution has it
        return mixed.permute(1, 2, 0).reshape(batch, height, width, channels)

"""What a forward pass costs, counted from the shapes of the weights: a model on the meta device will do."""

from __future__ import annotations

from torch import nn

from gspn_dit.models.base import DiffusionModel
from gspn_dit.models.embeddings import Modulation
from gspn_dit.ops import DIRECTIONS


def attention_multiply_adds(tokens: int, channels: int) -> int:
    """Multiply-adds of softmax(QKᵀ)V, all heads together: two products of N × N × C."""
    return 2 * tokens**2 * channels


def scan_multiply_adds(tokens: int, channels: int, directions: int = len(DIRECTIONS)) -> int:
    """Multiply-adds of a scan.

    Six for each token, channel and direction: three neighbours' states by their weights, the input by its gate, the
    state by its gate, the result by its direction's merge weight. Sigmoids and the weights' normalisation are no
    multiply-adds, as a softmax is none.
    """
    return 6 * tokens * channels * directions


def forward_multiply_adds(model: DiffusionModel, latent_height: int, latent_width: int) -> int:
    """Count the multiply-adds of a forward pass of one image: linear maps, convolutions, attention and scans.

    It is what the literature calls "Gflops" (DiT-XL/2 at 32×32: 118.6·10⁹) and half of what torch's counter says.
    Norms, activations, embedding look-ups and additions are left out there as here. A mixer says itself what it costs.

    Args:
        model: on any device; its weights are not read.
        latent_height, latent_width: size of the latent; the patch size divides both.

    Raises:
        ValueError: a size that the patch does not divide.
    """
    patch = model.patch_size
    if latent_height % patch or latent_width % patch:
        raise ValueError(f"a latent of {latent_height}×{latent_width} is not divisible by the patch size {patch}")
    grid, once_per_image = (latent_height // patch, latent_width // patch), {*model.timestep_embed.modules()}

    def count(module: nn.Module) -> int:
        if (cost := getattr(module, "multiply_adds", None)) is not None:  # a mixer
            return cost(*grid)
        own = module.weight.numel() if isinstance(module, (nn.Linear, nn.Conv2d)) else 0
        if not isinstance(module, Modulation) and module not in once_per_image:
            own *= grid[0] * grid[1]  # convolutions keep the size of the grid
        return own + sum(map(count, module.children()))

    return count(model)

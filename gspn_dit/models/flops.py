"""What a forward pass costs, counted from the shapes of the weights: a model on the meta device will do."""

from __future__ import annotations

from collections.abc import Callable

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
    grid = (latent_height // patch, latent_width // patch)
    of_times = [model.timestep_embed, model.span_embed] if model.second_time else [model.timestep_embed]
    once_per_image = {module for embedding in of_times for module in embedding.modules()}
    return grid_multiply_adds(model, *grid, once=lambda part: isinstance(part, Modulation) or part in once_per_image)


def grid_multiply_adds(
    module: nn.Module, height: int, width: int, once: Callable[[nn.Module], bool] = lambda part: False
) -> int:
    """Count the multiply-adds of a module whose maps and convolutions all run on a grid of height × width tokens.

    A part that has a method `multiply_adds(height, width)`, as mixers do, says itself what it costs; linear maps for
    which `once` is true run once per image.
    """

    def count(part: nn.Module) -> int:
        if part is not module and (cost := getattr(part, "multiply_adds", None)) is not None:
            return cost(height, width)
        own = part.weight.numel() if isinstance(part, (nn.Linear, nn.Conv2d)) else 0
        times = 1 if once(part) else height * width
        return own * times + sum(map(count, part.children()))

    return count(module)

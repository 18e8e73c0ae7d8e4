"""Denoising models behind one signature: `model(latents, timesteps, class_labels, keep_mask=None)`."""

from __future__ import annotations

from typing import Any

from gspn_dit.models.gspn import GSPNTransformer
from gspn_dit.models.presets import GSPN_PRESETS, parse_name

__all__ = ["GSPN_PRESETS", "GSPNTransformer", "create_model"]


def create_model(
    name: str,
    num_classes: int,
    latent_channels: int,
    latent_size: int | tuple[int, int],
    out_channels: int | None = None,
    **overrides: Any,
) -> GSPNTransformer:
    """Build a model by preset and patch size, such as "GSPN-B/2".

    Args:
        name: size and patch, see `GSPN_PRESETS`.
        num_classes: number of classes; `num_classes` itself is the id that means "no class".
        latent_channels: channels of the latent.
        latent_size: height and width of the latent (one int if square); the patch size must divide them.
        out_channels: channels of the prediction; None for `latent_channels` (velocity).
        overrides: `hidden_size`, `depth`, `weight_groups`, `scan_window`, `drop_path_rate`; None keeps the preset's.

    Raises:
        ValueError: an unknown name or override, a size that the patch does not divide, or a value out of range.
    """
    size, patch_size = parse_name(name)
    preset = GSPN_PRESETS[size]
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"a latent of {height}×{width} is not divisible by the patch size {patch_size} of model '{name}'; "
            f"choose another image size or another patch, such as GSPN-{size}/1"
        )
    options: dict[str, Any] = {"hidden_size": preset.hidden_size, "depth": preset.depth}
    options.update({key: value for key, value in overrides.items() if value is not None})
    allowed = {"hidden_size", "depth", "weight_groups", "scan_window", "drop_path_rate"}
    if unknown := sorted(set(options) - allowed):
        raise ValueError(f"unknown model option '{unknown[0]}'; allowed are {', '.join(sorted(allowed))}")
    return GSPNTransformer(num_classes, latent_channels, out_channels, patch_size=patch_size, **options)

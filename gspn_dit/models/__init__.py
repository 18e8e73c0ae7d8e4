"""Denoising models behind one signature: `model(latents, timesteps, class_labels, keep_mask=None, spans=None)`.

The classes are imported on first use, so that command lines answer --help before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gspn_dit.models.presets import DIT_PRESETS, GSPN2_PRESETS, GSPN_PRESETS, parse_name, preset_options

if TYPE_CHECKING:
    from gspn_dit.models.base import DiffusionModel
    from gspn_dit.models.dit import DiT
    from gspn_dit.models.gspn import GSPNTransformer

__all__ = ["DIT_PRESETS", "GSPN2_PRESETS", "GSPN_PRESETS", "DiT", "DiffusionModel", "GSPNTransformer", "create_model"]

_HOMES = {
    "DiT": "gspn_dit.models.dit",
    "DiffusionModel": "gspn_dit.models.base",
    "GSPNTransformer": "gspn_dit.models.gspn",
}
_OF_BOTH = (
    "depth",
    "drop_path_rate",
    "hidden_size",
    "mixer",
    "num_heads",
    "second_time",
    "lpu",
    "stem_conv",
    "norm",
    "mlp_ratio",
    "positions",
    "interpolate_positions",
    "attention_every",
    "conv_every",
    "scan_global_every",
)
_OF_DIT = (*_OF_BOTH, "mlp", "mlp_norm_epsilon", "timestep_endpoint")
_OPTIONS = {
    "GSPN": (*_OF_BOTH, "long_skips", "conditioning", "gate_norm"),
    "DiT": _OF_DIT,
    "GSPN2": _OF_DIT,
}
"""Of each family; those of its mixers come on top."""


def _options_by_family() -> dict[str, list[str]]:
    from gspn_dit.models.mixers import MIXERS, option_names

    of_mixers = [name for mixer in MIXERS for name in option_names(mixer)]
    return {family: list(dict.fromkeys([*own, *of_mixers])) for family, own in _OPTIONS.items()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gspn_dit.models' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def create_model(
    name: str,
    num_classes: int,
    latent_channels: int,
    latent_size: int | tuple[int, int],
    out_channels: int | None = None,
    **overrides: Any,
) -> DiffusionModel:
    """Build a model by family, size and patch, such as "GSPN-B/2" or "DiT-XL/2".

    Args:
        name: see `GSPN_PRESETS`, `GSPN2_PRESETS` and `DIT_PRESETS`; any patch size.
        num_classes: number of classes; `num_classes` itself is the id that means "no class".
        latent_channels: channels of the latent.
        latent_size: height and width of the latent (one int if square); the patch size must divide them.
        out_channels: channels of the prediction; None for `latent_channels` (velocity).
        overrides: `hidden_size`, `depth`, `drop_path_rate`, `second_time`, `mixer` (of `MIXERS`; by default "attention"
            for DiT, "gspn" for the others), its options, `num_heads`, `lpu`, `positions` and what else all families
            share; for GSPN also `long_skips`, `gate_norm` and `conditioning` ("additive", the default, or
            "adaln-zero"); for the others also `mlp` and the rest of `DiT`'s. None keeps the preset's.

    Raises:
        ValueError: an unknown name or override, a size that the patch does not divide, or a value out of range.
    """
    family, size, patch_size = parse_name(name)
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"a latent of {height}×{width} is not divisible by the patch size {patch_size} of model '{name}'; "
            f"choose another image size or another patch, such as {family}-{size}/1"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    allowed = _options_by_family()
    if unknown := sorted(set(given) - set(allowed[family])):
        other = next((other for other, options in allowed.items() if unknown[0] in options), None)
        if other:
            raise ValueError(f"{unknown[0]} is an option of {other} models, but the model is {name}; leave it out")
        raise ValueError(f"unknown model option '{unknown[0]}'; allowed are {', '.join(allowed[family])}")
    options: dict[str, Any] = {**preset_options(family, size), **given, "patch_size": patch_size}
    if "proxy_ratio" in given and "proxy_channels" not in given:
        options.pop("proxy_channels", None)  # a preset's own
    options["grid"] = (height // patch_size, width // patch_size)
    if family == "GSPN":
        from gspn_dit.models.gspn import GSPNTransformer

        return GSPNTransformer(num_classes, latent_channels, out_channels, **options)
    from gspn_dit.models.dit import DiT

    return DiT(num_classes, latent_channels, out_channels, **options)

"""The options that sample.py and `gspn_dit.generate` share: declared, explained and checked once, without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gspn_dit.errors import ArgumentParser, UserError
from gspn_dit.paths import path_argument


def check_guidance(
    scale: float,
    interval: Sequence[float],
    channels: int | None,
    *,
    prefix: str = "guidance ",
    form: str = "within",
    every: str = "at least 1, or none for all",
) -> None:
    """Raise ValueError for guidance out of range: the one place of its limits.

    Args:
        scale: 1 is no guidance.
        interval: times t at which it acts, (low, high).
        channels: the first channels alone, None for all.
        prefix: what the three are called, up to their last word.
        form: how an interval is written.
        every: what channels can be.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{prefix}interval is {list(interval)}, but must be {form} 0 ≤ low ≤ high ≤ 1")
    if not 0 <= scale < float("inf"):
        raise ValueError(f"{prefix}scale is {scale}, but must be at least 0 and finite")
    if channels is not None and channels < 1:
        raise ValueError(f"{prefix}channels is {channels}, but must be {every}")


def check_sampling_shift(shift: float | None, name: str) -> None:
    """Raise ValueError for a shift of times that is not a finite number above 0; None leaves it to the objective."""
    if shift is not None and not 0 < shift < float("inf"):
        raise ValueError(f"{name} is {shift}, but must be finite and above 0 (1: times are not shifted)")


def check_guided_channels(channels: int | None, latent_channels: int, name: str) -> None:
    """Raise UserError where more channels shall be guided than a latent has; `name` is the key or option."""
    if channels is not None and channels > latent_channels:
        raise UserError(f"{name} is {channels}, but the latent has {latent_channels} channels")


def add_sampling_options(
    parser: ArgumentParser,
    *,
    guidance_scale: float,
    classes: str | None = None,
    weights: str | None = None,
    steps: int | None = None,
    otherwise: str = "",
    checkpoint: str = "",
) -> None:
    """Add the options to a parser whose help shows defaults by their words alone.

    A default of None is filled in later; `otherwise` says by what, and `checkpoint` where one comes from if none is
    given; empty: it must be given.
    """
    add, default = parser.add_argument, f" (default: {checkpoint})" if checkpoint else ""
    add("--checkpoint", required=not checkpoint, type=path_argument, metavar="DIR",
        help=f"run directory, one checkpoint, or builtin:digits{default}")  # fmt: skip
    add("--classes", default=classes, help="ids, ranges and names: 0-9, or 3,7,cat (default: all)")
    add("--weights", choices=("ema", "model"), default=weights, help="(default: ema)")
    add("--vae", type=path_argument, metavar="NAME_OR_DIR",
        help="where the autoencoder of the latents lies now, if moved")  # fmt: skip
    add("--steps", type=int, default=steps, help=f"of the sampler (default: {otherwise}50)")
    add("--sampler", help="velocity: euler, heun, dpm++ or sde; epsilon: ddpm, ddim, dpm++ or unipc; flow_map "
        f"and mean_flow: euler (default: {otherwise}the first of the checkpoint's objective)")  # fmt: skip
    add("--sampling-shift", type=float, metavar="S",
        help="times t become S·t / (1 + (S-1)·t); not of epsilon (default: the checkpoint's)")  # fmt: skip
    add("--guidance-scale", type=float, default=guidance_scale,
        help=f"1 is no guidance (default: {guidance_scale:g})")  # fmt: skip
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="times t (1 is noise, 0 data) at which guidance acts (default: 0 1)")  # fmt: skip
    add("--guidance-channels", default="all", metavar="all|N",
        help="guide the first N channels alone, as DiT's published figures do with 3 (default: all)")  # fmt: skip
    add("--guide-checkpoint", type=path_argument, metavar="DIR",
        help="guide away from this weaker model (autoguidance) instead of the model without class")  # fmt: skip
    add("--seed", type=int, default=0, help="image i depends on (seed, i) (default: 0)")
    add("--device", help="cpu, cuda, … (default: the accelerator if there is one, else cpu)")


def parse_size(text: str, key: str) -> tuple[int, int]:
    """Return height and width of "HxW"; raises ValueError, which names the key, for anything else.

    >>> parse_size("24x40", "--size")
    (24, 40)
    """
    height, by, width = text.lower().replace("×", "x").partition("x")
    if not (by and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"{key} is {text}, but must be HEIGHTxWIDTH in pixels, such as 24x40")
    return int(height), int(width)


def check_sampling_options(options: argparse.Namespace, *counts: str) -> None:
    """Check what can be checked without the checkpoint; `counts` are further numbers of at least 1.

    Raises UserError.
    """
    for name in (*counts, "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}, but must lie in [0, 2^63)")
    text = options.guidance_channels
    if text != "all" and (not text.isdecimal() or int(text) < 1):
        raise UserError(f"--guidance-channels is {text}, but must be all or a number of at least 1")
    options.guidance_channels = None if text == "all" else int(text)
    try:
        check_guidance(options.guidance_scale, options.guidance_interval, options.guidance_channels)
        check_sampling_shift(options.sampling_shift, "--sampling-shift")
    except ValueError as error:
        raise UserError(str(error)) from None


def memory_advice(chunk: int, device: object) -> str:
    """Say what helps where memory runs out while `chunk` images are generated at a time."""
    return (
        f"{chunk} images are generated at a time on {device}, however many are asked for; make room there, or take "
        "another --device or fewer processes"
    )


def choose_device(name: str | None) -> str:
    """Return the device of that name, or the accelerator if there is one; raises UserError for one not here."""
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator()
        return str(accelerator) if accelerator and torch.accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name

"""What is asked of `generate_highres`: checked before anything is drawn, encoded, and told from other requests."""

from __future__ import annotations

import hashlib
import json
import math
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn_dit.files import cannot_hold
from gspn_dit.models.scans import GSPNMixer

SAMPLED = 64
"""Elements of a weight, evenly spaced, by which another one is noticed: a training step moves them all."""


@dataclass(frozen=True)
class Stage:
    """A size in pixels, and how much of the noise schedule is run there: 1 is all of it, from pure noise."""

    height: int
    width: int
    strength: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it is contrasted with, encoded; each is what the UNet is called with."""

    positive: dict[str, Any]
    negative: dict[str, Any] | None


def latent_factor(pipe: Any) -> int:
    """Return the pixels along a side of which a pipeline's autoencoder makes one latent pixel."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


# -- checks ----------------------------------------------------------------------------------------------------------


def check_stages(pipe: Any, stages: Sequence[Stage | tuple[float, ...]]) -> list[Stage]:
    """Return the stages; raise ValueError, in one line, for what the pipeline cannot draw."""
    for part in ("unet", "vae", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise ValueError(f"a {type(pipe).__name__} has no {part}; give a Stable Diffusion pipeline")
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise ValueError(f"stages is {stages!r}; give a list of (height, width) and then (height, width, strength)")
    checked = [_as_stage(number, given) for number, given in enumerate(stages, 1)]
    if not checked:
        raise ValueError("stages is empty; give (height, width) and then (height, width, strength), in pixels")
    least = latent_factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for number, stage in enumerate(checked):
        size = f"stage {number + 1} of {stage.height}x{stage.width} pixels"
        if stage.height < least or stage.width < least or stage.height % least or stage.width % least:
            raise ValueError(f"{size} is not divisible by {least}, as this pipeline's autoencoder and UNet need")
        if not (stage.strength == 1 if number == 0 else 0 < stage.strength < 1):
            needed = "1, since it starts from noise" if number == 0 else "above 0 and below 1"
            raise ValueError(f"{size} has strength {stage.strength:g}, but must have {needed}")
    return checked


def _as_stage(number: int, given: Any) -> Stage:
    values = (given.height, given.width, given.strength) if isinstance(given, Stage) else given
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) not in (2, 3):
        raise ValueError(f"stage {number} is {given!r}; give (height, width) or (height, width, strength)")
    height, width, *rest = values
    if not (_is_whole(height) and _is_whole(width)):
        raise ValueError(f"stage {number} is {given!r}, but height and width must be whole numbers of pixels")
    strength = rest[0] if rest else 1.0
    if not isinstance(strength, Real) or isinstance(strength, bool):
        raise ValueError(f"stage {number} has strength {strength!r}, but must have a number")
    return Stage(int(height), int(width), float(strength))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_numbers(steps: Any, scale: Any, seed: Any) -> None:
    """Raise ValueError, in one line, for steps, guidance scale or seed that no sampler takes."""
    if not _is_whole(steps) or steps < 1:
        raise ValueError(f"num_inference_steps is {steps!r}, but must be a whole number of at least 1")
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale is {scale!r}, but must be a finite number; 1 is no guidance")
    if not _is_whole(seed):
        raise ValueError(f"seed is {seed!r}, but must be a whole number")


def check_places(out: Path, work_dir: Path) -> None:
    """Raise ValueError, in one line, where the image or the latents could not be written, hours later."""
    if out.is_dir():
        raise ValueError(f"out {out} is a directory; give a file")
    if mimetypes.guess_type(out.name)[0] not in (None, "image/png"):
        raise ValueError(f"out {out}: the image is a PNG; give a name that ends in .png")
    if work_dir.exists() and not work_dir.is_dir():
        raise ValueError(f"work_dir {work_dir} is a file; give a directory")
    for place in (out, work_dir):
        if problem := cannot_hold(place):
            raise ValueError(f"cannot write the image: {problem}")


# -- texts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    pipe: Any, prompt: str | None, negative: str | None, given: Mapping[str, Tensor | None], guided: bool
) -> Prompt:
    """Return the states that the pipeline's own `encode_prompt` gives, or those that are given.

    A negative prompt of None is what diffusers makes of it: SDXL's zeros, or the empty prompt.
    """
    if given["positive"] is not None:
        if dict(pipe.unet.config).get("addition_embed_type") == "text_time":
            raise ValueError("prompt_embeds do not do for SDXL, whose UNet needs pooled states, too; give prompt")
        if guided and given["negative"] is None:
            raise ValueError(
                "guidance needs negative_prompt_embeds beside prompt_embeds; give them, or guidance_scale=1"
            )
        states = [given["positive"], given["negative"]]
        pooled: list[Any] = [None, None]
    elif not isinstance(prompt, str | None):
        raise ValueError(f"prompt is {prompt!r}, but must be one text")
    elif prompt is None or not prompt.strip():
        raise ValueError("prompt is empty; say what to draw, or give prompt_embeds")
    elif getattr(pipe, "text_encoder_2", None) is not None:
        encoded = pipe.encode_prompt(prompt, negative_prompt=negative, do_classifier_free_guidance=guided)
        states, pooled = list(encoded[:2]), list(encoded[2:])
    else:
        states = list(pipe.encode_prompt(prompt, pipe.unet.device, 1, guided, negative_prompt=negative))
        pooled = [None, None]
    sides = [{"encoder_hidden_states": state, "pooled": extra} for state, extra in zip(states, pooled, strict=True)]
    return Prompt(sides[0], sides[1] if guided else None)


# -- which request it is ---------------------------------------------------------------------------------------------


def fingerprint(pipe: Any, given: Mapping[str, Any]) -> str:
    """Return a digest of all that the latents of a stage depend on, beside the stages.

    Args:
        pipe: whose scheduler, UNet (its scans and LoRA layers included) and text encoders count.
        given: the arguments of `generate_highres`: plain values, and tensors.
    """
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    facts = {
        "given": {k: _digest([v], None) if isinstance(v, Tensor) else v for k, v in given.items()},
        "factor": latent_factor(pipe),
        "scheduler": [type(pipe.scheduler).__name__, _plain_config(pipe.scheduler)],
        "unet": [_plain_config(pipe.unet), _digest(pipe.unet.parameters(), SAMPLED)],
        "windows": [module.window for module in pipe.unet.modules() if isinstance(module, GSPNMixer)],
        "lora": [_lora_state(module) for module in pipe.unet.modules() if hasattr(module, "base_layer")],
        "encoders": [_digest(encoder.parameters(), SAMPLED) for encoder in encoders if encoder is not None],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _plain_config(part: Any) -> dict[str, Any]:
    """Return a config without what says where it is from."""
    return {key: value for key, value in dict(getattr(part, "config", {})).items() if not key.startswith("_")}


def _lora_state(layer: Any) -> list[Any]:
    """Return what switches and scales a LoRA layer of peft, which are no weights."""
    return [getattr(layer, name, None) for name in ("scaling", "active_adapters", "disable_adapters")]


def _digest(tensors: Iterable[Tensor], sampled: int | None) -> str:
    """Return a digest of tensors: of so many elements of each, evenly spaced, or of all."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // sampled)] if sampled else flat
        found.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

"""Staged generation (SDEdit, arXiv 2108.01073): each stage enlarges the latents, adds noise and denoises them again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from gspn_dit.diffusion.sampling import draw_noise, draw_step_noise
from gspn_dit.diffusion.schedulers import step_noise_options
from gspn_dit.files import write_atomically
from gspn_dit.highres.decode import TILE, decode_rows, write_png
from gspn_dit.highres.memory import measure, on_meta

FEED_FORWARD_TOKENS = 16_384
"""Tokens that a feed-forward layer, whose inner width is four times or eight times the model's, takes at a time."""
SCRATCH = 2.0
"""What is held at most, over what operators return: kernels keep copies of their inputs in layouts of their own."""
BASE_BYTES = 1 << 30
"""Interpreter, libraries and the rows of pixels that are being written."""


@dataclass(frozen=True)
class Stage:
    """A size in pixels, and how much of the noise schedule is run there: 1 is all of it, from pure noise."""

    height: int
    width: int
    strength: float = 1.0


@dataclass(frozen=True)
class _Prompt:
    """A prompt and what it is contrasted with, encoded; each is what the UNet is called with."""

    positive: dict[str, Any]
    negative: dict[str, Any] | None


def generate_highres(
    pipe: Any,
    prompt: str | None = None,
    stages: Sequence[Stage | tuple[float, ...]] = (),
    *,
    out: str | Path = "image.png",
    negative_prompt: str = "",
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    work_dir: str | Path | None = None,
) -> Path:
    """Draw an image of any size with a Stable Diffusion pipeline whose self-attention scans have taken the place of.

    The memory that the largest stage needs is printed beforehand. The halves of guidance run one after the other, the
    feed-forward layers over some tokens at a time, and the autoencoder decodes tiles, row by row, into the file. The
    latents of each stage are kept in `work_dir`; a call with the same arguments goes on after the last one.

    Args:
        pipe: with `unet`, `vae`, `scheduler` and `encode_prompt`: Stable Diffusion 1.x, 2.x or XL.
        prompt: what to draw.
        stages: (height, width, strength) in pixels; the first from noise, those after it with a strength below 1.
        out: the PNG file.
        negative_prompt: what guidance leads away from.
        prompt_embeds, negative_prompt_embeds: [1, L, D] instead of the texts, for a pipeline without pooled states.
        num_inference_steps: of the whole schedule; a stage takes its strength's share.
        guidance_scale: 1 is no guidance.
        seed: the noise of stage i depends on (seed, i).
        work_dir: for the latents; None for `out` with `.stages` behind.

    Returns:
        The file.

    Raises:
        ValueError: sizes that the pipeline cannot draw, strengths out of range, or latents that are not finite.
    """
    checked = _check(pipe, stages)
    given = {"positive": prompt_embeds, "negative": negative_prompt_embeds}
    encoded = _encode(pipe, prompt, negative_prompt, given, guidance_scale > 1)
    _announce_memory(pipe, checked, encoded.positive)
    out = Path(out)
    folder = Path(work_dir) if work_dir is not None else out.with_name(out.name + ".stages")
    settings = [prompt, negative_prompt, num_inference_steps, guidance_scale, seed, _weights_print(pipe.unet)]
    latents: Tensor | None = None
    with chunked_feed_forward(pipe.unet):
        for number, stage in enumerate(checked):
            file = folder / _file_name(settings, checked[: number + 1])
            if file.exists():
                latents = load_file(file)["latents"]
                continue
            drawn = (seed, number)
            latents = _run_stage(pipe, stage, latents, drawn, encoded, num_inference_steps, guidance_scale)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save({"latents": latents.contiguous().cpu()}))
    assert latents is not None
    write_png(out, decode_rows(pipe.vae, latents, _factor(pipe)), checked[-1].height, checked[-1].width)
    return out


def _file_name(settings: Sequence[Any], stages: Sequence[Stage]) -> str:
    """Return what the latents of the last stage are called: they depend on the stages before it, too."""
    number, stage = len(stages) - 1, stages[-1]
    facts = json.dumps([*settings, *(asdict(one) for one in stages)])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return f"{number}-{stage.height}x{stage.width}-{digest}.safetensors"


# -- what is asked for -----------------------------------------------------------------------------------------------


def _factor(pipe: Any) -> int:
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def _check(pipe: Any, stages: Sequence[Stage | tuple[float, ...]]) -> list[Stage]:
    """Return the stages; raise ValueError, in one line, for what cannot be drawn."""
    for part in ("unet", "vae", "scheduler"):
        if getattr(pipe, part, None) is None:
            raise ValueError(f"a {type(pipe).__name__} has no {part}; give a Stable Diffusion pipeline")
    checked = [one if isinstance(one, Stage) else Stage(int(one[0]), int(one[1]), *one[2:]) for one in stages]
    if not checked:
        raise ValueError("stages is empty; give (height, width) and then (height, width, strength), in pixels")
    least = _factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    for number, stage in enumerate(checked):
        size = f"stage {number + 1} of {stage.height}x{stage.width} pixels"
        if stage.height < least or stage.width < least or stage.height % least or stage.width % least:
            raise ValueError(f"{size} is not divisible by {least}, as this pipeline's autoencoder and UNet need")
        if not (stage.strength == 1 if number == 0 else 0 < stage.strength < 1):
            needed = "1, since it starts from noise" if number == 0 else "above 0 and below 1"
            raise ValueError(f"{size} has strength {stage.strength:g}, but must have {needed}")
    return checked


def _encode(pipe: Any, prompt: str | None, negative: str, given: Mapping[str, Tensor | None], guided: bool) -> _Prompt:
    if given["positive"] is not None:
        if guided and given["negative"] is None:
            raise ValueError(
                "guidance needs negative_prompt_embeds beside prompt_embeds; give them, or guidance_scale=1"
            )
        states = [given["positive"], given["negative"]]
        pooled: list[Any] = [None, None]
    elif prompt is None or not prompt.strip():
        raise ValueError("prompt is empty; say what to draw, or give prompt_embeds")
    elif getattr(pipe, "text_encoder_2", None) is not None:
        encoded = pipe.encode_prompt(prompt, negative_prompt=negative, do_classifier_free_guidance=guided)
        states, pooled = list(encoded[:2]), list(encoded[2:])
    else:
        states = list(pipe.encode_prompt(prompt, pipe.unet.device, 1, guided, negative_prompt=negative))
        pooled = [None, None]
    sides = [{"encoder_hidden_states": state, "pooled": extra} for state, extra in zip(states, pooled, strict=True)]
    return _Prompt(sides[0], sides[1] if guided else None)


def _arguments(side: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return what the UNet is called with beside latents and timestep; SDXL is told the size, too."""
    states, pooled = side["encoder_hidden_states"], side["pooled"]
    if pooled is None:
        return {"encoder_hidden_states": states}
    size = [stage.height, stage.width, 0, 0, stage.height, stage.width]
    time_ids = torch.tensor([size], dtype=states.dtype, device=states.device)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def _weights_print(unet: torch.nn.Module) -> list[float]:
    """Return some sums by which other weights are noticed."""
    return [float(parameter.detach().float().sum()) for parameter in list(unet.parameters())[::16]]


# -- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def chunked_feed_forward(unet: torch.nn.Module, tokens: int = FEED_FORWARD_TOKENS) -> Iterator[None]:
    """Let the feed-forward layers of a UNet's transformers take some tokens at a time; the result is the same."""
    layers: list[Any] = [m.ff for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]

    def in_chunks(layer: Any) -> Any:
        whole = layer.forward

        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if states.shape[1] <= tokens:
                return whole(states, *args, **kwargs)
            result = torch.empty_like(states)
            for start in range(0, states.shape[1], tokens):
                part = slice(start, start + tokens)
                result[:, part] = whole(states[:, part], *args, **kwargs)
            return result

        return forward

    for layer in layers:
        layer.forward = in_chunks(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def memory_bound(pipe: Any, stage: Stage, side: dict[str, Any]) -> int:
    """Return how many bytes drawing a stage takes at most: what operators return on the meta device, and some more."""
    factor, meta = _factor(pipe), torch.device("meta")
    unet, vae = on_meta(pipe.unet), on_meta(pipe.vae)
    shapes = {name: None if value is None else value.to(meta) for name, value in side.items()}
    latents = torch.empty(1, unet.config.in_channels, stage.height // factor, stage.width // factor, device=meta)
    latents = latents.to(pipe.unet.dtype)

    def denoise() -> None:
        with chunked_feed_forward(unet):
            unet(latents, torch.zeros((), device=meta), **_arguments(shapes, stage))

    tile = torch.empty(1, vae.config.latent_channels, TILE, TILE, device=meta, dtype=pipe.vae.dtype)
    held = max(measure(denoise).peak_bytes, measure(lambda: vae.decode(tile)).peak_bytes)
    modules = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, torch.nn.Module)]
    modules = modules or [pipe.unet, pipe.vae]
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    band = 2 * TILE * factor * stage.width * 3 * 4
    return weights + int(SCRATCH * held) + 6 * latents.numel() * latents.element_size() + band + BASE_BYTES


def _announce_memory(pipe: Any, stages: Sequence[Stage], side: dict[str, Any]) -> None:
    largest = max(stages, key=lambda stage: stage.height * stage.width)
    bound = memory_bound(pipe, largest, side)
    size = f"{largest.height}x{largest.width} pixels"
    print(f"{size}: at most {bound / 1e9:.2f} GB of memory, weights included", flush=True)


# -- one stage -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run_stage(
    pipe: Any,
    stage: Stage,
    before: Tensor | None,
    drawn: tuple[int, int],
    prompt: _Prompt,
    steps: int,
    scale: float,
) -> Tensor:
    """Return the latents of a stage [1, C, h, w], from those of the one before; `drawn` is seed and stage number."""
    (seed, number), factor = drawn, _factor(pipe)
    shape = (pipe.unet.config.in_channels, stage.height // factor, stage.width // factor)
    noise = draw_noise(seed, [number], shape).to(pipe.unet.device, pipe.unet.dtype)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps, device=noise.device)
    timesteps = scheduler.timesteps
    if before is None:
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        first = len(timesteps) - max(1, round(stage.strength * len(timesteps)))
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        enlarged = F.interpolate(before.to(noise), size=noise.shape[-2:], mode="bicubic", align_corners=False)
        latents = _add_noise(scheduler, enlarged, noise, timesteps[:1])
    random = step_noise_options(
        scheduler, seed, [number], lambda step: draw_step_noise(seed, [number], shape, step).to(noise)
    )
    for step, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        prediction = pipe.unet(scaled, timestep, **_arguments(prompt.positive, stage)).sample
        if prompt.negative is not None:
            other = pipe.unet(scaled, timestep, **_arguments(prompt.negative, stage)).sample
            prediction = other + scale * (prediction - other)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **random(step))[0]
    return latents


def _add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else None
    return scheduler.add_noise(latents, noise, timestep) if add is None else add(latents, timestep, noise)

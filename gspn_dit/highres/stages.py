"""Staged generation (SDEdit, arXiv 2108.01073): each stage enlarges the latents, adds noise and denoises them again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from gspn_dit.diffusion.sampling import draw_noise, draw_step_noise
from gspn_dit.diffusion.schedulers import step_noise_options
from gspn_dit.files import write_atomically
from gspn_dit.highres.decode import TILE, decode_rows, refuse_diverged, upcast, write_png
from gspn_dit.highres.memory import measure, on_meta
from gspn_dit.highres.request import (
    Prompt,
    Stage,
    check_numbers,
    check_places,
    check_stages,
    encode,
    fingerprint,
    latent_factor,
)

FEED_FORWARD_TOKENS = 16_384
"""Tokens that a feed-forward layer, whose inner width is four times or eight times the model's, takes at a time."""
SCRATCH = 2.0
"""What is held at most, over what operators return: kernels keep copies of their inputs in layouts of their own."""
BASE_BYTES = 1 << 30
"""Interpreter, libraries and the rows of pixels that are being written."""


def generate_highres(
    pipe: Any,
    prompt: str | None = None,
    stages: Sequence[Stage | tuple[float, ...]] = (),
    *,
    out: str | Path = "image.png",
    negative_prompt: str | None = None,
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
    latents of each stage are kept in `work_dir`; a call with the same arguments, scheduler and weights goes on after
    the last one.

    Args:
        pipe: with `unet`, `vae`, `scheduler` and `encode_prompt`: Stable Diffusion 1.x, 2.x or XL.
        prompt: what to draw.
        stages: (height, width, strength) in pixels; the first from noise, those after it with a strength below 1.
        out: the PNG file.
        negative_prompt: what guidance leads away from; None for no prompt, which is zeros for SDXL as in diffusers.
        prompt_embeds, negative_prompt_embeds: [1, L, D] instead of the texts, for a pipeline without pooled states.
        num_inference_steps: of the whole schedule; a stage takes its strength's share.
        guidance_scale: 1 is no guidance.
        seed: the noise of stage i depends on (seed, i).
        work_dir: for the latents; None for `out` with `.stages` behind.

    Returns:
        The file.

    Raises:
        ValueError: sizes that the pipeline cannot draw, numbers out of range, a place that cannot be written to, or
            latents or pixels that are not finite.
    """
    out = Path(out)
    folder = Path(work_dir) if work_dir is not None else out.with_name(out.name + ".stages")
    checked = check_stages(pipe, stages)
    check_numbers(num_inference_steps, guidance_scale, seed)
    check_places(out, folder)
    embeds = {"positive": prompt_embeds, "negative": negative_prompt_embeds}
    encoded = encode(pipe, prompt, negative_prompt, embeds, guidance_scale > 1)
    _announce_memory(pipe, checked, encoded.positive)
    texts = {"prompt": prompt, "negative_prompt": negative_prompt, **embeds}
    request = fingerprint(pipe, {**texts, "steps": num_inference_steps, "scale": guidance_scale, "seed": seed})
    latents: Tensor | None = None
    with chunked_feed_forward(pipe.unet):
        for number, stage in enumerate(checked):
            file = folder / _file_name(request, checked[: number + 1])
            if file.exists():
                latents = load_file(file)["latents"]
                continue
            drawn = (seed, number)
            latents = _run_stage(pipe, stage, latents, drawn, encoded, num_inference_steps, guidance_scale)
            refuse_diverged(latents)  # before they are kept: the next call would find them again
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save({"latents": latents.contiguous().cpu()}))
    assert latents is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_png(out, decode_rows(pipe.vae, latents, latent_factor(pipe)), checked[-1].height, checked[-1].width)
    return out


def _file_name(request: str, stages: Sequence[Stage]) -> str:
    """Return what the latents of the last stage are called: they depend on the stages before it, too."""
    number, stage = len(stages) - 1, stages[-1]
    facts = json.dumps([request, *(asdict(one) for one in stages)])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return f"{number}-{stage.height}x{stage.width}-{digest}.safetensors"


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
    factor, meta = latent_factor(pipe), torch.device("meta")
    unet, vae = on_meta(pipe.unet), on_meta(pipe.vae)
    shapes = {name: None if value is None else value.to(meta) for name, value in side.items()}
    latents = torch.empty(1, unet.config.in_channels, stage.height // factor, stage.width // factor, device=meta)
    latents = latents.to(pipe.unet.dtype)

    def denoise() -> None:
        with chunked_feed_forward(unet):
            unet(latents, torch.zeros((), device=meta), **_arguments(shapes, stage))

    held, stored = measure(denoise).peak_bytes, _weight_bytes([vae])
    with upcast(vae):
        tile = torch.empty(1, vae.config.latent_channels, TILE, TILE, device=meta, dtype=vae.dtype)
        held = max(held, measure(lambda: vae.decode(tile)).peak_bytes)
        added = _weight_bytes([vae]) - stored
    modules = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, torch.nn.Module)]
    modules = modules or [pipe.unet, pipe.vae]
    weights = _weight_bytes(modules) + added
    band = 2 * TILE * factor * stage.width * 3 * 4
    return weights + int(SCRATCH * held) + 6 * latents.numel() * latents.element_size() + band + BASE_BYTES


def _weight_bytes(modules: Iterable[torch.nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _announce_memory(pipe: Any, stages: Sequence[Stage], side: dict[str, Any]) -> None:
    largest = max(stages, key=lambda stage: stage.height * stage.width)
    bound = memory_bound(pipe, largest, side)
    size = f"{largest.height}x{largest.width} pixels"
    print(f"{size}: at most {bound / 1e9:.2f} GB of memory, weights included", flush=True)


# -- one stage -------------------------------------------------------------------------------------------------------


def _arguments(side: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return what the UNet is called with beside latents and timestep; SDXL is told the size, too."""
    states, pooled = side["encoder_hidden_states"], side["pooled"]
    if pooled is None:
        return {"encoder_hidden_states": states}
    size = [stage.height, stage.width, 0, 0, stage.height, stage.width]
    time_ids = torch.tensor([size], dtype=states.dtype, device=states.device)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


@torch.no_grad()
def _run_stage(
    pipe: Any,
    stage: Stage,
    before: Tensor | None,
    drawn: tuple[int, int],
    prompt: Prompt,
    steps: int,
    scale: float,
) -> Tensor:
    """Return the latents of a stage [1, C, h, w], from those of the one before; `drawn` is seed and stage number."""
    (seed, number), factor = drawn, latent_factor(pipe)
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

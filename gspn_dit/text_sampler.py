"""Drawing images by caption with a UNet that this project trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspn_dit.checkpoint import load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.config import config_from_dict
from gspn_dit.data.latents import Latent, latent_from_spec, latent_shape
from gspn_dit.diffusion import CHUNK, Guidance, draw_latents, objective_of
from gspn_dit.diffusion.objective import Objective
from gspn_dit.diffusion.sampling import OnStepEnd
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import Captioned, rebuild_unet, smallest_side
from gspn_dit.text import Encoder, encode_all, load_encoder


def is_text_checkpoint(checkpoint: str | Path) -> bool:
    """Tell whether a checkpoint is of task text-to-image; raises UserError where there is none."""
    return bool(read_manifest(resolve_checkpoint(checkpoint)).get("text"))


@dataclass(frozen=True)
class TextSampler:
    """A trained UNet with what it needs to draw."""

    unet: Any
    encoder: Encoder
    objective: Objective
    latent: Latent
    patch_size: int

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, weights: str = "ema", device: str = "cpu", vae: str | None = None
    ) -> TextSampler:
        """Load a run directory (its newest complete checkpoint) or one checkpoint; weights are "ema" or "model".

        `vae` says where the autoencoder of its latents lies now, if it was moved. Raises UserError if the checkpoint is
        not one of text-to-image, or its text encoder or autoencoder is another one now.
        """
        directory = resolve_checkpoint(checkpoint)
        manifest = read_manifest(directory)
        if not manifest.get("text"):
            raise UserError(f"{directory} is not of task text-to-image, so it takes no prompt; give --classes")
        text: Mapping[str, Any] = manifest["text"]
        encoder = load_encoder(text["encoder"], text["max_tokens"])
        if encoder.spec() != text:
            raise UserError(f"{directory} was trained with another text encoder than {text['encoder']} is now")
        unet = rebuild_unet(manifest["model"])
        unet.load_state_dict(load_tensors(directory, weights))
        latent = latent_from_spec(manifest["latent"], vae, directory).to(device)
        objective = objective_of(
            config_from_dict(manifest["config"]).objective, manifest.get("schedule"), latent.natural_shift
        )
        encoder.to(device)
        torch.nn.Module.to(unet.eval().requires_grad_(False), device)
        return cls(unet, encoder, objective, latent, manifest["model"]["patch_size"])

    def draw(
        self,
        prompts: Sequence[str],
        steps: int = 50,
        guidance: Guidance | None = None,
        sampler: str | None = None,
        seed: int = 0,
        first: int = 0,
        on_chunk: Callable[[int], object] | None = None,
        sampling_shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        on_step_end: OnStepEnd | None = None,
    ) -> np.ndarray:
        """Return an image of each prompt, uint8 [n, H, W, C]; image i depends on (seed, first + i) and its prompt.

        Args:
            prompts: what to draw.
            steps: of the sampler.
            guidance, sampler: as in `sample_latents`.
            seed, first: of the noise, and the index of the first image.
            on_chunk: called with the number of images done.
            sampling_shift: in place of the objective's.
            height, width: of the images in pixels; None for what the model was trained on.
            on_step_end: called as (step, timestep, latents [CHUNK, C, h, w]) after each step of each chunk, the last of
                which is padded; returns the latents to go on with.

        Raises:
            UserError: as `sample_latents`.
            ValueError: a size that the UNet does not halve from level to level.
        """
        objective = self.objective.with_sampling_shift(sampling_shift)
        shape = latent_shape(self.latent, smallest_side(self.unet, self.patch_size), height, width)
        table = encode_all(self.encoder, sorted(set(prompts)))
        numbers = torch.tensor([table.numbers[prompt] for prompt in prompts], dtype=torch.int64)
        parts: list[np.ndarray] = []
        for start in range(0, len(prompts), CHUNK):
            chunk: Tensor = numbers[start : start + CHUNK]
            count = len(chunk)
            latents = draw_latents(
                Captioned(self.unet, table, self.latent.image_size, self.patch_size),
                objective,
                shape,
                torch.nn.functional.pad(chunk, (0, CHUNK - count), value=table.null),  # chunks of one size: same bits
                table.null,
                steps,
                seed,
                range(first + start, first + start + CHUNK),
                guidance=guidance,
                sampler=sampler,
                on_step_end=on_step_end,
            )
            parts.append(self.latent.decode(latents[:count]))
            if on_chunk is not None:
                on_chunk(start + count)
        return np.concatenate(parts)

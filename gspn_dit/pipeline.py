"""A diffusers pipeline around a trained model: class labels in, images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from gspn_dit.config import config_from_dict
from gspn_dit.data.latents import Latent, latent_from_spec
from gspn_dit.diffusion import Guidance, Objective, create_objective, draw_noise, sample_latents
from gspn_dit.errors import UserError, nearest
from gspn_dit.models import GSPNTransformer, create_model
from gspn_dit.training.checkpoint import load_tensors, read_manifest, resolve_checkpoint

CHUNK = 64
"""Images generated at a time. Fixed, and the last chunk is padded: the size of a batch can change its rounding."""


@dataclass
class GSPNPipelineOutput(BaseOutput):
    """Images, one per label: PIL images, or a uint8 array [n, H, W, C] with `output_type="np"`."""

    images: list[Image.Image] | np.ndarray


class GSPNPipeline(DiffusionPipeline):
    """Generates images by class from a checkpoint of this project.

    Image i depends on (seed, i) and its label alone, not on what is generated beside it.
    """

    def __init__(self, model: GSPNTransformer, objective: Objective, latent: Latent, class_names: list[str]) -> None:
        super().__init__()
        self.model, self.objective, self.latent, self.class_names = model, objective, latent, class_names

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
    ) -> GSPNPipeline:
        """Load a run directory (its newest complete checkpoint) or one checkpoint; weights are "ema" or "model".

        Raises UserError if it is missing, incomplete, or its weights do not fit the model it names.
        """
        directory = resolve_checkpoint(checkpoint)
        manifest = read_manifest(directory)
        try:
            arguments = {key: _plain(value) for key, value in manifest["model"].items()}
            model = create_model(**arguments).requires_grad_(False)
            objective = create_objective(config_from_dict(manifest["config"]).objective)
            latent = latent_from_spec(manifest["latent"])
            class_names = list(manifest["class_names"])
        except KeyError as error:
            raise UserError(f"{directory} is not a checkpoint of a model: its config.json has no {error}") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{directory} cannot be used by this version: its config.json: {error}") from None
        _load_weights(model, directory, weights)
        return cls(model.eval().to(device), objective, latent, class_names)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def class_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Turn class ids and names into ids; raises UserError for one that the model does not know."""
        return [resolve_class(label, self.class_names) for label in labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        seed: int = 0,
        first_index: int = 0,
        output_type: str = "pil",
        on_chunk: Callable[[int], None] | None = None,
    ) -> GSPNPipelineOutput:
        """Generate one image per label.

        Args:
            class_labels: ids or names.
            num_inference_steps: steps of the sampler.
            guidance_scale: 1 is no guidance.
            guidance_interval: times t (1 noise, 0 data) at which guidance acts.
            sampler: one of the objective's; None for its default.
            seed: image i depends on (seed, first_index + i).
            first_index: index of the first image; a multiple of the chunk size continues a set bit by bit.
            output_type: "pil" or "np".
            on_chunk: called with the number of images done after each chunk.

        Raises:
            UserError: an unknown class or sampler, or samples that are not finite.
            ValueError: guidance or steps out of range.
        """
        ids = self.class_ids(class_labels)
        sampler = sampler or self.objective.samplers[0]
        if sampler not in self.objective.samplers:
            raise UserError(f"unknown sampler '{sampler}'; allowed are {', '.join(self.objective.samplers)}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, but must be at least 1")
        guidance = Guidance(guidance_scale, guidance_interval)
        chunks = []
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            images = self._chunk(chunk, first_index + start, num_inference_steps, guidance, sampler, seed)
            chunks.append(images[: len(chunk)])
            if on_chunk is not None:
                on_chunk(start + len(chunk))
        images = np.concatenate(chunks) if chunks else self._empty()
        return GSPNPipelineOutput(images if output_type == "np" else [_to_pil(image) for image in images])

    def _chunk(self, ids: list[int], first: int, steps: int, guidance: Guidance, sampler: str, seed: int) -> np.ndarray:
        """Generate CHUNK images from index `first` on; labels are padded with the last one."""
        labels = torch.tensor(ids + ids[-1:] * (CHUNK - len(ids)))
        shape = (self.latent.channels, self.latent.size, self.latent.size)
        noise = draw_noise(seed, range(first, first + CHUNK), shape)
        latents = sample_latents(
            self.model,
            self.objective,
            noise.to(self.device),
            labels.to(self.device),
            self.model.null_label,
            steps,
            guidance,
            sampler,
        )
        return self.latent.decode(latents)

    def _empty(self) -> np.ndarray:
        return self.latent.decode(torch.zeros(0, self.latent.channels, self.latent.size, self.latent.size))


def resolve_class(label: int | str, class_names: Sequence[str]) -> int:
    """Return the id of a class given as id, as digits, or by name; raises UserError for an unknown one.

    A name beats a number: among classes named "10", "20", … the label "10" is that name's class.
    """
    if isinstance(label, str) and label in class_names:
        return list(class_names).index(label)
    last = len(class_names) - 1
    if isinstance(label, str) and not label.removeprefix("-").isdecimal():
        names = ", ".join(class_names[:20]) + (", …" if last >= 20 else "")
        raise UserError(f"unknown class '{label}'{nearest(label, class_names)}; classes are 0-{last}: {names}")
    if not 0 <= int(label) <= last:
        raise UserError(f"class {label} is out of range; the model has classes 0-{last}")
    return int(label)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _load_weights(model: torch.nn.Module, directory: Path, weights: str) -> None:
    tensors, expected = load_tensors(directory, weights), model.state_dict()
    for name in sorted({*tensors, *expected}):
        if name not in tensors or name not in expected:
            where = "is not in" if name not in tensors else "is only in"
            raise UserError(f"{directory} belongs to another model: tensor '{name}' {where} its {weights}.safetensors")
        if tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{directory} belongs to another model: '{name}' has shape {list(tensors[name].shape)}, "
                f"its config.json asks for {list(expected[name].shape)}"
            )
    model.load_state_dict(tensors)


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)

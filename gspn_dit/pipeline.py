"""A diffusers pipeline around a trained model: class labels in, images out."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from gspn_dit.checkpoint import FORMAT_VERSION, MANIFEST, load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.config import config_from_dict
from gspn_dit.data.latents import Latent, latent_from_spec
from gspn_dit.diffusion import CHUNK, Guidance, Objective, create_objective, draw_noise, sample_latents
from gspn_dit.errors import UserError, nearest
from gspn_dit.files import write_atomically
from gspn_dit.grid import to_pil
from gspn_dit.hub import download
from gspn_dit.model_card import CARD, CODE_LICENSE, LIBRARY, model_card, public_manifest
from gspn_dit.models import DiffusionModel, create_model


@dataclass
class GSPNPipelineOutput(BaseOutput):
    """Images, one per label: PIL images; a uint8 array [n, H, W, C] with `output_type="np"`, latents with "latent"."""

    images: list[Image.Image] | np.ndarray | Tensor


class GSPNPipeline(DiffusionPipeline):
    """Generates images by class from a checkpoint of this project.

    Image i depends on (seed, i) and its label alone, not on what is generated beside it.
    """

    model: DiffusionModel
    objective: Objective
    latent: Latent

    def __init__(
        self,
        model: DiffusionModel,
        objective: Objective,
        latent: Latent,
        class_names: list[str],
        manifest: Mapping[str, Any] | None = None,
        weights: str = "ema",
    ) -> None:
        super().__init__()
        self.register_modules(model=model, objective=objective, latent=latent)
        self.class_names = class_names
        self.manifest, self.weights = dict(manifest or {}), weights
        self.guide: DiffusionModel | None = None
        """A weaker model to guide away from; None for this model's own prediction without a class."""

    # -- loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, weights: str = "ema", device: str | torch.device = "cpu", vae: str | None = None
    ) -> GSPNPipeline:
        """Load a run directory (its newest complete checkpoint) or one checkpoint; weights are "ema" or "model".

        `vae` says where the autoencoder of its latents lies now, if it was moved. Raises UserError if the checkpoint is
        missing, incomplete, or its weights do not fit the model it names, or if the autoencoder is another one.
        """
        directory = resolve_checkpoint(checkpoint)
        manifest = read_manifest(directory)
        try:
            arguments = {key: _plain(value) for key, value in manifest["model"].items()}
            model = create_model(**arguments).requires_grad_(False)
            objective = create_objective(config_from_dict(manifest["config"]).objective)
            latent = latent_from_spec(manifest["latent"], vae, directory)
            class_names = list(manifest["class_names"])
        except KeyError as error:
            raise UserError(f"{directory} is not a checkpoint of a model: its config.json has no {error}") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{directory} cannot be used by this version: its config.json: {error}") from None
        _load_weights(model, directory, weights)
        return cls(model.eval(), objective, latent, class_names, manifest, weights).to(device)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        weights: str | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> GSPNPipeline:
        """Load what `save_pretrained` wrote, from a directory or the Hugging Face Hub; a checkpoint or run will do too.

        Args:
            pretrained_model_name_or_path: a directory, or the id of a Hub repository such as "name/model".
            weights: "ema" or "model"; None for the average if it is there.
            device: where to.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are kept; None for the usual place.
            token: for repositories that are not public.
            local_files_only: take what was downloaded before.

        Raises:
            UserError: nothing is there, or it is not complete, or not of this project. Nothing is ever unpickled.
        """
        directory = Path(pretrained_model_name_or_path)
        if not directory.exists():
            directory = download(str(pretrained_model_name_or_path), revision, cache_dir, token, local_files_only)
        directory = resolve_checkpoint(directory)
        if weights is None:
            weights = "ema" if "ema.safetensors" in read_manifest(directory)["files"] else "model"
        return cls.from_checkpoint(directory, weights, device)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        license: str = CODE_LICENSE,
        push_to_hub: bool = False,
        **push_options: Any,
    ) -> None:
        """Write a directory that `from_pretrained` and every `--checkpoint` of this project read back bit by bit.

        It holds the weights as safetensors, config.json, what the latent decodes with, and a model card.

        Args:
            save_directory: is created; files of an earlier save are replaced.
            safe_serialization: only True.
            variant: only None.
            license: identifier of the weights' licence, for the model card.
            push_to_hub: upload it, too, to the repository `repo_id` (default: the directory's name).
            push_options: of `push_to_hub`.

        Raises:
            UserError: the directory cannot be written.
            ValueError: another format is asked for, or the pipeline was not loaded from a checkpoint.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("only safetensors without a variant are written; leave both options out")
        if not self.manifest:
            raise ValueError("a pipeline built from parts does not know its config; load it with from_checkpoint")
        directory = Path(save_directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._save(directory)
            write_atomically(directory / CARD, model_card(self.manifest, self.weights, license).encode())
        except OSError as error:
            raise UserError(f"cannot save the model in {directory}: {error}") from None
        if push_to_hub:
            self.push_to_hub(push_options.pop("repo_id", directory.resolve().name), **push_options)

    def _save(self, directory: Path) -> None:
        """Write weights, latent and, last, the manifest."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.model.state_dict().items()}
        content, name = save(tensors), f"{self.weights}.safetensors"
        write_atomically(directory / name, content)
        manifest = {
            "format_version": FORMAT_VERSION,
            **public_manifest(self.manifest),
            "latent": self.latent.save(directory),
            "files": {name: {"bytes": len(content), "crc32": zlib.crc32(content)}},
        }
        write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False).encode())

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload with our model card in place of the generic one; a card of ours, edited on the Hub, stays."""
        card = Path(working_dir) / CARD
        if not card.exists() or LIBRARY not in card.read_text(encoding="utf-8"):
            card.write_text(model_card(self.manifest, self.weights, repo_id=repo_id), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    # -- what diffusers asks of a pipeline -----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def components(self) -> dict[str, Any]:
        """What another pipeline around the same model is built from."""
        names = ("model", "objective", "latent", "class_names")
        return {name: getattr(self, name) for name in names}

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> GSPNPipeline:
        """Move to a device; raises ValueError for a dtype other than float32, in which sampling computes."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, torch.float32):
            raise ValueError(f"GSPNPipeline samples in float32; {dtype} is not supported")
        if device is not None:
            self.model.to(device)
            self.latent.to(device)
            if self.guide is not None:
                self.guide.to(device)
        return self

    def guide_with(self, checkpoint: str | Path, weights: str = "ema") -> GSPNPipeline:
        """Guide away from a weaker model (autoguidance, arXiv 2406.02507): smaller, or of an earlier step.

        Raises UserError if it cannot be loaded, or has other classes, latents or another objective.
        """
        other = GSPNPipeline.from_checkpoint(checkpoint, weights, self.device)
        for name, mine, theirs in (
            ("classes", self.class_names, other.class_names),
            ("latents", _geometry(self.latent), _geometry(other.latent)),
            ("objective", type(self.objective).__name__, type(other.objective).__name__),
        ):
            if mine != theirs:
                raise UserError(f"{checkpoint} cannot guide this model: it has other {name} ({theirs}, not {mine})")
        self.guide = other.model
        return self

    # -- images --------------------------------------------------------------------------------------------------

    def class_ids(self, labels: Sequence[int | str]) -> list[int]:
        """Turn class ids and names into ids; raises UserError for one that the model does not know."""
        return [resolve_class(label, self.class_names) for label in labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str | None = None,
        seed: int | None = None,
        first_index: int = 0,
        output_type: str = "pil",
        on_chunk: Callable[[int], None] | None = None,
        generator: torch.Generator | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_channels: int | None = None,
    ) -> GSPNPipelineOutput:
        """Generate one image per label.

        Args:
            class_labels: ids or names; one of them will do for one image.
            num_inference_steps: steps of the sampler.
            guidance_scale: 1 is no guidance.
            guidance_interval: times t (1 noise, 0 data) at which guidance acts.
            sampler: one of the objective's; None for its default.
            seed: image i depends on (seed, first_index + i); None for 0, or what `generator` draws.
            first_index: index of the first image; a multiple of the chunk size continues a set bit by bit.
            output_type: "pil", "np", or "latent" for latents [n, C, h, w] that `decode` turns into images.
            on_chunk: called with the number of images done after each chunk.
            generator: draws the seed, so that one call after another gives other images.
            height: of the images in pixels; None for what the model was trained on.
            width: likewise.
            guidance_channels: guide the first channels alone (3 in DiT's published figures); None for all.

        Raises:
            UserError: an unknown class or sampler, or samples that are not finite.
            ValueError: guidance, steps or size out of range.
        """
        ids = self.class_ids([class_labels] if isinstance(class_labels, (int, str, Integral)) else class_labels)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, but must be at least 1")
        sampler = self.objective.resolve_sampler(sampler, num_inference_steps)
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type is '{output_type}', but must be 'pil', 'np' or 'latent'")
        guidance, shape = (
            Guidance(guidance_scale, guidance_interval, guidance_channels),
            self._latent_shape(height, width),
        )
        seed = _choose_seed(seed, generator)
        starts = range(0, len(ids), CHUNK)
        calls = len(self.objective.make_scheduler(sampler, num_inference_steps).timesteps)
        chunks: list[Any] = []
        with self.progress_bar(total=len(starts) * calls) as bar:
            for start in starts:
                chunk = ids[start : start + CHUNK]
                latents = self._chunk(
                    chunk, first_index + start, shape, num_inference_steps, guidance, sampler, seed, bar.update
                )
                whole = latents if output_type == "latent" else self.latent.decode(latents)
                chunks.append(whole[: len(chunk)])
                if on_chunk is not None:
                    on_chunk(start + len(chunk))
        if output_type == "latent":
            return GSPNPipelineOutput(torch.cat([self._no_latents(shape), *chunks]))
        images = np.concatenate(chunks) if chunks else self.latent.decode(self._no_latents(shape))
        return GSPNPipelineOutput(images if output_type == "np" else [to_pil(image) for image in images])

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Return channels, height and width of the latents of an image size in pixels."""
        latent, multiple = self.latent, self.latent.factor * self.model.patch_size
        sides = []
        for name, pixels in (("height", height), ("width", width)):
            pixels = latent.size * latent.factor if pixels is None else pixels
            if pixels < 1 or pixels % multiple:
                raise ValueError(f"{name} is {pixels} pixels, but must be a positive multiple of {multiple}")
            sides.append(pixels // latent.factor)
        return latent.channels, sides[0], sides[1]

    def _chunk(
        self,
        ids: list[int],
        first: int,
        shape: tuple[int, int, int],
        steps: int,
        guidance: Guidance,
        sampler: str,
        seed: int,
        on_step: Callable[[], Any],
    ) -> Tensor:
        """Generate the latents of CHUNK images from index `first` on; labels are padded with the last one."""
        labels, indices = torch.tensor(ids + ids[-1:] * (CHUNK - len(ids))), range(first, first + CHUNK)
        noise = draw_noise(seed, indices, shape)
        return sample_latents(
            self.model,
            self.objective,
            noise.to(self.device),
            labels.to(self.device),
            self.model.null_label,
            steps,
            guidance,
            sampler,
            on_step,
            seed,
            indices,
            self.guide,
        )

    def _no_latents(self, shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(0, *shape, device=self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Turn latents [n, C, h, w] of `output_type="latent"` into the same uint8 images [n, H, W, C] as "np".

        They are decoded in whole chunks, padded with the last latent: the size of a batch can change its rounding.

        Raises:
            UserError: samples that are not finite.
        """
        chunks = [self.latent.decode(latents[:0])]
        for start in range(0, len(latents), CHUNK):
            part = latents[start : start + CHUNK]
            padded = torch.cat([part, part[-1:].expand(CHUNK - len(part), *part.shape[1:])])
            chunks.append(self.latent.decode(padded)[: len(part)])
        return np.concatenate(chunks)


def _geometry(latent: Latent) -> tuple[str, int, int]:
    return type(latent).__name__, latent.channels, latent.factor


def resolve_class(label: int | str, class_names: Sequence[str]) -> int:
    """Return the id of a class given as id, as digits, or by name; raises UserError for an unknown one.

    A name beats a number: among classes named "10", "20", … the label "10" is that name's class. Of a name with
    synonyms, such as "tench, Tinca tinca", one of them will do if no other class has it.
    """
    if isinstance(label, str) and label in class_names:
        return list(class_names).index(label)
    last = len(class_names) - 1
    if isinstance(label, str) and not label.removeprefix("-").isdecimal():
        owners = [number for number, name in enumerate(class_names) if label in name.split(", ")]
        if len(owners) == 1:
            return owners[0]
        if owners:
            raise UserError(f"class '{label}' is ambiguous: {', '.join(map(str, owners))} have that name; give the id")
        names = ", ".join(class_names[:20]) + (", …" if last >= 20 else "")
        raise UserError(f"unknown class '{label}'{nearest(label, class_names)}; classes are 0-{last}: {names}")
    if not isinstance(label, (Integral, str)):
        raise UserError(f"class {label!r} is neither an id nor a name; the model has classes 0-{last}")
    if not 0 <= int(label) <= last:
        raise UserError(f"class {label} is out of range; the model has classes 0-{last}")
    return int(label)


def _choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    if generator is None:
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed < 2**63):
            raise ValueError(f"seed is {seed!r}, but must be a whole number in [0, 2^63)")
        return int(seed or 0)
    if seed is not None:
        raise ValueError("seed and generator exclude each other; give one of them")
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator is a {type(generator).__name__}, but must be one torch.Generator, which draws the seed of all "
            "images: image i depends on (seed, i) alone"
        )
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


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

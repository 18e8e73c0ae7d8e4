"""A diffusers pipeline around a trained model: class labels in, images out."""

from __future__ import annotations

import copy
import os
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

from gspn_dit.checkpoint import is_builtin, load_weights, read_manifest, resolve_checkpoint
from gspn_dit.class_names import ClassNames, resolve_class
from gspn_dit.config import config_from_dict
from gspn_dit.data.latents import Latent, latent_from_spec, latent_shape
from gspn_dit.diffusion import CHUNK, Guidance, Objective, create_objective, draw_latents
from gspn_dit.diffusion.sampling import choose_seed
from gspn_dit.diffusion.schedulers import default_scheduler, ready_scheduler
from gspn_dit.errors import UserError
from gspn_dit.grid import to_pil
from gspn_dit.hub import CARD, download
from gspn_dit.model_card import CODE_LICENSE, LIBRARY, model_card
from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.sampling_options import check_sampling_shift
from gspn_dit.saved_pipeline import Parts, load_scheduler, origin

DEFAULT_STEPS = 50
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class GSPNPipelineOutput(BaseOutput):
    """Images, one per label, in the form that `output_type` asks for; see `GSPNPipeline.__call__`."""

    images: list[Image.Image] | np.ndarray | Tensor


class GSPNPipeline(DiffusionPipeline):
    """Generates images by class from a checkpoint of this project.

    Image i depends on (seed, i) and its label alone, not on what is generated beside it.

    Components, each of which can be replaced: `model`; `scheduler`, a diffusers scheduler that takes what the model
    predicts; `latent`, and its autoencoder `vae` if it has one; `guide`, a weaker model to guide away from, None for
    the model's own prediction without a class; `objective` and `class_names`. In float16 or bfloat16 the model runs
    under autocast, latents and scheduler stay float32.
    """

    model: DiffusionModel
    objective: Objective
    latent: Latent
    class_names: ClassNames
    scheduler: Any
    guide: DiffusionModel | None
    _optional_components = ["scheduler", "vae", "guide"]
    model_cpu_offload_seq = "model->vae"  # type: ignore[assignment]

    def __init__(
        self,
        model: DiffusionModel,
        objective: Objective,
        latent: Latent,
        class_names: list[str],
        manifest: Mapping[str, Any] | None = None,
        weights: str = "ema",
        scheduler: Any = None,
        vae: Any = None,
        guide: DiffusionModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, objective=objective, latent=latent, class_names=ClassNames(class_names))
        self.register_modules(vae=vae or getattr(latent, "vae", None), guide=guide)
        self.register_modules(scheduler=scheduler or default_scheduler(objective))
        if manifest:  # which the model carries from now on, into every pipeline that it becomes a part of
            model.origin = dict(manifest), weights

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, ClassNames(value) if name == "class_names" else value)

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the checkpoint that the model came from; empty for a model built by hand."""
        return origin(self.model)[0]

    @property
    def weights(self) -> str:
        """Which of its weights the model has: "ema" or "model"."""
        return origin(self.model)[1]

    @property
    def vae(self) -> Any:
        """The autoencoder of the latents; None for pixels."""
        return getattr(self.latent, "vae", None)

    @vae.setter
    def vae(self, vae: Any) -> None:
        if vae is not self.vae:
            self.latent = self.latent.with_vae(vae)

    # -- loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        weights: str = "ema",
        device: str | torch.device = "cpu",
        vae: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GSPNPipeline:
        """Load a run directory (its newest complete checkpoint), one checkpoint, or "builtin:digits".

        `weights` are "ema", "model", or another average that the checkpoint holds, such as "ema-0.050"; `vae` says
        where the autoencoder of its latents lies now, if it was moved. Raises UserError if the checkpoint is missing,
        incomplete, or its weights do not fit the model it names, or if the autoencoder is another one.
        """
        directory = resolve_checkpoint(checkpoint)
        manifest = read_manifest(directory)
        try:
            model = create_model(**manifest["model"]).requires_grad_(False)
            latent = latent_from_spec(manifest["latent"], vae, directory)
            objective = create_objective(config_from_dict(manifest["config"]).objective, latent.natural_shift)
            class_names = list(manifest["class_names"])
            scheduler = load_scheduler(directory, manifest)
        except KeyError as error:
            raise UserError(f"{directory} is not a checkpoint of a model: its config.json has no {error}") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{directory} cannot be used by this version: its config.json: {error}") from None
        load_weights(model, directory, weights)
        return cls(model.eval(), objective, latent, class_names, manifest, weights, scheduler).to(device, dtype)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        weights: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> GSPNPipeline:
        """Load what `save_pretrained` wrote, from a directory or the Hugging Face Hub; a checkpoint or run will do too.

        Args:
            pretrained_model_name_or_path: a directory, "builtin:digits", or the id of a Hub repository ("name/model").
            weights: "ema" or "model"; None for the average if it is there.
            device, dtype: of the weights; None for float32. `torch_dtype` is another name of `dtype`.
            revision: branch, tag or commit on the Hub.
            cache_dir, token, local_files_only: as in `huggingface_hub.snapshot_download`.

        Raises:
            UserError: nothing is there, or it is not complete, or not of this project. Nothing is ever unpickled.
        """
        directory = Path(pretrained_model_name_or_path)
        if not directory.exists() and not is_builtin(directory):
            directory = download(str(pretrained_model_name_or_path), revision, cache_dir, token, local_files_only)
        directory = resolve_checkpoint(directory)
        if weights is None:
            weights = "ema" if "ema.safetensors" in read_manifest(directory)["files"] else "model"
        return cls.from_checkpoint(directory, weights, device, dtype=dtype or torch_dtype)

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

        It holds the weights as safetensors, config.json, what the latent decodes with, a scheduler that took the place
        of the default one, and a model card.

        Args:
            save_directory: is created; files of an earlier save are replaced.
            safe_serialization, variant: only True and None.
            license: identifier of the weights' licence, for the model card.
            push_to_hub: upload it, too, to the repository `repo_id` (default: the directory's name).
            push_options: of `push_to_hub`.

        Raises:
            UserError: the directory cannot be written.
            ValueError: another format is asked for, or parts that a checkpoint cannot hold: a guide, a model built by
                hand or changed since it was loaded, another objective, a scheduler that diffusers does not have.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("only safetensors without a variant are written; leave both options out")
        directory = Path(save_directory)
        parts = Parts(self.model, self.objective, self.latent, self.class_names, self.scheduler, self.guide)
        try:
            parts.write(directory, license)
        except OSError as error:
            raise UserError(f"cannot save the model in {directory}: {error}") from None
        if push_to_hub:
            self.push_to_hub(push_options.pop("repo_id", directory.resolve().name), **push_options)

    def _upload_folder(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload with our model card in place of the generic one; a card of ours, edited on the Hub, stays."""
        card = Path(working_dir) / CARD
        if not card.exists() or LIBRARY not in card.read_text(encoding="utf-8"):
            card.write_text(model_card(self.manifest, self.weights, repo_id=repo_id), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def guide_with(self, checkpoint: str | Path, weights: str = "ema") -> GSPNPipeline:
        """Guide away from a weaker model (autoguidance, arXiv 2406.02507): smaller, or of an earlier step.

        Raises UserError if it cannot be loaded, or has other classes, latents or another objective.
        """
        other = GSPNPipeline.from_checkpoint(checkpoint, weights, self.device, dtype=self.dtype)
        for name, mine, theirs in (
            ("classes", self.class_names, other.class_names),
            ("latents", *((type(one).__name__, one.channels, one.factor) for one in (self.latent, other.latent))),
            ("objective", type(self.objective).__name__, type(other.objective).__name__),
            ("objective.prediction", *(one.objective.config.prediction for one in (self, other))),
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
        num_inference_steps: int = DEFAULT_STEPS,
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
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sampling_shift: float | None = None,
    ) -> GSPNPipelineOutput:
        """Generate one image per label, CHUNK at a time.

        Args:
            class_labels: ids or names; one of them will do for one image.
            num_inference_steps: steps of the sampler.
            guidance_scale: 1 is no guidance.
            guidance_interval: times t (1 noise, 0 data) at which guidance acts.
            sampler: one of the objective's; None for `scheduler`.
            seed: image i depends on (seed, first_index + i); None for 0, or what `generator` draws.
            first_index: index of the first image; a multiple of the chunk size continues a set bit by bit.
            output_type: "pil"; "np", uint8 [n, H, W, C]; "pt", float32 [n, C, H, W] in [0, 1]; "latent" for `decode`.
            on_chunk: called with the number of images done after each chunk.
            generator: draws the seed, so that one call after another gives other images.
            height, width: of the images in pixels; None for what the model was trained on.
            guidance_channels: guide the first channels alone (3 in DiT's published figures); None for all.
            return_dict: False for a tuple.
            callback_on_step_end, callback_on_step_end_tensor_inputs: called as (pipeline, step, timestep, {"latents":
                [n, C, h, w]}) after each step of each chunk; may return other latents in the same form.
            sampling_shift: by how much the sampler's times are shifted towards noise; None for the objective's.

        Raises:
            UserError: an unknown class or sampler, or samples that are not finite.
            ValueError: guidance, steps or size out of range, or a scheduler that takes another prediction.
        """
        ids = self.class_ids([class_labels] if isinstance(class_labels, (int, str, Integral)) else class_labels)
        _check_call(num_inference_steps, output_type, callback_on_step_end_tensor_inputs)
        check_sampling_shift(sampling_shift, "sampling_shift")
        request = _Request(
            latent_shape(self.latent, self.model.patch_size, height, width),
            Guidance(guidance_scale, guidance_interval, guidance_channels),
            ready_scheduler(self.scheduler, self.objective, sampler, num_inference_steps, sampling_shift),
            choose_seed(seed, generator),
            callback_on_step_end,
            tuple(callback_on_step_end_tensor_inputs),
        )
        parts = self._parts(ids, first_index, request, output_type == "latent", on_chunk)
        self.maybe_free_model_hooks()
        output = GSPNPipelineOutput(self._output(parts, request.shape, output_type))
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]

    def _parts(
        self, ids: list[int], first_index: int, request: _Request, latent: bool, on_chunk: Callable[[int], None] | None
    ) -> list[Any]:
        """Return each chunk's latents, or its uint8 images."""
        starts, parts = range(0, len(ids), CHUNK), []
        with self.progress_bar(total=len(starts) * len(request.scheduler.timesteps)) as bar:
            for start in starts:
                chunk = ids[start : start + CHUNK]
                latents = self._draw(chunk, first_index + start, request, bar.update)
                parts.append((latents if latent else self.latent.decode(latents))[: len(chunk)])
                if on_chunk is not None:
                    on_chunk(start + len(chunk))
        return parts

    def _output(self, parts: list[Any], shape: tuple[int, int, int], output_type: str) -> Any:
        """Join the chunks in the form that was asked for."""
        none = torch.zeros(0, *shape, device=self._execution_device)
        if output_type == "latent":
            return torch.cat([none, *parts])
        images = np.concatenate(parts) if parts else self.latent.decode(none)
        if output_type == "pt":
            return torch.from_numpy(images).to(self._execution_device).permute(0, 3, 1, 2).float() / 255
        return images if output_type == "np" else [to_pil(image) for image in images]

    def _draw(self, ids: list[int], first: int, request: _Request, advance: Callable[[], Any]) -> Tensor:
        """Generate the latents of CHUNK images from index `first` on; labels are padded with the last one."""
        labels, indices = torch.tensor(ids + ids[-1:] * (CHUNK - len(ids))), range(first, first + CHUNK)

        def on_step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            if request.callback is None:
                return latents
            tensors = {name: latents[: len(ids)] for name in request.callback_tensors}
            answer = request.callback(self, step, timestep, tensors) or {}
            return torch.cat([answer.get("latents", latents[: len(ids)]).to(latents), latents[len(ids) :]])

        return draw_latents(
            self.model.in_float32,
            self.objective,
            request.shape,
            labels,
            self.model.null_label,
            len(request.scheduler.timesteps),
            request.seed,
            indices,
            self._execution_device,
            guidance=request.guidance,
            on_step=advance,
            guide=None if self.guide is None else self.guide.in_float32,
            scheduler=copy.deepcopy(request.scheduler),  # which remembers its steps
            on_step_end=on_step_end,
        )

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


StepCallback = Callable[[GSPNPipeline, int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]


@dataclass(frozen=True)
class _Request:
    """What all chunks of a call share."""

    shape: tuple[int, int, int]
    guidance: Guidance
    scheduler: Any
    seed: int
    callback: StepCallback | None
    callback_tensors: tuple[str, ...]


def _check_call(steps: int, output_type: str, callback_tensors: Sequence[str]) -> None:
    if steps < 1:
        raise ValueError(f"num_inference_steps is {steps}, but must be at least 1")
    if output_type not in OUTPUT_TYPES:
        *others, last = map(repr, OUTPUT_TYPES)
        raise ValueError(f"output_type is '{output_type}', but must be {', '.join(others)} or {last}")
    if not {*callback_tensors} <= {"latents"}:
        raise ValueError(f"callback_on_step_end_tensor_inputs is {[*callback_tensors]}, but can hold 'latents' alone")

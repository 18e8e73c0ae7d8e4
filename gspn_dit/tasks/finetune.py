"""Fine-tuning: start from the weights of another run, even if the classes differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gspn_dit.checkpoint import load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.config import ObjectiveConfig
from gspn_dit.data.latents import refuse_other_vae
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel
from gspn_dit.models.embeddings import TimestepEmbedding
from gspn_dit.models.mixers import unseen_options
from gspn_dit.models.presets import parse_name, preset_options

LABEL_TABLE = "class_embed.weight"
FIRST_TIME, SECOND_TIME = "timestep_embed.", "span_embed."


def pretrained_weights(
    checkpoint: str, model: DiffusionModel, description: Mapping[str, Any], prediction: str
) -> dict[str, Tensor]:
    """Return the EMA weights of a run directory or checkpoint, for a model that a checkpoint describes so.

    `prediction` is `objective.prediction`: what this run takes the model's output for.

    The label table [classes + 1, C] is resized: a class of the same name keeps its row, the last row stays that of "no
    class", and a new class keeps the row that the model has. A velocity model learns on as a few-step one: a smooth
    embedding of times imitates its own, that of a second time stays as it starts, without effect.

    Raises UserError if there is no such checkpoint, or it is of another model, predicts something else, or belongs to
    latents of another autoencoder.
    """
    directory = resolve_checkpoint(checkpoint)
    manifest = read_manifest(directory)
    weights = "ema" if "ema.safetensors" in manifest["files"] else "model"
    tensors, own = load_tensors(directory, weights), model.state_dict()
    before, now = manifest["latent"], description["latent"]
    if before.get("name") != now["name"] or now["name"] != "identity":
        refuse_other_vae({**before, "image_size": now["image_size"]}, now)
    unseen_before, unseen_now = (_unseen_options(arguments) for arguments in (manifest["model"], description["model"]))
    unseen_before["objective.prediction"] = _prediction(manifest)
    unseen_now["objective.prediction"] = prediction
    for key, value in unseen_before.items():
        if value != unseen_now[key]:
            raise UserError(
                f"training.initialize_from {checkpoint} belongs to another model: {key} is {value} there "
                f"and {unseen_now[key]} here"
            )
    second_time = {name: value for name, value in own.items() if name.startswith(SECOND_TIME)}
    of_velocity = bool(second_time) and not any(name.startswith(SECOND_TIME) for name in tensors)
    tensors = {**second_time, **tensors}
    for name in sorted({*tensors, *own}):
        given, needed = tensors.get(name), own.get(name)
        rows = 1 if name == LABEL_TABLE else 0
        if given is None or needed is None or given.shape[rows:] != needed.shape[rows:]:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (given, needed)]
            raise UserError(
                f"training.initialize_from {checkpoint} belongs to another model: '{name}' has shape {shapes[0]} there "
                f"and {shapes[1]} here"
            )
    names = description["class_names"]
    if of_velocity:
        tensors |= _smoothed(tensors, model.timestep_embed)
    tensors[LABEL_TABLE] = resize_label_table(tensors[LABEL_TABLE], manifest["class_names"], own[LABEL_TABLE], names)
    return tensors


def _smoothed(tensors: Mapping[str, Tensor], embedding: TimestepEmbedding) -> dict[str, Tensor]:
    """Return the weights of a model's embedding of times, fitted to those of a velocity model's tensors."""
    given = TimestepEmbedding(embedding.mix.out_features, embedding.frequencies, embedding.endpoint)
    given.load_state_dict({name: tensors[FIRST_TIME + name] for name in given.state_dict()})
    smooth = copy.deepcopy(embedding)
    smooth.imitate(given.to(embedding.mix.weight.device))
    return {FIRST_TIME + name: value for name, value in smooth.state_dict().items()}


def _prediction(manifest: Mapping[str, Any]) -> str:
    """Return `objective.prediction` of a checkpoint; older ones, and imported ones, know velocity (or noise) alone."""
    return manifest.get("config", {}).get("objective", {}).get("prediction", ObjectiveConfig().prediction)


def _unseen_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model, given `create_model`'s arguments, that its weights need but do not show."""
    family, size, _ = parse_name(arguments["name"])
    unseen = {"timestep_endpoint": False, "norm": "layer", **unseen_options()}
    options = {**unseen, **preset_options(family, size), **arguments}
    return {key: list(value) if isinstance(value := options[key], tuple) else value for key in unseen}


def resize_label_table(table: Tensor, names: list[str], fresh: Tensor, new_names: list[str]) -> Tensor:
    """Return the label table of new classes, float32 [len(new_names) + 1, C].

    Args:
        table: of the old classes, [len(names) + 1, C]; its last row means "no class".
        names: of the old classes, by id.
        fresh: a table of the new size, from which classes without a namesake take their rows.
        new_names: of the new classes, by id.
    """
    resized = rows_by_name(table, names, fresh, new_names)
    resized[-1] = table[-1]
    return resized


def rows_by_name(table: Tensor, names: Sequence[str], fresh: Tensor, new_names: Sequence[str]) -> Tensor:
    """Return a copy of `fresh` in which each class of a name that `names` has, too, takes its row of `table`.

    Args:
        table: a row for each of the old classes, [len(names), …].
        names: of the old classes, by id.
        fresh: a row for each of the new classes, [len(new_names), …].
        new_names: of the new classes, by id.
    """
    old_ids = {name: number for number, name in enumerate(names)}
    resized = fresh.detach().clone()
    for number, name in enumerate(new_names):
        if name in old_ids:
            resized[number] = table[old_ids[name]]
    return resized

"""Distillation of self-attention into scans: all else frozen, and three losses as in LinFusion and CLEAR.

    loss = MSE(target) + 1/2 · MSE(teacher's prediction) + 1/2 · mean over layers of MSE(self-attention's output)

Each model runs on its own activations. In a first stage, as in C-GSPN (arXiv 2606.00746), each scan instead gets what
its teacher gets, and only the last loss counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from gspn_dit.checkpoint import load_tensors, read_manifest, resolve_checkpoint
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import rebuild_unet
from gspn_dit.text import is_pipeline

TEACHER_WEIGHT = LAYERS_WEIGHT = 0.5


def describe_teacher(place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `rebuild_unet` needs of a UNet with attention, and its manifest as `load_teacher`; no weights."""
    if is_pipeline(place):
        try:
            config: Any = UNet2DConditionModel.load_config(place, subfolder="unet")
        except OSError as error:
            raise UserError(f"unet.teacher {place} has no readable unet: {str(error).splitlines()[0]}") from None
        return {"name": "UNet", "config": dict(config), "scans": None, "patch_size": 1}, {}
    manifest = read_manifest(resolve_checkpoint(place))
    described = manifest["model"]
    if described.get("name") != "UNet" or described["scans"] is not None:
        raise UserError(f"unet.teacher {place} is not a UNet with attention; give a run of unet.mixer attention")
    return described, manifest


def load_teacher(place: str) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """Return a UNet with attention, and the manifest of the checkpoint it is from, or {} for a pipeline's.

    Raises UserError if there is none, or it has scans already.
    """
    described, manifest = describe_teacher(place)
    if not manifest:
        try:
            unet: Any = UNet2DConditionModel.from_pretrained(place, subfolder="unet")
        except (OSError, ValueError) as error:
            raise UserError(f"unet.teacher {place} has no readable unet: {str(error).splitlines()[0]}") from None
        return unet, {}
    directory, unet = resolve_checkpoint(place), rebuild_unet(described)
    unet.load_state_dict(load_tensors(directory, "ema" if "ema.safetensors" in manifest["files"] else "model"))
    return unet, manifest


def frozen_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a UNet of the same tensors, frozen: the student's parts that are not replaced are its teacher's."""
    unet.requires_grad_(False)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, shared).eval()


class Taps:
    """Reads what goes into and comes out of each `attn1` of a UNet, by name, in the forward pass made inside."""

    def __init__(self, unet: nn.Module) -> None:
        self.parts = {name: part for name, part in unet.named_modules() if name.endswith(".attn1")}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    @contextmanager
    def reading(self, inputs: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Read; `inputs` are given to the parts instead of their own."""
        self.inputs, self.outputs = {}, {}
        hooks = []
        for name, part in self.parts.items():

            def before(module: nn.Module, arguments: Any, name: str = name) -> Any:
                own = arguments[0] if inputs is None else inputs[name]
                self.inputs.setdefault(name, own)
                return (own, *arguments[1:])

            def after(module: nn.Module, arguments: Any, output: Tensor, name: str = name) -> None:
                self.outputs.setdefault(name, output)  # not when recomputed

            hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Distillation:
    """A teacher, and what a student loses by it.

    Args:
        teacher: frozen, with attention.
        student: the same UNet with scans.
        teacher_inputs: give each scan what its teacher gets.
    """

    def __init__(self, teacher: UNet2DConditionModel, student: UNet2DConditionModel, teacher_inputs: bool) -> None:
        self.teacher, self.teacher_inputs = teacher, teacher_inputs
        self._of_teacher, self._of_student = Taps(teacher), Taps(student)
        self._predictions: tuple[Tensor, Tensor] | None = None

    def __call__(self, predict: Any, predict_as_teacher: Any) -> Tensor:
        """Return the student's prediction, having read both models; the functions take no arguments."""
        with torch.no_grad(), self._of_teacher.reading():
            expected = predict_as_teacher()
        with self._of_student.reading(self._of_teacher.inputs if self.teacher_inputs else None):
            prediction = predict()
        self._predictions = (prediction, expected)
        return prediction

    def losses(self, target_loss: Tensor) -> dict[str, Tensor]:
        """Return "loss" and its parts, 0-d, of the batch that was just read; `target_loss` is that of the target."""
        assert self._predictions is not None
        prediction, expected = self._predictions
        errors = [
            F.mse_loss(self._of_student.outputs[name].float(), output.float())
            for name, output in self._of_teacher.outputs.items()
        ]
        layers = torch.stack(errors).mean()
        teacher = F.mse_loss(prediction.float(), expected.float())
        self._predictions = None
        loss = layers if self.teacher_inputs else target_loss + TEACHER_WEIGHT * teacher + LAYERS_WEIGHT * layers
        parts = {"loss_target": target_loss, "loss_teacher": teacher, "loss_layers": layers}
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

"""The Inception net that FID is defined on (2015-12-05, as torch-fidelity has it), and where its weights come from.

torch-fidelity unpickles a weights file without looking at it. Here the file is hashed first and read by the loader
that builds tensors and nothing else; a file that is not the published one costs the scores their names.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from fid import unverified
from fid.extractor import LayeredExtractor
from gspn_dit.errors import UserError

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_NAME = URL_INCEPTION_V3.rsplit("/", 1)[-1]
EXTRACTOR_NAME = "gspn-dit-inception-v3"
LAYERS = ("features", "logits", "spatial")
FEATURE_DIM = 2048
SPATIAL_CHANNELS = 7
IMAGE_SIZE = 299
RESIZES = {
    "tensorflow": "bilinear as TensorFlow 1, to 299",
    "clean": "bicubic with antialiasing as clean-fid, to 299",
}
"""By `Protocol.resize`: what a report says of it."""


def resize_clean(images: Tensor) -> Tensor:
    """Resize uint8 [B, 3, H, W] as clean-fid does (arXiv 2104.11222), to float32 [B, 3, 299, 299] in 0…255.

    Pillow's bicubic filter with antialiasing in floating point, without rounding; PyTorch's is the same.
    """
    sizes = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(images.float(), sizes, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


class InceptionExtractor(LayeredExtractor):
    """torch-fidelity's Inception net with one more layer, that of sFID (arXiv 2103.03841).

    "features" are the 2048 pooled values, "logits" the 1008 without bias that the Inception score is defined on, and
    "spatial" the first 7 channels of mixed_6/conv (here `Mixed_6d.branch1x1`) at 17×17 places, channels last as
    TensorFlow flattens them: 2023 values.
    """

    layers = LAYERS

    def __init__(
        self, name: str, features_list: list[str], state: dict[str, Tensor], resize: str = "tensorflow", **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.resize = resize
        ours = io.BytesIO()  # torch-fidelity unpickles its file: it gets one written here, of tensors alone
        torch.save(state, ours)
        ours.seek(0)
        self.net = create_feature_extractor(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=ours,
        )
        self.spatial: Tensor | None = None
        self.resized: Tensor | None = None
        if resize == "clean":
            self.net.Conv2d_1a_3x3.register_forward_pre_hook(self._replace)
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _replace(self, module: torch.nn.Module, inputs: Any) -> tuple[Tensor]:
        assert self.resized is not None
        return ((self.resized - 128) / 128,)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.resize == "clean":  # torch-fidelity takes bytes alone: its own resized images are replaced
            self.resized = resize_clean(images)
        features, logits = self.net(images)
        found = {"features": features, "logits": logits, "spatial": self.spatial}
        return tuple(found[layer] for layer in self.features_list)


def usual_weights_path() -> Path:
    """Where torch-fidelity keeps the weights that it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME


def find_weights(given: str | os.PathLike[str] | None) -> Path:
    """The weights file: the one given, or the one at torch-fidelity's usual place; nothing is downloaded.

    Raises:
        UserError: there is none; says which file to put where.
    """
    path = usual_weights_path() if given is None else Path(given)
    if path.is_file():
        return path
    if given is None:
        raise UserError(f"no Inception weights at {path}: download {URL_INCEPTION_V3} to there, or give --weights FILE")
    raise UserError(f"no Inception weights at {path}: there is no such file; they are at {URL_INCEPTION_V3}")


def read_weights(path: Path, allow_unknown: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of a weights file (PyTorch or safetensors) and its SHA-256, which is checked before it is opened.

    Raises:
        UserError: another file than the published one without `allow_unknown`, or one that holds something else.
    """
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 == unverified.SHA256:
        return unverified.read(content), sha256
    if sha256 != WEIGHTS_SHA256 and not allow_unknown:
        raise UserError(
            f"{path} is not the published Inception net (SHA-256 {sha256[:12]}…, not {WEIGHTS_SHA256[:12]}…); "
            "--allow-unknown-weights uses it all the same, and then no score is called FID"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(content), sha256
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the bytes lead to
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0][:120]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    return state, sha256


def create_extractor(
    state: dict[str, Tensor], path: Path, resize: str = "tensorflow", with_logits: bool = True
) -> FeatureExtractorBase:
    """The extractor with these weights, in evaluation mode on the CPU; `resize` is one of `RESIZES`."""
    layers = [layer for layer in LAYERS if with_logits or layer != "logits"]
    if EXTRACTOR_NAME not in registry.FEATURE_EXTRACTORS_REGISTRY:  # a second registration raises
        registry.register_feature_extractor(EXTRACTOR_NAME, InceptionExtractor)
    bad = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"the weights in {path} are not finite: {bad[0]}")
    try:
        return create_feature_extractor(EXTRACTOR_NAME, layers, cuda=False, verbose=False, state=state, resize=resize)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the tensors in {path} are not those of the Inception net: {reason}") from error

"""Encoders whose features a model is aligned with: any vision model of timm or transformers, by name or path."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn_dit.data.latents import where
from gspn_dit.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Taken where an encoder does not say what it was trained with."""


class FeatureNet:
    """Planes of features of images, as `gspn_dit.prepare.encoder.Encoder` asks for what it stores.

    Args:
        name: "timm:NAME", "timm:NAME@FILE" with weights of one's own, or a directory or hub name of transformers.
        image_size: pixels of the images.
        input_size: pixels that the encoder is shown; None for `image_size`.
        grid: rows and columns of the features, which are averaged or interpolated to it; None for the encoder's own.

    Raises:
        UserError: it cannot be loaded, or gives no plane of features for such images.
    """

    image_channels = 3

    def __init__(self, name: str, image_size: int, input_size: int | None = None, grid: int | None = None) -> None:
        self.place, self.image_size, self.input_size = where(name), image_size, input_size or image_size
        self.net, self.mean, self.std = _load_timm(name) if name.startswith("timm:") else _load_transformers(name)
        self.net.float().eval().requires_grad_(False)
        self.hash, self.wanted_grid = weights_hash(self.net), grid
        planes = self.moments(np.zeros((1, image_size, image_size, 3), dtype=np.uint8))
        self.moment_channels, self.size = planes.shape[1], planes.shape[2]
        """Dimensions of a feature, and rows and columns of them."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> FeatureNet:
        """Move the encoder to a device."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def moments(self, images: np.ndarray, batch_size: int = 0) -> Tensor:
        """Return features float32 [n, D, grid, grid] on the CPU of uint8 images [n, H, W, 3]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float() / 255
        if self.input_size != pixels.shape[-1]:
            size = (self.input_size, self.input_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (self.mean, self.std))
        planes = as_planes(self._features((pixels - mean) / std), self.place).float()
        return resized(planes, self.wanted_grid).cpu()

    def _features(self, pixels: Tensor) -> Tensor:
        """Return tokens [n, N, D] without those that have no place, or planes [n, D, h, w]."""
        try:
            if hasattr(self.net, "forward_features"):  # timm's
                found = self.net.forward_features(pixels)  # type: ignore[operator]
                found = found[:, getattr(self.net, "num_prefix_tokens", 0) :] if found.ndim == 3 else found
                return found.permute(0, 3, 1, 2) if getattr(self.net, "output_fmt", "") == "NHWC" else found
            config: Any = self.net.config
            options = {} if pixels.shape[-1] == config.image_size else {"interpolate_pos_encoding": True}
            found = self.net(pixel_values=pixels, **options).last_hidden_state
            side = pixels.shape[-1] // getattr(config, "patch_size", 1)
            return found[:, -side * side :] if found.ndim == 3 else found
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"--encoder {self.place} does not take images of {pixels.shape[-1]} pixels ({reason}); "
                "give another --encoder-size"
            ) from None

    def spec(self) -> dict[str, Any]:
        """Return what the features are a function of beside the images, in plain JSON values."""
        sizes = {"input_size": self.input_size, "grid": self.size, "dimensions": self.moment_channels}
        return {"encoder": self.place, "weights_sha256": self.hash, **sizes, "mean": self.mean, "std": self.std}


def as_planes(found: Tensor, place: str) -> Tensor:
    """Return tokens [n, N, D], row by row, or planes [n, D, h, w] as square planes; raises UserError for others."""
    side = int(found.shape[1] ** 0.5)
    if found.ndim == 3 and side * side == found.shape[1]:
        return found.transpose(1, 2).unflatten(2, (side, side))
    if found.ndim == 4 and found.shape[2] == found.shape[3]:
        return found
    raise UserError(f"--encoder {place} gives features of shape {list(found.shape)}, which are no square plane")


def resized(planes: Tensor, grid: int | None) -> Tensor:
    """Return planes [n, D, h, h] averaged down or interpolated up to grid × grid; None leaves them."""
    if grid is None or grid == planes.shape[-1]:
        return planes
    if grid < planes.shape[-1]:
        return F.adaptive_avg_pool2d(planes, grid)
    return F.interpolate(planes, (grid, grid), mode="bilinear")


def weights_hash(net: nn.Module) -> str:
    """Return the SHA-256 of a network's weights by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _load_timm(name: str) -> tuple[nn.Module, list[float], list[float]]:
    try:
        import timm
    except ImportError:
        raise UserError(f"--encoder {name} needs timm; pip install timm") from None
    model, _, file = name.removeprefix("timm:").partition("@")
    if file and not Path(file).is_file():
        raise UserError(f"--encoder {name}: the file {file} does not exist")
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    try:
        try:  # positions of another size than the pretrained one, where the model has some
            net = timm.create_model(model, pretrained=True, num_classes=0, dynamic_img_size=True, **options)
        except TypeError:
            net = timm.create_model(model, pretrained=True, num_classes=0, **options)
    except Exception as error:  # whatever name, file or network lead timm to
        raise _not_loaded(name, error) from None
    said: Any = net.pretrained_cfg
    return net, list(said["mean"]), list(said["std"])


def _load_transformers(name: str) -> tuple[nn.Module, list[float], list[float]]:
    from transformers import AutoModel
    from transformers.image_processing_utils import ImageProcessingMixin

    try:
        net, loading = AutoModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        if missing := [key for key in sorted(loading["missing_keys"]) if not key.startswith("pooler.")]:
            raise ValueError(f"it has no weights '{missing[0]}'")
    except Exception as error:
        raise _not_loaded(name, error) from None
    net = getattr(net, "vision_model", net)  # CLIP's and SigLIP's
    if hasattr(net, "pooler"):  # random where it was not saved, and not asked for
        net.pooler = None
    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        said = {}
    return net, list(said.get("image_mean", IMAGENET_MEAN)), list(said.get("image_std", IMAGENET_STD))


def _not_loaded(name: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"--encoder {name} cannot be loaded: {reason}; give timm:NAME, a directory, or a hub name")

"""DINOv2 (arXiv 2304.07193) from a local directory, for FD-DINOv2 (arXiv 2306.04675, 2312.02696).

The directory holds the Hugging Face form of the model: `config.json` and `model.safetensors`. Plain PyTorch reads
them; no code of the directory is run and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fid.extractor import LayeredExtractor
from gspn_dit.errors import UserError

EXTRACTOR_NAME = "gspn-dit-dinov2"
LAYERS = ("features",)
IMAGE_SIZE = 224  # pixels that images are resized to
OFFSET = 0.1  # which the published net adds to the grid when it resizes its positions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE = (1024, 24, 14)  # hidden size, depth and patch of the ViT-L/14 that FD-DINOv2 is defined on


@dataclass(frozen=True)
class VisionConfig:
    """The fields of `config.json` that decide what is computed."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    """Pixels of the images that the positions were trained for."""
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6


class Block(nn.Module):
    """x + scale₁·attention(norm(x)), then x + scale₂·mlp(norm(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size)
        self.scale1 = nn.Parameter(torch.ones(size))
        self.norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(size, config.mlp_ratio * size)
        self.fc2 = nn.Linear(config.mlp_ratio * size, size)
        self.scale2 = nn.Parameter(torch.ones(size))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        parts = [
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]  # [B, heads, N, C / heads]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        tokens = tokens + self.scale1 * self.out(mixed)
        return tokens + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


class VisionTransformer(nn.Module):
    """The DINOv2 ViT without registers; its output is the normalised class token, [B, hidden_size]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        grid = config.image_size // config.patch_size
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid * grid, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def positions_for(self, grid: int) -> Tensor:
        """The positions [1, 1 + grid², C], bicubically resized where the grid is not the trained one."""
        trained = math.isqrt(self.positions.shape[1] - 1)
        if grid == trained:
            return self.positions
        patches = self.positions[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
        scale = (grid + OFFSET) / trained
        resized = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.positions[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.project(images).flatten(2).transpose(1, 2)  # [B, N, C]
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions_for(images.shape[-1] // self.config.patch_size)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


class DINOv2Extractor(LayeredExtractor):
    """A ViT as a torch-fidelity extractor: "features" of uint8 [B, 3, H, W], resized bicubically with antialiasing."""

    layers = LAYERS

    def __init__(self, name: str, features_list: list[str], net: VisionTransformer, **_: Any) -> None:
        super().__init__(name, features_list)
        self.net = net
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = IMAGE_SIZE // self.net.config.patch_size * self.net.config.patch_size
        scaled = F.interpolate(images.float() / 255, (size, size), mode="bicubic", antialias=True)
        return (self.net((scaled - self.mean) / self.std),)


PARTS = {
    "norm1": "norm1",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.output.dense": "out",
    "norm2": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}


def own_names(depth: int) -> dict[str, str]:
    """The names of `VisionTransformer`'s tensors by those of the file."""
    names = {
        "embeddings.cls_token": "class_token",
        "embeddings.position_embeddings": "positions",
        "embeddings.patch_embeddings.projection.weight": "project.weight",
        "embeddings.patch_embeddings.projection.bias": "project.bias",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    }
    for index in range(depth):
        layer, block = f"encoder.layer.{index}", f"blocks.{index}"
        for theirs, ours in PARTS.items():
            names |= {f"{layer}.{theirs}.{kind}": f"{block}.{ours}.{kind}" for kind in ("weight", "bias")}
        names |= {f"{layer}.layer_scale{part}.lambda1": f"{block}.scale{part}" for part in (1, 2)}
    return names


def read_directory(path: str | os.PathLike[str]) -> tuple[VisionTransformer, str]:
    """Return the feature extractor of a local directory and the SHA-256 of its weights.

    Raises:
        UserError: what is missing or does not fit.
    """
    from safetensors.torch import load

    folder = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"--dinov2 {folder} has no {name}; it must hold config.json and model.safetensors of a DINOv2 model "
                "without registers (facebook/dinov2-large for the published FD-DINOv2)"
            )
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = VisionConfig(**{name: document[name] for name in VisionConfig.__annotations__ if name in document})
        content = (folder / "model.safetensors").read_bytes()
        stored = {name.removeprefix("dinov2."): tensor for name, tensor in load(content).items()}
    except Exception as error:  # damaged files raise whatever the bytes lead to
        raise UserError(f"--dinov2 {folder} cannot be read: {' '.join(str(error).split())[:160]}") from error
    net = VisionTransformer(config)
    try:
        state = {ours: stored[theirs].float() for theirs, ours in own_names(config.num_hidden_layers).items()}
        net.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"--dinov2 {folder} is no DINOv2 model that can be read: {' '.join(str(error).split())[:160]}"
        ) from error
    return net.eval().requires_grad_(False), hashlib.sha256(content).hexdigest()


def create_extractor(net: VisionTransformer) -> FeatureExtractorBase:
    """Return the feature extractor as torch-fidelity's, on the CPU."""
    if EXTRACTOR_NAME not in registry.FEATURE_EXTRACTORS_REGISTRY:  # a second registration raises
        registry.register_feature_extractor(EXTRACTOR_NAME, DINOv2Extractor)
    return create_feature_extractor(EXTRACTOR_NAME, list(LAYERS), cuda=False, verbose=False, net=net)

"""CLIP (arXiv 2103.00020) from a local directory: how well an image fits its caption (arXiv 2104.08718).

The directory holds the Hugging Face form of the model with its tokenizer. `transformers` reads it; no code of the
directory is run, and nothing is downloaded. Published figures of text-to-image are of ViT-bigG/14.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity import registry
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from fid.captions import Texts
from fid.extractor import LayeredExtractor
from fid.features import FeatureNet
from gspn_dit.errors import UserError

EXTRACTOR_NAME = "gspn-dit-clip"
LAYERS = ("features",)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILES = ("config.json", "model.safetensors", "tokenizer_config.json")
PUBLISHED = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
CHUNK = 64
"""Captions encoded at a time."""


class CLIPExtractor(LayeredExtractor):
    """A CLIP as a torch-fidelity extractor: "features", vectors of length 1, of uint8 [B, 3, H, W].

    The shorter side is resized to the net's size bicubically, with antialiasing, and the middle is cut out.
    """

    layers = LAYERS

    def __init__(self, name: str, features_list: list[str], model: Any, **_: Any) -> None:
        super().__init__(name, features_list)
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = self.model.config.vision_config.image_size
        height, width = images.shape[-2:]
        scale = size / min(height, width)
        shape = [max(size, round(side * scale)) for side in (height, width)]
        scaled = F.interpolate(images.float() / 255, shape, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - size) // 2 for side in shape)
        pixels = (scaled[..., top : top + size, left : left + size] - self.mean) / self.std
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return (F.normalize(self.model.visual_projection(pooled), dim=-1),)


def load_clip(directory: str | os.PathLike[str]) -> tuple[FeatureNet, Texts]:
    """Return a CLIP's image half as a feature extractor, and its text half.

    Raises:
        UserError: a file is missing, `transformers` is not installed, or the directory holds something else.
    """
    folder = Path(directory)
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"--clip {folder} has no {name}; it must hold a CLIP model with its tokenizer ({', '.join(FILES)}; "
                f"{PUBLISHED} for published figures)"
            )
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError:
        raise UserError("--clip needs transformers: pip install 'gspn-dit[text]'") from None
    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files raise whatever the bytes lead to
        raise UserError(f"--clip {folder} is no CLIP that can be read: {' '.join(str(error).split())[:160]}") from None
    model.eval().requires_grad_(False)
    vision, width = model.config.vision_config, model.config.projection_dim
    name = f"CLIP-{vision.hidden_size}x{vision.num_hidden_layers}"
    net = FeatureNet(
        extractor=_create_extractor(model),
        score_suffix=name,
        source=str(directory),
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        image_size=None,
        channels=3,
        feature_dim=width,
        class_names=(),
        description={"resize": f"bicubic with antialiasing, to {vision.image_size}, centre", "dtype": "float32"},
    )
    return net, Texts(lambda captions: _encode(model, tokenizer, captions), name)


@torch.no_grad()
def _encode(model: Any, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return vectors of length 1, float32 [n, width], of captions, cut where they are too long."""
    parts, place = [], next(model.parameters()).device
    length = model.config.text_config.max_position_embeddings
    for start in range(0, len(captions), CHUNK):
        texts = list(captions[start : start + CHUNK])
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(place)
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        parts.append(F.normalize(model.text_projection(pooled), dim=-1).cpu())
    return torch.cat(parts)


def _create_extractor(model: Any) -> FeatureExtractorBase:
    if EXTRACTOR_NAME not in registry.FEATURE_EXTRACTORS_REGISTRY:  # a second registration raises
        registry.register_feature_extractor(EXTRACTOR_NAME, CLIPExtractor)
    return create_feature_extractor(EXTRACTOR_NAME, list(LAYERS), cuda=False, verbose=False, model=model)

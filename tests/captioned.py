"""A text encoder that knows eight words, and pictures that are captioned with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gspn_dit.config import Config, config_from_dict

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "dog"]


def write_encoder(folder: Path) -> str:
    """Write a BERT of two layers and 16 channels."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def write_captioned(folder: Path, size: int = 8) -> Path:
    """Write 12 pictures for training and 4 for validation, each with two captions; the colour says which it is."""
    for split, count in (("train", 12), ("validation", 4)):
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            Image.new("RGB", (size, size), (20 * number, 255 - 20 * number, 0)).save(folder / split / f"{number}.png")
            animal = "cat" if number % 2 else "dog"
            rows.append({"file_name": f"{number}.png", "text": animal, "texts": [f"a {animal}", f"a red {animal}"]})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_config(output_dir: Path, data: Path, encoder: str, sections: Any = None, **training: Any) -> Config:
    """A UNet of a few thousand weights; keywords override `training` keys, `sections` whole sections' keys."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"name": "UNet"},
        "data": {"name": "imagefolder", "path": str(data), "caption_column": "texts"},
        "unet": {"channels": [8, 16], "head_channels": 8},
        "text": {"encoder": encoder, "max_tokens": 8},
        "sampling": {"steps": 2, "per_class": 1, "max_classes": 2},
        "training": {
            **{"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 2},
            **{"sample_every": 100, "validate_every": 100, "validation_images": 4, "keep_last": 10, "trackers": []},
            **training,
        },
    }
    for name, keys in (sections or {}).items():
        tree.setdefault(name, {}).update(keys)
    return config_from_dict({"task": "text-to-image", "output_dir": str(output_dir), **tree})

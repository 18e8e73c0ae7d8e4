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


def write_pipeline(folder: Path, xl: bool = False) -> str:
    """Write a Stable Diffusion of a few thousand weights, or an SDXL with its two encoders and pooled texts.

    Its autoencoder halves 16 pixels to latents 4×8×8, and its texts have 12 states of 8 channels (two of them: 16).
    """
    import diffusers
    import transformers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=12
    )
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=12, projection_dim=6, bos_token_id=52, eos_token_id=53, **sizes
    )
    added: dict[str, Any] = {}
    if xl:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        added["projection_class_embeddings_input_dim"] = 6 * 4 + 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "text_encoder": transformers.CLIPTextModel(config),
            "tokenizer": tokenizer,
            "scheduler": diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
            "unet": diffusers.UNet2DConditionModel(
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=16 if xl else 8,
                attention_head_dim=2,
                norm_num_groups=8,
                sample_size=8,
                **added,
            ),
            "vae": diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(4, 8),
                latent_channels=4,
                norm_num_groups=4,
                sample_size=16,
            ),
        }
        if xl:
            second = {
                "text_encoder_2": transformers.CLIPTextModelWithProjection(config),
                "tokenizer_2": tokenizer,
            }
            pipeline: Any = diffusers.StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
        else:
            safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts, **safety)
    pipeline.save_pretrained(folder)
    return str(folder)

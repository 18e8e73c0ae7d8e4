"""What a published model says of itself: its manifest without private places, and its README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gspn_dit.data.latents import SAVED_VAE

LIBRARY = "gspn-dit"
CODE_LICENSE = "apache-2.0"
"""Licence of this library; the default for weights."""

PUBLISHED = ("step", "model", "latent", "class_names", "config", "data", "ema")
"""Entries of a checkpoint's manifest that `save_pretrained` keeps."""
PLACES = {
    ("data", "path"): None,
    ("latent", "vae"): SAVED_VAE,
    ("training", "initialize_from"): None,
    ("training", "fd_features"): None,
}
"""Config keys that name places on the machine that trained, and what is published instead; `output_dir` is left out."""


def public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is published of a manifest: what a user needs, and no place on the machine that trained."""
    config = {name: dict(value) if isinstance(value, Mapping) else value for name, value in manifest["config"].items()}
    config.pop("output_dir", None)
    for (section, key), place in PLACES.items():
        if config.get(section, {}).get(key) is not None:
            config[section][key] = place
    return {**{key: manifest[key] for key in PUBLISHED if key in manifest}, "config": config}


def model_card(manifest: Mapping[str, Any], weights: str, license: str = CODE_LICENSE, repo_id: str = "DIR") -> str:
    """Return the model card, Markdown with the front matter that the Hugging Face Hub reads.

    Args:
        manifest: of the checkpoint: step, model, latent, class_names, config and, where known, data.
        weights: "ema" or "model".
        license: identifier of the weights' licence.
        repo_id: what `from_pretrained` is to be given.
    """
    model, config, names = manifest["model"], manifest["config"], manifest["class_names"]
    example = json.dumps(names[len(names) // 2], ensure_ascii=False)
    front_matter = {
        "library_name": LIBRARY,
        "license": license,
        "pipeline_tag": "unconditional-image-generation",
        "tags": [LIBRARY, "class-conditional-image-generation", "diffusion", "gspn"],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front_matter.items()),
        "---",
        "",
        f"# {model['name']}, {len(names)} classes",
        "",
        f"A class-conditional diffusion model: {_describe_objective(config)}, latents: {manifest['latent']['name']}.",
        "",
        "## Use",
        "",
        "```python",
        "from gspn_dit import GSPNPipeline",
        "",
        f"pipeline = GSPNPipeline.from_pretrained({json.dumps(repo_id)})",
        f"images = pipeline(class_labels=[0, {example}], num_inference_steps=50, guidance_scale=1.5).images",
        "```",
        "",
        "Image i is a function of (seed, i) and its label, whatever is generated beside it.",
        "",
        "## Training",
        "",
        f"- data: {_describe_data(manifest.get('data'))}",
        f"- {manifest.get('step', 0):,} steps of {config['training']['batch_size']} images; "
        + ("an average of the weights (EMA)" if weights == "ema" else "the weights themselves, not their average"),
        f"- options of the model: {json.dumps({key: value for key, value in model.items() if key != 'name'})}",
        "",
        "## Licence",
        "",
        f"Weights: {license}. The terms of the training data may limit what the model may be used for. "
        f"The code of {LIBRARY} is under {CODE_LICENSE}.",
        "",
        "## Classes",
        "",
        *(f"{number}. {name}" for number, name in enumerate(names)),
        "",
    ]
    return "\n".join(lines)


def _describe_objective(config: Mapping[str, Any]) -> str:
    return f"objective {config['objective']['name']}"


def _describe_data(data: Mapping[str, Any] | None) -> str:
    return f"{data['images']:,} images of '{data['name']}'" if data else "not recorded"

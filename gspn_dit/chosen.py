"""What a sweep chose, as `gspn_dit.sweep` leaves it and `gspn_dit.generate` takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspn_dit.errors import UserError

FILE = "sweep.json"
FORMAT_VERSION = 1


def read_sweep(directory: str | Path) -> dict[str, Any]:
    """Return what a finished sweep has written; raises UserError where there is none."""
    file = Path(directory) / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version, complete = found["format_version"], found["complete"]
    except FileNotFoundError:
        raise UserError(f"no sweep at {directory}: there is no {file}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the sweep {file} cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format_version {version}; this version reads {FORMAT_VERSION}")
    if not complete:
        raise UserError(f"the sweep {directory} is not finished; finish it with python -m gspn_dit.sweep … --resume")
    return found


def chosen_options(sweep: dict[str, Any]) -> dict[str, Any]:
    """Return the chosen settings by the options of `gspn_dit.generate` that take them."""
    chosen = sweep["chosen"]
    options = {key: chosen[key] for key in ("guidance_scale", "sampling_shift", "sampler", "weights")}
    return {**options, "guidance_interval": tuple(chosen["guidance_interval"]), "steps": chosen["num_inference_steps"]}


def provenance(sweep: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """Return what a set that is sampled as chosen says of the choice: among how many, of what, by which images."""
    keys = ("score_name", "num_images", "seed", "reference")
    tried = sweep["tried"]
    return {
        "directory": str(directory),
        "settings_tried": len(tried),
        "varied": [key for key in tried[0] if any(one[key] != tried[0][key] for one in tried)],
        "images_drawn": sweep["budget"]["images"],
        "score": sweep["chosen"]["score"],
        **{key: sweep[key] for key in keys},
    }

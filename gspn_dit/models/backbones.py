"""GSPN for image classification and as a backbone of other vision models (arXiv 2501.12381).

    model = gspn_tiny(num_classes=10, in_chans=1)
    logits = model(images)  # [B, 1, H, W], any height and width

`gspn_tiny`, `gspn_small` and `gspn_base` have the published widths and depths; `gspn_nano` and all `gspn2_*` are this
project's own. `import gspn_dit.timm` enters them in timm's registry.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn_dit.errors import UserError
from gspn_dit.hub import download
from gspn_dit.models.backbone_model import CONFIG_FILE, WEIGHTS_FILE, Architecture, GSPNBackbone


@dataclass(frozen=True)
class Preset:
    """An architecture, the stochastic depth that it is trained with, and the images that it is meant for."""

    architecture: Architecture
    drop_path_rate: float
    image_size: tuple[int, int] = (224, 224)


def _shared(width: int, depths: tuple[int, ...]) -> Architecture:
    """Return an architecture in the manner of GSPN-2 (arXiv 2512.07884), whose widths are not published.

    All channels share their weights, the proxy has 2 channels, and depthwise 3×3 convolutions take the place of 7×7.
    """
    widths = tuple(width * 2**stage for stage in range(4))
    own = {"proxy_channels": 2, "weight_groups": 1, "local_kernel": 0, "lpu": True, "unit_gates": True}
    return Architecture(**own, widths=widths, depths=depths)  # type: ignore[arg-type]


BACKBONES = {
    # Published (arXiv 2501.12381).
    "gspn_tiny": Preset(Architecture(), 0.2),
    "gspn_small": Preset(
        Architecture(proxy_channels=16, widths=(108, 216, 432, 864), depths=(5, 5, 10, 2), global_stages=(3,)), 0.4
    ),
    "gspn_base": Preset(Architecture(widths=(120, 240, 480, 960), depths=(4, 4, 15, 4)), 0.5),
    # This project's own: as large as the published GSPN-2, and one for images of 28 or 32 pixels.
    "gspn2_tiny": Preset(_shared(80, (2, 4, 9, 2)), 0.2),
    "gspn2_small": Preset(_shared(96, (3, 5, 15, 3)), 0.4),
    "gspn2_base": Preset(_shared(120, (4, 4, 15, 4)), 0.5),
    "gspn_nano": Preset(
        Architecture(
            expansion=1.0,
            unit_gates=True,
            unit_maps=True,
            widths=(64, 128),
            depths=(2, 2),
            global_stages=(0, 1),
            stem_blocks=1,
        ),
        0.05,
        (32, 32),
    ),
}


def create_backbone(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float | None = None,
    global_pool: str = "avg",
    **overrides: Any,
) -> GSPNBackbone:
    """Build a backbone of `BACKBONES` with random weights.

    Args:
        name: of the preset.
        num_classes, in_chans, drop_rate, global_pool: as in `GSPNBackbone`.
        drop_path_rate: as in `GSPNBackbone`; None for the preset's.
        overrides: fields of `Architecture`, such as widths, depths and stem_stride; None keeps the preset's.

    Raises:
        ValueError: an unknown name or override, or a value out of range.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone '{name}'; allowed are {', '.join(BACKBONES)}")
    preset, known = BACKBONES[name], [field.name for field in dataclasses.fields(Architecture)]
    if unknown := sorted(set(overrides) - set(known)):
        raise ValueError(f"unknown option '{unknown[0]}' of {name}; allowed are {', '.join(known)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    rate = preset.drop_path_rate if drop_path_rate is None else drop_path_rate
    architecture = dataclasses.replace(preset.architecture, **given)
    return GSPNBackbone(
        architecture, num_classes, in_chans, drop_rate, rate, global_pool, preset=name, image_size=preset.image_size
    )


def gspn_tiny(**options: Any) -> GSPNBackbone:
    """GSPN-T: 31 million parameters, 5.2·10⁹ multiply-adds at 224×224; options as in `create_backbone`."""
    return create_backbone("gspn_tiny", **options)


def gspn_small(**options: Any) -> GSPNBackbone:
    """GSPN-S: 50 million parameters, 11.7·10⁹ multiply-adds at 224×224; options as in `create_backbone`."""
    return create_backbone("gspn_small", **options)


def gspn_base(**options: Any) -> GSPNBackbone:
    """GSPN-B: 93 million parameters, 15.7·10⁹ multiply-adds at 224×224; options as in `create_backbone`."""
    return create_backbone("gspn_base", **options)


def gspn2_tiny(**options: Any) -> GSPNBackbone:
    """This project's own, of GSPN-2-T's size, with weights shared by all channels; options as in `create_backbone`."""
    return create_backbone("gspn2_tiny", **options)


def gspn2_small(**options: Any) -> GSPNBackbone:
    """This project's own, of GSPN-2-S's size, with weights shared by all channels; options as in `create_backbone`."""
    return create_backbone("gspn2_small", **options)


def gspn2_base(**options: Any) -> GSPNBackbone:
    """This project's own, of GSPN-2-B's size, with weights shared by all channels; options as in `create_backbone`."""
    return create_backbone("gspn2_base", **options)


def gspn_nano(**options: Any) -> GSPNBackbone:
    """This project's own, of two stages, for images of 28 or 32 pixels; options as in `create_backbone`."""
    return create_backbone("gspn_nano", **options)


def load_backbone(name: str | Path, **download_options: Any) -> GSPNBackbone:
    """Read a backbone that `save_pretrained` or timm's `save_for_hf` wrote, in evaluation mode.

    Args:
        name: its directory, or a repository of the Hugging Face Hub.
        download_options: of `gspn_dit.hub.download`, such as revision and token.

    Raises:
        UserError: nothing is there, or it is not one of this project's backbones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(name) if Path(name).is_dir() else download(str(name), **download_options)
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        args = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        args.setdefault("in_chans", config["pretrained_cfg"]["input_size"][0])
        model = create_backbone(config["architecture"], **args)
        model.load_state_dict(load_file(directory / WEIGHTS_FILE))
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the backbone in {name} cannot be read ({CONFIG_FILE}, {WEIGHTS_FILE}): {reason}") from None
    return model.eval()

"""Enter the classification models in timm's registry: `import gspn_dit.timm`, then `timm.create_model("gspn_tiny")`.

`features_only=True`, `out_indices`, `in_chans`, `num_classes`, `drop_path_rate` and the fields of `Architecture` are
arguments of `create_model` then.
"""

from __future__ import annotations

import functools
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module

from gspn_dit.models.backbone_blocks import GlobalResponseNorm, Residual
from gspn_dit.models.backbone_model import pretrained_cfg
from gspn_dit.models.backbones import BACKBONES, create_backbone
from gspn_dit.models.convolution import DepthwiseConv
from gspn_dit.models.scans import GSPNMixer

for _module in (DepthwiseConv, GSPNMixer, GlobalResponseNorm, Residual):
    register_notrace_module(_module)  # their way depends on shapes and dtypes, which torch.fx does not know

default_cfgs = generate_default_cfgs(
    {
        name: {**pretrained_cfg(preset.architecture, 1000, 3, preset.image_size), "license": "apache-2.0"}
        for name, preset in BACKBONES.items()
    }
)


def _create(name: str, pretrained: bool = False, **options: Any) -> Any:
    stages = len(options.get("widths") or BACKBONES[name].architecture.widths)
    features = {"out_indices": tuple(range(stages)), "feature_cls": "getter"}
    build = functools.partial(create_backbone, name)
    return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **options)


@register_model
def gspn_tiny(pretrained: bool = False, **options: Any) -> Any:
    """GSPN-T (arXiv 2501.12381)."""
    return _create("gspn_tiny", pretrained, **options)


@register_model
def gspn_small(pretrained: bool = False, **options: Any) -> Any:
    """GSPN-S (arXiv 2501.12381)."""
    return _create("gspn_small", pretrained, **options)


@register_model
def gspn_base(pretrained: bool = False, **options: Any) -> Any:
    """GSPN-B (arXiv 2501.12381)."""
    return _create("gspn_base", pretrained, **options)


@register_model
def gspn2_tiny(pretrained: bool = False, **options: Any) -> Any:
    """This project's own, of GSPN-2-T's size (arXiv 2512.07884)."""
    return _create("gspn2_tiny", pretrained, **options)


@register_model
def gspn2_small(pretrained: bool = False, **options: Any) -> Any:
    """This project's own, of GSPN-2-S's size (arXiv 2512.07884)."""
    return _create("gspn2_small", pretrained, **options)


@register_model
def gspn2_base(pretrained: bool = False, **options: Any) -> Any:
    """This project's own, of GSPN-2-B's size (arXiv 2512.07884)."""
    return _create("gspn2_base", pretrained, **options)


@register_model
def gspn_nano(pretrained: bool = False, **options: Any) -> Any:
    """This project's own, for images of 28 or 32 pixels."""
    return _create("gspn_nano", pretrained, **options)

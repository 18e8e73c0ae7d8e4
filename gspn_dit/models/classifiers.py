"""Image classifiers behind one call, `model(images [B, C, H, W]) -> logits [B, K]`: this project's, and timm's beside.

What is asked of a model beyond that is what timm's models have: `forward_features`, `forward_head`, `get_classifier`,
`set_grad_checkpointing` and `num_features`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.models.backbones import BACKBONES, create_backbone
from gspn_dit.models.scans import GSPNMixer

TIMM = "timm/"
"""What begins the name of one of timm's models."""


def create_classifier(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """Build a classifier, whose weights are drawn by torch's global generator.

    Args:
        name: of `BACKBONES`, or one of timm's models as "timm/NAME".
        num_classes: K.
        in_channels: C.
        options: of the model's constructor, by name.

    Raises:
        ValueError: an unknown name, or an option that is unknown or out of range.
    """
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), num_classes, in_channels, options)
    if name not in BACKBONES:
        raise ValueError(f"unknown classifier '{name}'; allowed are {', '.join(BACKBONES)}, and {TIMM}NAME")
    return create_backbone(name, num_classes, in_channels, **options)


def _from_timm(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"{TIMM}{name} needs timm, which is not installed; pip install timm")
    import timm

    random = [key for key, value in options.items() if "drop" in key and value]
    if random:
        raise ValueError(
            f"option {random[0]} of {TIMM}{name} draws random numbers that a resumed run would not draw again; "
            "leave it out"
        )
    try:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    except Exception as error:  # whatever name and options lead timm to
        raise ValueError(f"{TIMM}{name} cannot be built: {str(error) or type(error).__name__}") from None


def classifier_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Return the blocks of a classifier from its input on; none where they cannot be told."""
    blocks = getattr(model, "blocks", None)
    if blocks is not None:
        return list(blocks)
    stages = getattr(model, "stages", None) or [getattr(model, f"layer{number}", ()) for number in range(1, 5)]
    return [block for stage in stages for block in getattr(stage, "blocks", stage)]


def classifier_multiply_adds(model: nn.Module, channels: int, size: int) -> int:
    """Return the multiply-adds of a forward pass of one image [channels, size, size]; 0 where it cannot be run so."""
    count = getattr(model, "multiply_adds", None)
    if count is not None:
        return count(size, size)
    from torch.utils.flop_counter import FlopCounterMode

    device, training = next(model.parameters()).device, model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, channels, size, size, device=device))
    model.train(training)
    return counter.get_total_flops() // 2


def scans_working_elements(model: nn.Module, size: int) -> int:
    """Return what the largest scan of a backbone recomputes for an image of size × size; see `Mixer`."""
    most = 0
    for stage, facts in zip(getattr(model, "stages", ()), getattr(model, "feature_info", ()), strict=False):
        side = -(-size // facts["reduction"])
        scans = [module for module in stage.modules() if isinstance(module, GSPNMixer)]
        most = max([most, *(scan.working_elements(side, side) for scan in scans)])
    return most


def run_classifier(model: nn.Module, images: Tensor, keep_mask: Tensor | None) -> Tensor:
    """Return logits [B, K]; `keep_mask`, bool [branches, B], is for a model with `drop_path_rates` alone."""
    return model(images) if keep_mask is None else model(images, keep_mask)


def penultimate(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the classifier's last linear map sees, [B, num_features]."""
    return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]

"""The keys of task text-to-image: what reads the captions, and the UNet that is told them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.config.section import Section, require, require_line_count


@dataclass(frozen=True)
class TextConfig(Section):
    """What reads the captions; task text-to-image alone."""

    encoder: str = "minilm"
    """minilm, a directory or hub name of an encoder of transformers, or a diffusers pipeline's directory."""
    max_tokens: int = 32
    """What is longer is cut; a pipeline's encoders have a length of their own."""
    table: str | None = None
    """Directory of `gspn_dit.prepare.encode_text`, with every caption and prompt; null: they are encoded at the
    start."""
    prompts: list[str] = field(default_factory=list)
    """Of the previews; empty: captions of the data, evenly spaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_tokens >= 2, f"text.max_tokens is {self.max_tokens}, but must be at least 2")
        require(all(prompt.strip() for prompt in self.prompts), "text.prompts holds an empty prompt; leave it out")


@dataclass(frozen=True)
class UNetConfig(Section):
    """The diffusers UNet of task text-to-image, and what mixes its tokens; model.name is UNet then."""

    channels: list[int] = field(default_factory=lambda: [64, 128])
    """Width of each level; height and width are halved from one to the next."""
    layers_per_level: int = 1
    """Pairs of a residual and a transformer block on the way down; one more on the way up."""
    head_channels: int = 32
    """Channels of an attention head."""
    patch_size: int = 1
    """Side of the squares of a latent that become channels before the first level."""
    mixer: Literal["gspn", "attention"] = "gspn"
    """What takes the place of self-attention: scans, or nothing."""
    variant: Literal["pure", "qkv"] = "pure"
    """Where the scans' logits and gates come from; see `gspn_dit.models.unet_scans.GSPNSelfAttention`."""
    window: int | None = None
    """Lines after which a scan restarts; null: global."""
    proxy_ratio: int | None = None
    """Width of the tokens over that of the proxy; null: the variant's published one (8 or 32)."""
    skip: bool = True
    """Add what is scanned, times a linear map of the proxy."""
    weight_groups: int | None = None
    """Groups of channels that share propagation weights; null: one per channel."""
    teacher: str | None = None
    """Run directory or checkpoint of a UNet with attention, or a diffusers pipeline's directory: its weights are taken
    and kept, and scans alone are trained, to do what its self-attention does (distillation). null: from scratch."""
    teacher_inputs: bool = False
    """Give each scan what its teacher gets, and train it for the teacher's output alone; a first stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.channels), "unet.channels is empty, but must name the width of each level")
        for name in ("layers_per_level", "head_channels", "patch_size", "window", "proxy_ratio", "weight_groups"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"unet.{name} is {value}, but must be at least 1")
        require_line_count("unet.window", self.window)
        require(
            self.teacher is None or self.mixer == "gspn",
            f"unet.teacher is {self.teacher}, but unet.mixer is attention: there is nothing to teach",
        )
        require(not self.teacher_inputs or self.teacher is not None, "unet.teacher_inputs needs unet.teacher")

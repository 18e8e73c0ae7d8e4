"""The classification model (arXiv 2501.12381), with the interface that timm's models have; timm is not needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gspn_dit.files import write_whole
from gspn_dit.models.backbone_blocks import (
    NORM_EPSILON,
    BackboneBlock,
    BlockOptions,
    ConvNorm,
    ConvResidual,
    Stage,
    initialise,
)
from gspn_dit.models.flops import grid_multiply_adds

STEM_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}
"""Strides of the stem's two convolutions, by the stride of both."""
POOLS = ("avg", "")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Architecture(BlockOptions):
    """Everything that weights depend on but classes and input channels; raises ValueError for a value out of range."""

    widths: Sequence[int] = (96, 192, 384, 768)
    """Channels of each stage."""
    depths: Sequence[int] = (2, 2, 7, 2)
    """Blocks of each stage."""
    global_stages: Sequence[int] = (2, 3)
    """Stages, from 0, with global propagation in their first seven blocks and every seventh; all others are local."""
    stem_stride: int = 4
    """1, 2 or 4: stride of the first stage; each further stage has twice that of the one before."""
    stem_blocks: int = 0
    """Residual pairs of 3×3 convolutions between the stem's two convolutions."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "global_stages"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON and YAML have lists
        stages = len(self.widths)
        for wrong, message in (
            (stages < 1, "widths is empty; give the channels of each stage"),
            (len(self.depths) != stages, f"widths gives {stages} stages and depths {len(self.depths)}"),
            (min(self.widths, default=2) < 2, f"widths is {self.widths}, but must be at least 2 each"),
            (min(self.depths, default=1) < 1, f"depths is {self.depths}, but must be at least 1 each"),
            (
                not {*self.global_stages} <= {*range(stages)},
                f"global_stages is {self.global_stages}, but the stages are 0 to {stages - 1}",
            ),
            (self.stem_stride not in STEM_STRIDES, f"stem_stride is {self.stem_stride}, but must be 1, 2 or 4"),
            (self.stem_blocks < 0, f"stem_blocks is {self.stem_blocks}, but must be at least 0"),
            (self.window < 1, f"window is {self.window}, but must be at least 1"),
            (self.expansion * min(self.widths, default=2) < 1, f"expansion {self.expansion} leaves no channel"),
            (
                self.local_kernel < 0 or self.local_kernel % 2 == 0 < self.local_kernel,
                f"local_kernel is {self.local_kernel}, but must be odd, or 0 for none",
            ),
        ):
            if wrong:
                raise ValueError(message)

    def is_global(self, stage: int, block: int) -> bool:
        """Tell whether a block, both numbers from 0, propagates over the whole image."""
        return stage in self.global_stages and (block < 7 or (block + 1) % 7 == 0)


def pretrained_cfg(
    architecture: Architecture, num_classes: int, in_chans: int, image_size: tuple[int, int] = (224, 224)
) -> dict[str, Any]:
    """Return what timm asks of a model: how images are prepared, and the names of first and last layer."""
    stride = architecture.stem_stride * 2 ** (len(architecture.widths) - 1)
    return {
        "num_classes": num_classes,
        "input_size": (in_chans, *image_size),
        "pool_size": tuple(-(-size // stride) for size in image_size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head",
    }


class GSPNBackbone(nn.Module):
    """A pyramid of GSPN blocks: a stem, stages on halved grids, and LayerNorm, average pool and a linear classifier.

    Any height and width, odd ones too. Methods and attributes are those of timm's models, and mean the same.

    Args:
        architecture: widths, depths and what blocks are made of.
        num_classes: 0 for the pooled features instead of logits.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, drawn from PyTorch's generator.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first; see `forward`.
        global_pool: "avg", or "" with num_classes=0 for feature maps as output.
        preset: the preset that the architecture changes; saved files name it.
        image_size: height and width that the model is meant for; any other will do.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        preset: str = "gspn_tiny",
        image_size: tuple[int, int] = (224, 224),
    ) -> None:
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}, but must lie in [0, 1)")
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}, but must be at least 1")
        self.preset, self.image_size, self.architecture = preset, image_size, architecture
        self.in_chans, self.drop_rate, self.global_pool = in_chans, drop_rate, global_pool
        widths, depths = architecture.widths, architecture.depths
        first, second = STEM_STRIDES[architecture.stem_stride]
        half = widths[0] // 2
        between = [ConvResidual(half) for _ in range(architecture.stem_blocks)]
        self.stem = nn.Sequential(
            ConvNorm(in_chans, half, first), nn.GELU(), *between, ConvNorm(half, widths[0], second)
        )
        rates = [drop_path_rate * block / max(1, sum(depths) - 1) for block in range(sum(depths))]
        self.drop_path_rates = [rate for rate in rates for _ in range(2)]
        """Probability of each row of `keep_mask` that stochastic depth drops a branch; each block has two."""
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            begin = sum(depths[:stage])
            blocks = [
                BackboneBlock(
                    width,
                    architecture,
                    None if architecture.is_global(stage, block) else architecture.window,
                    rates[begin + block],
                    begin + block,
                    sum(depths),
                )
                for block in range(depth)
            ]
            self.stages.append(Stage(ConvNorm(widths[stage - 1], width, 2) if stage else nn.Identity(), blocks))
            reduction = architecture.stem_stride * 2**stage
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{stage}"})
        self.num_features = self.head_hidden_size = widths[-1]
        self.norm: nn.Module = nn.LayerNorm(widths[-1], eps=NORM_EPSILON)
        self.head: nn.Module = nn.Identity()
        initialise(self, architecture.unit_maps, architecture.unit_gates)
        self.reset_classifier(num_classes, global_pool)
        self.pretrained_cfg = self.default_cfg = pretrained_cfg(architecture, num_classes, in_chans, image_size)

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Return logits [B, num_classes] of images [B, in_chans, H, W], or features without a classifier.

        `keep_mask` is bool [branches, B], False where stochastic depth drops a sample's branch, each row with the
        probability that `drop_path_rates` gives; drawn by sample number, it makes training exact to resume. Without
        one, training draws from PyTorch's generator and evaluation drops nothing.
        """
        return self.forward_head(self.forward_features(images, keep_mask))

    def forward_features(self, images: Tensor, keep_mask: Tensor | None = None) -> Tensor:
        """Return the last stage's features behind the norm, [B, C, h, w]."""
        tokens = self.stem(images.permute(0, 2, 3, 1))
        for stage in self.stages:
            tokens = stage(tokens, keep_mask)
        return self.norm(tokens).permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of features [B, C, h, w]; with `pre_logits` what the classifier would see, [B, C]."""
        pooled = features.mean((2, 3)) if self.global_pool else features
        if self.drop_rate:
            pooled = nn.functional.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        keep_mask: Tensor | None = None,
    ) -> Any:
        """Return features of stages, and the last stage's with them.

        Args:
            images, keep_mask: as in `forward`.
            indices: which stages; a number for so many last ones, None for all.
            norm: send the last stage's features through the norm.
            stop_early: leave out stages behind the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediate features.
            intermediates_only: return the list alone.

        Returns:
            (what `forward_features` returns, or with `stop_early` the features of the last stage that ran, and a list
            of features), or the list.

        Raises:
            ValueError: an unknown format, or a stage that there is not.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"unknown output_fmt '{output_fmt}'; allowed are NCHW and NHWC")
        taken, last = self._taken(indices), len(self.stages) - 1
        intermediates = []
        tokens = self.stem(images.permute(0, 2, 3, 1))
        for number, stage in enumerate(self.stages):
            tokens = stage(tokens, keep_mask)
            if number in taken:
                features = self.norm(tokens) if norm and number == last else tokens
                intermediates.append(features.permute(0, 3, 1, 2) if output_fmt == "NCHW" else features)
            if number == max(taken) and (stop_early or intermediates_only):
                break
        if intermediates_only:
            return intermediates
        if number == last:
            tokens = self.norm(tokens)
        return tokens.permute(0, 3, 1, 2), intermediates

    # -- head and stages -----------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, an identity with num_classes=0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, on its device and in its dtype; 0 classes for none."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS:
            raise ValueError(f"unknown global_pool '{pool}'; allowed are 'avg' and '' for none")
        if num_classes < 0 or (num_classes and not pool):
            raise ValueError(f"num_classes is {num_classes}, but must be at least 0, and 0 with global_pool=''")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes:
            weight = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            initialise(self.head)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages behind the last of `indices`, with norm and classifier then; return the stages as numbers.

        A model without its norm has no pretrained counterpart, and is not saved.
        """
        taken = self._taken(indices)
        cut = max(taken) < len(self.stages) - 1
        self.stages = self.stages[: max(taken) + 1]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[max(taken)]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return taken

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if not indices or not all(-count <= index < count for index in indices):
            raise ValueError(f"stages {list(indices)} are asked for, but there are 0 to {count - 1}")
        return [index % count for index in indices]

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        """Return all blocks, first to last."""
        return [block for stage in self.stages for block in stage.blocks]  # type: ignore[union-attr]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks alone in training, and recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort parameters into layers, or stages if `coarse`; for layer-wise learning rates."""
        layers = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else layers}

    def no_weight_decay(self) -> set[str]:
        """Return the names of what weight decay leaves alone: biases, norms and merge weights."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    # -- cost ----------------------------------------------------------------------------------------------------

    def multiply_adds(self, height: int, width: int) -> int:
        """Count the multiply-adds of a forward pass of one image, as `flops.forward_multiply_adds` does."""
        total = sum(part.weight.numel() for part in self.head.modules() if isinstance(part, nn.Linear))
        for part in [*self.stem, *(each for stage in self.stages for each in (stage.downsample, *stage.blocks))]:  # type: ignore[misc]
            if isinstance(part, ConvNorm):
                stride = part.conv.stride[0]
                height, width = -(-height // stride), -(-width // stride)
            total += grid_multiply_adds(part, height, width)
        return total

    # -- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights and config, which `load_backbone` reads, and timm as "local-dir:…" and from the Hub.

        Raises ValueError for a model without its norm.
        """
        from safetensors.torch import save

        if isinstance(self.norm, nn.Identity):
            raise ValueError("this backbone lost its last layers to prune_intermediate_layers and cannot be saved")
        config = {
            "architecture": self.preset,
            "num_classes": self.num_classes,
            "pretrained_cfg": pretrained_cfg(self.architecture, self.num_classes, self.in_chans, self.image_size),
            "model_args": {**dataclasses.asdict(self.architecture), "in_chans": self.in_chans},
        }
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_whole(Path(directory) / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
        write_whole(Path(directory) / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

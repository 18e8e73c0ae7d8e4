"""Other projects' names for the weights of a DiT: the original code's, and those of diffusers' `DiTTransformer2DModel`.

Both lay out a patch's outputs as (row, column, channel) and ours as (channel, row, column). diffusers repeats timestep
and class embedding in every block; those of block 0 are taken once the others are found equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gspn_dit.errors import UserError
from gspn_dit.models.embeddings import sincos_positions

_EMBEDDER = "transformer_blocks.{}.norm1.emb."


@dataclass(frozen=True)
class Layout:
    """How a project names the modules of a DiT; `{}` stands for the number of a block."""

    modules: Mapping[str, tuple[str, ...]]
    """Theirs for each of ours; several are stacked."""
    block: re.Pattern[str]
    """Matches the name of a block's tensor; group 1 is its number."""
    spare: re.Pattern[str]
    """Names of tensors that hold nothing to learn, or repeat others."""
    timestep_endpoint: bool
    """See `TimestepEmbedding`."""
    mlp_norm_epsilon: float

    def sources(self, depth: int) -> dict[str, tuple[str, ...]]:
        """Return the names of the tensors that each of our tensors is made of."""
        return {
            f"{ours.format(number)}.{part}": tuple(f"{name.format(number)}.{part}" for name in theirs)
            for ours, theirs in self.modules.items()
            for number in (range(depth) if "{}" in ours else [0])
            for part in (["weight"] if ours == "class_embed" else ["weight", "bias"])
        }


LAYOUTS = {
    "dit": Layout(
        modules={
            "patch_embed": ("x_embedder.proj",),
            "timestep_embed.expand": ("t_embedder.mlp.0",),
            "timestep_embed.mix": ("t_embedder.mlp.2",),
            "class_embed": ("y_embedder.embedding_table",),
            "blocks.{}.modulation": ("blocks.{}.adaLN_modulation.1",),
            "blocks.{}.mixer.qkv": ("blocks.{}.attn.qkv",),
            "blocks.{}.mixer.proj": ("blocks.{}.attn.proj",),
            "blocks.{}.expand": ("blocks.{}.mlp.fc1",),
            "blocks.{}.contract": ("blocks.{}.mlp.fc2",),
            "output.modulation": ("final_layer.adaLN_modulation.1",),
            "output.linear": ("final_layer.linear",),
        },
        block=re.compile(r"blocks\.(\d+)\."),
        spare=re.compile(r"pos_embed"),
        timestep_endpoint=False,
        mlp_norm_epsilon=1e-6,
    ),
    "diffusers": Layout(
        modules={
            "patch_embed": ("pos_embed.proj",),
            "timestep_embed.expand": (_EMBEDDER + "timestep_embedder.linear_1",),
            "timestep_embed.mix": (_EMBEDDER + "timestep_embedder.linear_2",),
            "class_embed": (_EMBEDDER + "class_embedder.embedding_table",),
            "blocks.{}.modulation": ("transformer_blocks.{}.norm1.linear",),
            "blocks.{}.mixer.qkv": tuple(f"transformer_blocks.{{}}.attn1.to_{letter}" for letter in "qkv"),
            "blocks.{}.mixer.proj": ("transformer_blocks.{}.attn1.to_out.0",),
            "blocks.{}.expand": ("transformer_blocks.{}.ff.net.0.proj",),
            "blocks.{}.contract": ("transformer_blocks.{}.ff.net.2",),
            "output.modulation": ("proj_out_1",),
            "output.linear": ("proj_out_2",),
        },
        block=re.compile(r"transformer_blocks\.(\d+)\."),
        spare=re.compile(r"transformer_blocks\.\d+\.norm1\.emb\..*|pos_embed\.pos_embed"),
        timestep_endpoint=True,
        mlp_norm_epsilon=1e-5,
    ),
}


@dataclass(frozen=True)
class Shape:
    """What the weights of a DiT say about its size."""

    hidden_size: int
    depth: int
    patch_size: int
    num_classes: int
    in_channels: int
    out_channels: int


def convert_weights(theirs: Mapping[str, Tensor], layout_name: str) -> tuple[dict[str, Tensor], Shape]:
    """Turn the weights of a DiT in a layout of `LAYOUTS` into those of `gspn_dit.models.DiT`, float32.

    Raises:
        UserError: they are not a DiT's, tensors are missing or unexpected, or repeated embeddings differ.
    """
    layout = LAYOUTS[layout_name]
    numbers = [int(match[1]) for match in map(layout.block.match, theirs) if match]
    if not numbers:
        other = next((name for name, other in LAYOUTS.items() if any(map(other.block.match, theirs))), None)
        hint = f"; they are in the layout of --from {other}" if other else ""
        raise UserError(f"these are not the weights of a DiT in the layout '{layout_name}': no blocks in them{hint}")
    sources = layout.sources(max(numbers) + 1)
    needed = {name for names in sources.values() for name in names}
    _refuse("are missing", sorted(needed - set(theirs)))
    _refuse("are not a DiT's", sorted(name for name in set(theirs) - needed if not layout.spare.fullmatch(name)))
    _check_repeated(theirs, layout, needed)
    stacks = {name: [theirs[part].float() for part in parts] for name, parts in sources.items()}
    ours = {name: torch.cat(stack) if len(stack) > 1 else stack[0] for name, stack in stacks.items()}
    patches = ours["patch_embed.weight"]  # [C, in_channels, p, p]
    if patches.dim() != 4:
        raise UserError(f"the patch embedding has shape {list(patches.shape)}, but must be a convolution's")
    hidden_size, in_channels, patch_size, _ = patches.shape
    ours["patch_embed.weight"] = patches.flatten(1)
    for name in ("output.linear.weight", "output.linear.bias"):
        rows = ours[name].unflatten(0, (patch_size**2, -1))  # [p·p, out_channels, …]
        ours[name] = rows.transpose(0, 1).flatten(0, 1).contiguous()
    return ours, Shape(
        hidden_size=hidden_size,
        depth=max(numbers) + 1,
        patch_size=patch_size,
        num_classes=len(ours["class_embed.weight"]) - 1,
        in_channels=in_channels,
        out_channels=len(ours["output.linear.bias"]) // patch_size**2,
    )


def _refuse(problem: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise UserError(f"{len(names)} tensors of the weights {problem}: {shown}")


def _check_repeated(theirs: Mapping[str, Tensor], layout: Layout, needed: set[str]) -> None:
    """Refuse embeddings that differ from block to block: this model has one."""
    for name, tensor in theirs.items():
        match = layout.block.match(name)
        if match and name not in needed:
            first = name.replace(f".{match[1]}.", ".0.", 1)
            if first not in theirs or not torch.equal(tensor, theirs[first]):
                raise UserError(f"{name} differs from {first}, but a DiT has one timestep and one class embedding")


def grid_of_positions(positions: Tensor) -> int:
    """Return the side of the square grid whose fixed positions [1, N, C] these are.

    Raises UserError if they are not DiT's sines and cosines, which this model computes itself.
    """
    side = round(positions.shape[-2] ** 0.5)
    steps = torch.arange(side)
    fixed = sincos_positions(steps, steps, positions.shape[-1]).flatten(0, 1)
    given = positions.float().reshape(-1, positions.shape[-1])
    if given.shape != fixed.shape or not torch.allclose(given, fixed, rtol=0, atol=1e-3):
        raise UserError(f"pos_embed {list(positions.shape)} are not the fixed sines and cosines of a square grid")
    return side

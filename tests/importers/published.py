"""Random weights in the layouts of other projects, written down independently of `gspn_dit.importers.layouts`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTH, HEADS, DEPTH, CLASSES, SIZE = 32, 2, 3, 5, 8


def diffusers_dit(**options: Any) -> Any:
    """A small DiTTransformer2DModel whose every weight shows in its output, and whose blocks embed alike."""
    from diffusers import DiTTransformer2DModel

    arguments = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_layers": DEPTH}
    arguments |= {"in_channels": 4, "out_channels": 8, "sample_size": SIZE, "num_embeds_ada_norm": CLASSES}
    model = DiTTransformer2DModel(**{**arguments, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def positions(width: int, side: int) -> Tensor:
    """The table pos_embed [1, N, C] of an original checkpoint, in float64 numpy: columns first, then rows."""
    omega = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    halves = [f(np.outer(at, omega)) for at in (columns, rows) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()[None]


def original_layout(model: Any) -> dict[str, Tensor]:
    """The weights of a DiTTransformer2DModel under the names of the original code's checkpoints."""
    theirs = model.state_dict()
    state = {"pos_embed": positions(model.inner_dim, model.config.sample_size // model.config.patch_size)}

    def rename(new: str, *old: str) -> None:
        for part in ("weight", "bias"):
            if f"{old[0]}.{part}" in theirs:
                state[f"{new}.{part}"] = torch.cat([theirs[f"{name}.{part}"] for name in old])

    embedder = "transformer_blocks.0.norm1.emb"
    rename("x_embedder.proj", "pos_embed.proj")
    rename("t_embedder.mlp.0", f"{embedder}.timestep_embedder.linear_1")
    rename("t_embedder.mlp.2", f"{embedder}.timestep_embedder.linear_2")
    rename("y_embedder.embedding_table", f"{embedder}.class_embedder.embedding_table")
    rename("final_layer.adaLN_modulation.1", "proj_out_1")
    rename("final_layer.linear", "proj_out_2")
    for number in range(len(model.transformer_blocks)):
        new, old = f"blocks.{number}", f"transformer_blocks.{number}"
        rename(f"{new}.adaLN_modulation.1", f"{old}.norm1.linear")
        rename(f"{new}.attn.qkv", *(f"{old}.attn1.to_{letter}" for letter in "qkv"))
        rename(f"{new}.attn.proj", f"{old}.attn1.to_out.0")
        rename(f"{new}.mlp.fc1", f"{old}.ff.net.0.proj")
        rename(f"{new}.mlp.fc2", f"{old}.ff.net.2")
    return state

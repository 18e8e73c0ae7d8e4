"""Inception with random weights: for plumbing, never for figures. `python -m tests.fid.random_inception FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_random_inception(path: Path, seed: int = 0) -> Path:
    """Write a state dict that the Inception net loads, scaled so that activations neither vanish nor explode."""
    source = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch(source, return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None),
    ):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    torch.save(net.state_dict(), path)
    return path


if __name__ == "__main__":
    write_random_inception(Path(sys.argv[1]))

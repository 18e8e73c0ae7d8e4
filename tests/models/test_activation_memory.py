"""What a block keeps for its backward pass, against the same block in ordinary operations."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.memory import gradient_difference, plain_block, saved_bytes
from gspn_dit.models.gspn import GSPNBlock


@pytest.mark.parametrize("autocast", [False, True])
def test_block_keeps_at_most_a_quarter_of_the_bytes(autocast: bool) -> None:
    torch.manual_seed(0)
    block = GSPNBlock(64)
    tokens = torch.randn(4, 16, 16, 64, requires_grad=True)
    parameters = list(block.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = saved_bytes(functools.partial(block, tokens), parameters)
        plain = saved_bytes(functools.partial(plain_block, block, tokens), parameters)
    assert plain > 26 * tokens.numel() * (2 if autocast else 4)  # 20 logits and gates per value among them
    assert kept <= plain / 4


def test_gradients_equal_those_of_the_plain_block() -> None:
    assert gradient_difference(channels=32, side=5) <= 1e-10


def test_values_equal_those_of_the_plain_block_bit_for_bit() -> None:
    torch.manual_seed(0)
    block = GSPNBlock(32)
    tokens = torch.randn(2, 4, 5, 32)
    assert torch.equal(block(tokens), plain_block(block, tokens))
    scale = torch.tensor([0.0, 1.25])
    assert torch.equal(block(tokens, scale), plain_block(block, tokens, scale))
    assert torch.equal(block(tokens, scale)[0], tokens[0])

"""Patches, timesteps, class labels and the modulated output, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspn_dit.models.embeddings import (
    SMOOTH,
    ClassEmbedding,
    ModulatedOutput,
    TimestepEmbedding,
    patchify,
    unpatchify,
)


def test_patchify_by_hand() -> None:
    image = torch.arange(16).reshape(1, 1, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 2, 2, 4)
    assert patches[0, 0, 0].tolist() == [0, 1, 4, 5]
    assert patches[0, 0, 1].tolist() == [2, 3, 6, 7]
    assert patches[0, 1, 0].tolist() == [8, 9, 12, 13]


def test_patchify_keeps_channels_together() -> None:
    image = torch.arange(8).reshape(1, 2, 2, 2)  # channel 0 holds 0…3, channel 1 holds 4…7
    assert patchify(image, 2)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    patch_size=st.integers(1, 4),
)
def test_unpatchify_inverts_patchify(sizes: tuple[int, int, int, int], patch_size: int) -> None:
    batch, channels, height, width = sizes
    image = torch.randn(batch, channels, height * patch_size, width * patch_size)
    patches = patchify(image, patch_size)
    assert patches.shape == (batch, height, width, channels * patch_size**2)
    assert torch.equal(unpatchify(patches, patch_size), image)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_patchify_names_the_size_and_the_patch(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"a latent of {shape[0]}×{shape[1]} is not divisible by the patch size 2"):
        patchify(torch.zeros(1, 1, *shape), 2)


def test_timestep_sinusoids_by_hand() -> None:
    embedding = TimestepEmbedding(4, frequencies=4)
    inputs = []
    embedding.expand.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    embedding(torch.tensor([0.0, 700.0]))
    # Frequencies 1 and 10000^(-1/2); cosines come first.
    assert inputs[0][0].tolist() == [1, 1, 0, 0]
    expected = [math.cos(700), math.cos(7), math.sin(700), math.sin(7)]
    assert inputs[0][1].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_scale_slows_every_sinusoid() -> None:
    """At the scale 0.01, timestep 700 is seen as 7; so half a hundredth of time turns no sinusoid by over 0.1."""
    embedding, inputs = TimestepEmbedding(4, frequencies=4, scale=SMOOTH), []
    embedding.expand.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    embedding(torch.tensor([700.0, 705.0]))
    expected = [math.cos(7), math.cos(0.07), math.sin(7), math.sin(0.07)]
    assert inputs[0][0].tolist() == pytest.approx(expected, abs=1e-6)
    assert (inputs[0][1] - inputs[0][0]).abs().max() < 0.05


def test_an_embedding_imitates_another() -> None:
    """What it can say it says exactly; of a curve with noise upon it, it says the curve."""
    torch.manual_seed(0)
    smooth, other, steep = (
        TimestepEmbedding(32, scale=SMOOTH),
        TimestepEmbedding(32, scale=SMOOTH),
        TimestepEmbedding(32),
    )
    timesteps = torch.linspace(0, 1000, 77)
    smooth.imitate(other, ridge=1e-12)
    torch.testing.assert_close(smooth(timesteps), other(timesteps), atol=1e-3, rtol=0)

    def noisy(times: torch.Tensor) -> torch.Tensor:
        return other(times) + 0.02 * torch.sin(torch.outer(times, torch.linspace(1, 3, 32)))

    steep.forward = noisy  # type: ignore[method-assign]
    smooth.imitate(steep, ridge=1e-6)
    assert (smooth(timesteps) - other(timesteps)).abs().max() < 0.01


def test_timestep_sinusoids_with_an_endpoint_by_hand() -> None:
    embedding = TimestepEmbedding(4, frequencies=6, endpoint=True)
    inputs = []
    embedding.expand.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    embedding(torch.tensor([900.0]))
    # Frequencies 1, 10000^(-1/2) and 1/10000.
    expected = [math.cos(900), math.cos(9), math.cos(0.09), math.sin(900), math.sin(9), math.sin(0.09)]
    assert inputs[0][0].tolist() == pytest.approx(expected, abs=1e-4)


def test_timestep_embedding_tells_times_apart() -> None:
    torch.manual_seed(0)
    embedded = TimestepEmbedding(16)(torch.linspace(0, 1000, 21))
    assert torch.pdist(embedded).min() > 1e-2


def test_class_embedding_has_one_vector_more_than_classes() -> None:
    embedding = ClassEmbedding(3, 5)
    assert embedding.weight.shape == (4, 5)
    assert torch.equal(embedding(torch.tensor([3]))[0], embedding.weight[3])
    with pytest.raises(IndexError):
        embedding(torch.tensor([4]))


def test_modulated_output_starts_at_zero() -> None:
    output = ModulatedOutput(8, 2, 3)
    assert torch.equal(output(torch.randn(2, 4, 5, 8), torch.randn(2, 8)), torch.zeros(2, 4, 5, 12))


def test_modulated_output_by_hand() -> None:
    """With a linear map that copies: (normed token)·(1 + scale) + shift, shift first in the modulation."""
    output = ModulatedOutput(2, 1, 2)
    with torch.no_grad():
        output.linear.weight.copy_(torch.eye(2))
        output.modulation.bias.copy_(torch.tensor([10.0, 20.0, 1.0, 2.0]))
    tokens = torch.tensor([[[[3.0, 5.0]]]])  # normalised: -1, 1
    result = output(tokens, torch.zeros(1, 2))
    torch.testing.assert_close(result, torch.tensor([[[[10.0 - 2.0, 20.0 + 3.0]]]]), atol=1e-4, rtol=0)


def test_modulation_sees_the_conditioning_through_silu() -> None:
    output = ModulatedOutput(2, 1, 2)
    with torch.no_grad():
        output.linear.weight.copy_(torch.eye(2))
        output.modulation.weight[:2].copy_(torch.eye(2))
    shift = output(torch.zeros(1, 1, 1, 2), torch.tensor([[1.0, -2.0]]))
    expected = [1 / (1 + math.exp(-1)), -2 / (1 + math.exp(2))]
    assert shift.flatten().tolist() == pytest.approx(expected)

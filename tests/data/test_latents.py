"""The identity latent and the way back to 8 bits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspn_dit.config import LatentConfig
from gspn_dit.data.latents import IdentityLatent, create_latent, latent_from_spec, to_uint8
from gspn_dit.errors import UserError


def test_all_256_values_survive_the_round_trip() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    latent = IdentityLatent(16, 1)
    np.testing.assert_array_equal(latent.decode(latent.encode(pixels)), pixels)


def test_encoding_by_hand() -> None:
    """v / 127.5 - 1, channels first."""
    pixels = np.array([[[[0, 255, 51], [102, 153, 204]]]], dtype=np.uint8)  # [1, 1, 2, 3]
    encoded = IdentityLatent(2, 3).encode(pixels)
    assert encoded.dtype == torch.float32
    assert encoded.shape == (1, 3, 1, 2)
    expected = [[-1, 102 / 127.5 - 1], [1, 153 / 127.5 - 1], [51 / 127.5 - 1, 204 / 127.5 - 1]]
    torch.testing.assert_close(encoded[0, :, 0], torch.tensor(expected))


def test_encoding_takes_views_and_leaves_them_alone() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    mirrored = pixels[:, :, ::-1]
    encoded = IdentityLatent(2, 3).encode(mirrored)
    assert torch.equal(encoded, IdentityLatent(2, 3).encode(mirrored.copy()))
    assert torch.equal(encoded, IdentityLatent(2, 3).encode(pixels).flip(3))
    np.testing.assert_array_equal(pixels.ravel(), np.arange(24))


@pytest.mark.parametrize(
    ("value", "pixel"),
    [
        (-1.0, 0),  # 0.5
        (1.0, 255),  # 255.5
        (0.0, 128),  # 128
        (-0.001, 127),  # 127.8725: cut off, not rounded
        (0.0078, 128),  # 128.9945
        (0.00785, 129),  # 129.000875
        (-7.0, 0),
        (7.0, 255),
        (-1.005, 0),  # -0.1375: clamped before it is cut off
        (0.9999, 255),  # 255.48725
    ],
)
def test_8_bits_are_cut_off_not_rounded(value: float, pixel: int) -> None:
    """127.5·x + 128, clamped to [0, 255], truncated: ADM's protocol."""
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == pixel


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_8_bits_follow_the_formula(values: list[float]) -> None:
    expected = [int(min(max(float(np.float32(127.5 * np.float32(v)) + np.float32(128)), 0.0), 255.0)) for v in values]
    images = torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)
    assert to_uint8(images).ravel().tolist() == expected


def test_8_bits_are_channels_last_and_keep_the_batch() -> None:
    images = (torch.arange(24).reshape(2, 3, 2, 2) - 128) / 127.5
    pixels = to_uint8(images)
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.uint8, (2, 2, 2, 3), True)
    np.testing.assert_array_equal(pixels, np.arange(24).reshape(2, 3, 2, 2).transpose(0, 2, 3, 1))
    assert to_uint8(torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2, 3)


def test_8_bits_of_other_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert to_uint8(torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=dtype).reshape(1, 1, 2, 2)).ravel().tolist() == [
            *(0, 128, 191, 255),
        ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_counted(bad: float) -> None:
    images = torch.zeros(5, 3, 2, 2)
    images[1, 2, 0, 1] = bad
    images[1, 0, 0, 0] = bad  # twice in one image
    images[4, 0, 1, 1] = bad
    with pytest.raises(UserError, match=r"2 of 5 samples hold NaN or infinite values: .*; use an earlier checkpoint"):
        to_uint8(images)
    with pytest.raises(UserError, match="2 of 5"):
        IdentityLatent(2, 3).decode(images)


def test_spec_round_trip() -> None:
    latent = create_latent(LatentConfig(), 28, 3)
    assert (latent.size, latent.channels) == (28, 3)
    spec = json.loads(json.dumps(latent.spec()))
    assert spec == {"name": "identity", "image_size": 28, "image_channels": 3}
    again = latent_from_spec(spec)
    assert type(again) is type(latent)
    assert (again.size, again.channels, again.spec()) == (28, 3, spec)


@pytest.mark.parametrize("spec", [{"name": "magic"}, {}])
def test_unknown_latent_is_refused_by_name(spec: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"latent '{spec.get('name')}' is not known"):
        latent_from_spec(spec)

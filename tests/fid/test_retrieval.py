"""Retrieval of captions: the regression against its closed form, and which caption is the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fid.retrieval import CaptionMap, retrieved


def test_the_nearest_caption_by_hand() -> None:
    """Of the second image, (1, 1), the first caption is as near as the second; the third image is nearer to b."""
    captions = ["a", "b", "a"]
    vectors = torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    predicted = torch.tensor([[2.0, 0.1], [0.1, 1.0], [0.4, 0.5]])
    assert retrieved(predicted, vectors, captions).tolist() == [True, True, False]
    assert retrieved(predicted, vectors, captions, among=2).all()


def test_a_caption_that_occurs_twice_is_one_to_choose() -> None:
    vectors = torch.eye(2)[[0, 0, 1]]
    assert retrieved(torch.eye(2)[[0, 0, 0]], vectors, ["a", "a", "b"]).tolist() == [True, True, False]


def test_the_map_is_the_ridge_regression_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    features, vectors = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (5, 3))
    fitted = CaptionMap.fit(features, vectors, ridge=0.7)
    centred = (features - features.mean(dim=0)).numpy()
    inputs = np.hstack([centred / np.linalg.norm(centred, axis=1, keepdims=True), np.ones((40, 1))])
    rows = np.vstack([inputs, np.sqrt(0.7) * np.eye(6)])  # ridge as rows of a plain least-squares problem
    weights = np.linalg.lstsq(rows, np.vstack([vectors.numpy(), np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(fitted.weights.numpy(), weights, rtol=1e-9, atol=1e-12)
    expected = inputs @ weights
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted(features).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_images_of_their_captions_are_found_whatever_the_vectors_length(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=-1)
    features = vectors @ torch.randn(8, 20, generator=generator)
    captions = [str(number) for number in range(30)]
    fitted = CaptionMap.fit(features, vectors, ridge=1e-3)
    assert retrieved(fitted(features), scale * vectors, captions).all()
    assert retrieved(fitted(features.roll(1, 0)), vectors, captions).mean() < 0.2

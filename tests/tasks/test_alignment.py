"""Alignment of hidden tokens with precomputed features (arXiv 2410.06940)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gspn_dit import rng
from gspn_dit.checkpoint import find_checkpoints, load_tensors
from gspn_dit.data.features import ArrayFeatures, load_array
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from gspn_dit.tasks.alignment import Alignment, spatially_normalised
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, tensors_of

IMAGES, TOKENS, DIMENSIONS = 1437, 4, 6
"""The digits' training images, and tokens of 8×8 pixels in patches of 4."""


@pytest.fixture
def features(tmp_path: Path) -> str:
    path = tmp_path / "features.npy"
    np.save(path, np.random.default_rng(0).normal(size=(IMAGES, TOKENS, DIMENSIONS)).astype(np.float16))
    return str(path)


def test_loss_is_the_mean_cosine_of_projected_tokens_and_the_images_features(tmp_path: Path, features: str) -> None:
    config = tiny_config(tmp_path, repa_features=features, repa_depth=2, repa_weight=0.25)
    model = create_model("GSPN-N/4", 10, 1, 8, hidden_size=16, depth=2)
    alignment = Alignment(config, model, ArrayFeatures(load_array(features, TOKENS, IMAGES)))
    outputs = []
    model.blocks[1].register_forward_hook(lambda block, arguments, output: outputs.append(output))
    with alignment.reading(model):
        model(torch.randn(3, 1, 8, 8), torch.full((3,), 500.0), torch.arange(3))
    numbers = range(40, 43)
    projected = alignment.projector(outputs[0].flatten(1, 2)).double()
    wanted = torch.from_numpy(np.load(features)[rng.data_indices(config.seed, numbers, IMAGES)]).double()
    cosine = (projected * wanted).sum(-1) / (projected.norm(dim=-1) * wanted.norm(dim=-1))
    found = alignment.loss(numbers, rng.data_indices(config.seed, numbers, IMAGES))
    assert found.item() == pytest.approx(0.25 * (1 - cosine.mean().item()), rel=1e-5)


def test_alignment_changes_the_model_but_not_its_files_and_resumes_bit_for_bit(tmp_path: Path, features: str) -> None:
    options = {"repa_features": features, "repa_depth": 2}
    run_training(tiny_config(tmp_path / "plain"))
    run_training(tiny_config(tmp_path / "whole", **options))
    run_training(tiny_config(tmp_path / "parted", **options, max_steps=2))
    run_training(tiny_config(tmp_path / "parted", **options), resume="auto")
    whole, plain = tensors_of(tmp_path / "whole", 4), tensors_of(tmp_path / "plain", 4)
    assert_same_tensors(whole, tensors_of(tmp_path / "parted", 4))
    assert whole.keys() == plain.keys()
    assert not torch.equal(whole["model/blocks.0.in_proj.weight"], plain["model/blocks.0.in_proj.weight"])
    projectors = [load_tensors(find_checkpoints(tmp_path / name)[4], "repa") for name in ("whole", "parted")]
    assert_same_tensors(*projectors)


def test_checkpointed_blocks_are_aligned_alike(tmp_path: Path, features: str) -> None:
    options = {"repa_features": features, "repa_depth": 2, "max_steps": 2}
    run_training(tiny_config(tmp_path / "kept", **options))
    run_training(tiny_config(tmp_path / "again", **options, activation_checkpointing=True))
    assert_same_tensors(tensors_of(tmp_path / "kept", 2), tensors_of(tmp_path / "again", 2))


@pytest.mark.parametrize(
    "training, data, message",
    [
        ({"repa_depth": 9}, {}, r"training\.repa_depth is 9, but the model has 3 blocks"),
        ({"repa_features": "none.npy"}, {}, r"training\.repa_features none\.npy cannot be read"),
        ({}, {"horizontal_flip": True}, r"has no features of mirrored images, as data\.horizontal_flip needs"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, features: str, training: dict[str, object], data: dict[str, object], message: str
) -> None:
    config = tiny_config(tmp_path / "run", **{"repa_features": features, "repa_depth": 2, **training})
    with pytest.raises(UserError, match=message):
        run_training(changed(config, data=data))
    assert not (tmp_path / "run").exists()


def test_features_of_other_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((5, TOKENS, DIMENSIONS)))
    with pytest.raises(UserError, match=r"has shape \[5, 4, 6\], but 1437 training images of 4 tokens need"):
        run_training(tiny_config(tmp_path / "run", repa_features=str(tmp_path / "few.npy"), repa_depth=2))


@pytest.mark.parametrize("name", ["features.npz", "words.npy"])
def test_files_that_hold_no_numbers_are_refused(tmp_path: Path, name: str) -> None:
    features = np.zeros((IMAGES, TOKENS, DIMENSIONS), dtype=np.float16)
    if name.endswith(".npz"):
        np.savez(tmp_path / name, features=features)
    else:
        np.save(tmp_path / name, features.astype("U1"))
    with pytest.raises(UserError, match=r"holds no floating-point array; save one with numpy\.save"):
        load_array(str(tmp_path / name), TOKENS, IMAGES)


def test_features_less_what_an_image_shares_by_hand() -> None:
    """Two tokens at 1 and 5: mean 3, deviation √8 (of two, with Bessel's correction)."""
    found = spatially_normalised(torch.tensor([[[1.0, 7.0], [5.0, 7.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[-2 / 8**0.5, 0.0], [2 / 8**0.5, 0.0]]]))


def test_a_convolution_of_the_plane_of_tokens_is_learnt_and_resumes(tmp_path: Path, features: str) -> None:
    options = {"repa_features": features, "repa_depth": 2, "repa_projector": "conv", "repa_normalise": True}
    run_training(tiny_config(tmp_path / "whole", **options))
    run_training(tiny_config(tmp_path / "parted", **options, max_steps=2))
    run_training(tiny_config(tmp_path / "parted", **options), resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 4), tensors_of(tmp_path / "parted", 4))
    first, last = (load_tensors(find_checkpoints(tmp_path / "whole")[step], "repa") for step in (2, 4))
    assert first["weight/weight"].shape == (DIMENSIONS, 16, 3, 3)
    assert not torch.equal(first["weight/weight"], last["weight/weight"])


@pytest.mark.slow
def test_compiled_blocks_are_aligned_as_eager_ones(tmp_path: Path, features: str) -> None:
    options = {"repa_features": features, "repa_depth": 2, "max_steps": 2}
    run_training(tiny_config(tmp_path / "eager", **options))
    run_training(tiny_config(tmp_path / "compiled", **options, compile=True))
    eager, compiled = (tensors_of(tmp_path / name, 2) for name in ("eager", "compiled"))
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4, msg=name)

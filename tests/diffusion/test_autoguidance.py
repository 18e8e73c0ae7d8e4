"""Guiding away from a weaker model (arXiv 2406.02507)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gspn_dit.config import ObjectiveConfig
from gspn_dit.diffusion import Guidance, create_objective, sample_latents
from gspn_dit.errors import UserError
from gspn_dit.pipeline import GSPNPipeline
from tests.tiny import CLASS_NAMES, write_run


def constant(value: float) -> object:
    def model(latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        assert (class_labels < 7).all()  # neither is ever asked without a class
        return torch.full_like(latents, value) + class_labels[:, None, None, None]

    return model


def test_one_euler_step_by_hand() -> None:
    """weak + w (strong - weak) = 1 + 3 (2 - 1) = 4, plus the label: from noise 0 at t = 1, data is -(4 + label)."""
    objective = create_objective(ObjectiveConfig())
    latents = sample_latents(
        constant(2.0),  # type: ignore[arg-type]
        objective,
        torch.zeros(2, 1, 1, 1),
        torch.tensor([0, 5]),
        7,
        1,
        Guidance(3.0),
        "euler",
        guide=constant(1.0),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(latents.flatten(), torch.tensor([-4.0, -9.0]))


def test_a_model_that_guides_itself_changes_nothing_and_another_does(tmp_path: Path) -> None:
    strong, weak = write_run(tmp_path / "strong", seed=0), write_run(tmp_path / "weak", seed=5)
    options = {"num_inference_steps": 2, "output_type": "np"}
    plain = GSPNPipeline.from_checkpoint(strong)([0, 1], **options).images
    by_itself = GSPNPipeline.from_checkpoint(strong).guide_with(strong)([0, 1], guidance_scale=3.0, **options).images
    assert np.abs(by_itself.astype(int) - plain).max() <= 1
    guided = GSPNPipeline.from_checkpoint(strong).guide_with(weak)([0, 1], guidance_scale=3.0, **options).images
    assert np.abs(guided.astype(int) - plain).max() > 10


def test_a_guide_of_other_classes_is_refused(tmp_path: Path) -> None:
    strong = write_run(tmp_path / "strong")
    other = write_run(tmp_path / "other", class_names=[*CLASS_NAMES[:-1], "owl"])
    with pytest.raises(UserError, match="cannot guide this model: it has other classes"):
        GSPNPipeline.from_checkpoint(strong).guide_with(other)

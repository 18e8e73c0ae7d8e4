"""Training with the epsilon objective, whose model predicts twice the channels: validation, grids, resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gspn_dit.checkpoint import find_checkpoints, read_manifest
from gspn_dit.diffusion import Guidance, draw_latents
from gspn_dit.errors import UserError
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.tasks import class_conditional, create_task
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of


def epsilon_config(output_dir: Path, sampling: dict[str, Any] | None = None, **training: Any) -> Any:
    return changed(tiny_config(output_dir, **training), objective={"name": "epsilon"}, sampling=sampling or {})


def test_a_run_validates_draws_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    every: dict[str, Any] = {"validate_every": 2, "sample_every": 2}
    run_training(epsilon_config(whole, **every))
    run_training(epsilon_config(parted, **every, max_steps=2))
    run_training(epsilon_config(parted, **every), resume="auto")
    assert_same_tensors(tensors_of(whole, 4), tensors_of(parted, 4))
    assert metrics_of(whole) == metrics_of(parted)
    assert sum("val_loss" in line for line in metrics_of(whole)) == 2
    for name in ("step-00000002.png", "step-00000004.png"):
        assert (whole / "samples" / name).read_bytes() == (parted / "samples" / name).read_bytes()
    assert read_manifest(find_checkpoints(whole)[4])["model"]["out_channels"] == 2
    pipeline = GSPNPipeline.from_checkpoint(whole)
    assert pipeline([3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_grids_are_drawn_as_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler, the guided channels, and the seed and indices that the noise of its steps depends on."""
    calls: list[tuple[Any, ...]] = []

    def remember(*arguments: Any, **options: Any) -> Tensor:
        calls.append((arguments, options))
        return draw_latents(*arguments, **options)

    monkeypatch.setattr(class_conditional, "draw_latents", remember)
    sampling = {"steps": 2, "guidance_scale": 1.5, "guidance_interval": (0.1, 0.9), "guidance_channels": 1}
    sampling |= {"per_class": 2, "max_classes": 3, "sampler": "heun"}
    task = create_task(dataclasses.replace(changed(tiny_config(tmp_path), sampling=sampling), seed=11))
    task.preview(task.model, tmp_path / "grid.png")
    ((arguments, options),) = calls
    assert arguments[2] == (1, 8, 8)
    assert arguments[3].tolist() == [0, 0, 1, 1, 2, 2]
    assert arguments[4:] == (10, 2, 11, range(6))
    assert options == {"guidance": Guidance(1.5, (0.1, 0.9), 1), "sampler": "heun"}
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"sampler": "heun"}, "unknown sampler 'heun'; allowed are ddpm, ddim, dpm++, unipc"),
        ({"steps": 1001}, "sampler 'ddpm' takes at most 1000 steps, not 1001"),
        ({"guidance_channels": 3}, "sampling.guidance_channels is 3, but the latent has 1 channels"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused_before_training(
    tmp_path: Path, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_training(epsilon_config(tmp_path / "run", sampling))
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()

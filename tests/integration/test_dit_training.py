"""A DiT goes through the same training, checkpoints and sampling as every other model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gspn_dit.config import parse_train_arguments
from gspn_dit.models import DiT
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.training.loop import train

TINY = (
    *("--config", "configs/demo.yaml", "--model.name", "DiT-N/2", "--model.depth", "2", "--model.hidden_size", "16"),
    *("--training.batch_size", "8", "--training.max_steps", "3", "--training.warmup_steps", "0"),
    *("--training.trackers", "[]", "--training.validation_images", "8", "--sampling.steps", "2"),
)


@pytest.mark.parametrize("mixer", ["attention", "gspn"])
def test_train_and_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixer: str) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    options = ("--model.mixer", mixer, "--training.activation_checkpointing", "true", "--output_dir", str(tmp_path))
    train(parse_train_arguments([*TINY, *options]))
    pipelines = [GSPNPipeline.from_checkpoint(tmp_path, weights) for weights in ("model", "ema")]
    for pipeline in pipelines:
        assert isinstance(pipeline.model, DiT)
        assert pipeline.model.mixer == mixer
    gates = pipelines[0].model.blocks[0].modulation.weight
    assert bool((gates != 0).any())  # adaLN-Zero has left zero, so gradients reached it
    images = [pipeline([3, 7], num_inference_steps=2, output_type="np").images for pipeline in pipelines]
    assert images[0].shape == (2, 8, 8, 1) and images[0].dtype == np.uint8

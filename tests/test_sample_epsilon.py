"""`sample.py` and the pipeline with a checkpoint of the epsilon objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspn_dit import generate
from gspn_dit.config import Config, ObjectiveConfig
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.sample import parse_arguments, run
from tests.tiny import model_arguments, save_checkpoint, tiny_manifest

CHANNELS = 3


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model predicts the noise and variance values of three channels."""
    arguments = {**model_arguments(CHANNELS), "out_channels": 2 * CHANNELS}
    model = create_model(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("epsilon")
    config = Config(objective=ObjectiveConfig("epsilon")).to_dict()
    save_checkpoint(path, 100, {"ema": model.state_dict()}, tiny_manifest(CHANNELS, model=arguments, config=config))
    return path


def drawn(run_directory: Path, tmp_path: Path, *options: str) -> np.ndarray:
    file = tmp_path / "images.npz"
    arguments = ["--checkpoint", str(run_directory), "--save-npz", str(file), "--device", "cpu", "--classes", "0"]
    run(parse_arguments([*arguments, "--steps", "4", *options]))
    return np.load(file)["arr_0"]


def test_the_sampler_is_ddpm_unless_another_is_named(run_directory: Path, tmp_path: Path) -> None:
    images = {
        name: drawn(run_directory, tmp_path, "--per-class", "60", "--sampler", name)
        for name in ("ddpm", "ddim", "dpm++", "unipc")
    }
    np.testing.assert_array_equal(drawn(run_directory, tmp_path, "--per-class", "60"), images["ddpm"])
    assert not np.array_equal(images["ddim"], images["ddpm"])
    assert all(image.shape == (60, 4, 4, CHANNELS) for image in images.values())


def test_images_of_a_stochastic_sampler_depend_on_seed_and_index_alone(run_directory: Path) -> None:
    pipeline = GSPNPipeline.from_checkpoint(run_directory)

    def images(count: int, **options: Any) -> np.ndarray:
        result = pipeline([0] * count, num_inference_steps=3, output_type="np", **options).images
        assert isinstance(result, np.ndarray)
        return result

    whole = images(70)
    np.testing.assert_array_equal(images(2), whole[:2])
    np.testing.assert_array_equal(images(6, first_index=64), whole[64:])
    assert not np.array_equal(images(2, seed=1), whole[:2])


def test_guided_channels(run_directory: Path, tmp_path: Path) -> None:
    """One step of DDIM: channels that are not guided are those of the conditional prediction alone."""
    options = ("--per-class", "2", "--sampler", "ddim", "--steps", "1")
    plain = drawn(run_directory, tmp_path, *options, "--guidance-scale", "1")
    everywhere = drawn(run_directory, tmp_path, *options, "--guidance-scale", "9")
    some = drawn(run_directory, tmp_path, *options, "--guidance-scale", "9", "--guidance-channels", "2")
    np.testing.assert_array_equal(some[..., :2], everywhere[..., :2])
    np.testing.assert_array_equal(some[..., 2], plain[..., 2])
    assert not np.array_equal(everywhere[..., 2], plain[..., 2])
    assert not np.array_equal(everywhere[..., 0], plain[..., 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "euler"), "unknown sampler 'euler'; allowed are ddpm, ddim, dpm++, unipc"),
        (("--steps", "1001"), "sampler 'ddpm' takes at most 1000 steps, not 1001"),
        (("--guidance-channels", "4"), "guidance of 4 channels, but the latent has 3"),
        (("--guidance-channels", "0"), "--guidance-channels is 0, but must be all or a number of at least 1"),
        (("--guidance-channels", "rgb"), "--guidance-channels is rgb, but must be all or a number of at least 1"),
    ],
)
def test_mistakes(run_directory: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        drawn(run_directory, tmp_path, *options)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sampler", "goes_on"), [("ddpm", False), ("ddim", True)])
def test_a_set_of_older_step_noise_is_not_continued(
    run_directory: Path, tmp_path: Path, sampler: str, goes_on: bool
) -> None:
    """Earlier versions drew a stochastic sampler's noise otherwise, and did not say how."""
    words = ["--checkpoint", str(run_directory), "--out", str(tmp_path / "set"), "--device", "cpu", "--steps", "2"]
    words += ["--num-samples", "3", "--sampler", sampler]
    generate.run(generate.parse_arguments(words))
    file = tmp_path / "set" / "generation.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    assert settings.pop("step_noise", None) == (None if goes_on else "Philox, counted by image and step")
    file.write_text(json.dumps({**settings, "complete": False}), encoding="utf-8")
    next((tmp_path / "set").glob("*.png")).unlink()
    options = generate.parse_arguments([*words, "--resume"])
    if goes_on:
        return generate.run(options)
    with pytest.raises(UserError, match='was begun with step_noise = null, this run has "Philox, counted'):
        generate.run(options)
    return None

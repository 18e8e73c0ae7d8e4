"""The quick distance: the right number, from the same seeds, in many processes, and no trace in the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fid.extraction import extract
from fid.features import load_feature_net
from fid.metrics import frechet_distance
from fid.quick import load_scorer
from gspn_dit.config import Config, TrainArguments
from gspn_dit.data.images import load_images
from gspn_dit.diffusion import draw_noise, sample_latents
from gspn_dit.errors import UserError
from gspn_dit.tasks import create_task
from gspn_dit.training.quick_fd import QuickFD
from tests.training.conftest import changed, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of


class Brightness:
    """A scorer whose features are the mean and the deviation of an image, and whose distance is that of the means."""

    name, feature_dim = "FD-brightness", 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def features(self, pixels: np.ndarray, device: str) -> torch.Tensor:
        self.batches.append(len(pixels))
        flat = torch.from_numpy(pixels).float().flatten(1)
        return torch.stack([flat.mean(dim=1), flat.std(dim=1)], dim=1)

    def distance(self, features: torch.Tensor, reference: torch.Tensor) -> float:
        if not torch.isfinite(features).all():
            raise UserError("not finite")
        return float((features.mean(dim=0) - reference.mean(dim=0)).square().sum())


def train(config: Config, load: Any = load_scorer) -> None:
    from gspn_dit.training import loop

    AcceleratorState._reset_state(reset_partial_state=True)
    loop.train(TrainArguments(config, None, False), load)


def quick_lines(run_directory: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "quick_fd" in line]


def test_it_is_the_distance_of_samples_by_hand(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, fd_every=1, fd_samples=70)
    task = create_task(config)
    quick = QuickFD(config, task, Accelerator(cpu=True), load_scorer)
    assert quick.name == "FD-digits"
    labels = torch.arange(70) % 10
    latents = sample_latents(
        task.model, task.objective, draw_noise(config.seed, range(70), (1, 8, 8)), labels, 10, config.sampling.steps
    )
    net = load_feature_net("digits")
    drawn = extract(net, task.latent.decode(latents)).features
    real = extract(net, load_images("digits", None, "train").pixels()).features
    assert quick(task.model) == pytest.approx(frechet_distance(drawn, real), rel=1e-3)


def test_processes_share_the_work(tmp_path: Path) -> None:
    """What two processes compute adds up to what one computes, bit by bit."""
    config = tiny_config(tmp_path, fd_every=1, fd_samples=150)
    task = create_task(config)

    class One:
        """One of several processes, which adds nothing of the others."""

        device = torch.device("cpu")

        def __init__(self, index: int, processes: int) -> None:
            self.process_index, self.num_processes = index, processes

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return tensor

    def features(index: int, processes: int) -> tuple[torch.Tensor, list[int]]:
        scorer = Brightness()
        one: Any = One(index, processes)
        quick = QuickFD(config, task, one, lambda *arguments: scorer)
        return quick._features(150, lambda indices: task.draw(task.model, indices)), scorer.batches

    whole, sizes = features(0, 1)
    shares = [features(index, 2) for index in range(2)]
    assert (sizes, [share[1] for share in shares]) == ([64, 64, 22], [[64, 22], [64]])
    assert torch.equal(shares[0][0] + shares[1][0], whole)


def test_it_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    scorer = Brightness()
    train(tiny_config(tmp_path / "with", fd_every=2, fd_samples=3, class_dropout=0.3), lambda *arguments: scorer)
    train(tiny_config(tmp_path / "without", class_dropout=0.3))
    assert_same_tensors(tensors_of(tmp_path / "with", 4), tensors_of(tmp_path / "without", 4))
    with_it = [line for line in metrics_of(tmp_path / "with") if "quick_fd" not in line]
    assert with_it == metrics_of(tmp_path / "without")


def test_what_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny_config(tmp_path, max_steps=5, fd_every=2, fd_samples=3), lambda *arguments: Brightness())
    lines = quick_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]  # and the last step
    for line in lines:
        assert (line["quick_fd_samples"], line["quick_fd_comparable"]) == (3, False)
        assert line["quick_fd"] > 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "quick" in line]
    assert (
        printed[0]
        == f"step 2: quick FD-brightness {lines[0]['quick_fd']:.4g} of 3 samples (not comparable with others)"
    )


def test_samples_that_are_not_finite_are_null_and_do_not_end_the_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, fd_every=1, fd_samples=3)
    task = create_task(config)
    quick = QuickFD(config, task, Accelerator(cpu=True), lambda *arguments: Brightness())
    assert math.isfinite(quick(task.model))
    with torch.no_grad():
        next(task.model.parameters()).fill_(math.nan)
    assert math.isnan(quick(task.model))


def test_what_the_scorer_is_asked_for(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Brightness:
        asked.append(arguments)
        return Brightness()

    config = tiny_config(tmp_path, fd_every=1, fd_samples=3, fd_features="some.file")
    QuickFD(config, create_task(config), Accelerator(cpu=True), load)
    assert asked == [("some.file", "digits", 8, 1)]


@pytest.mark.parametrize(
    ("settings", "load", "message"),
    [
        (
            {"fd_samples": 64},
            load_scorer,
            "training.fd_samples is 64, but FD-digits has 64 features and needs at least 65",
        ),
        ({"fd_features": "missing"}, load_scorer, "no feature extractor 'missing'"),
        ({}, None, "training.fd_every needs a feature extractor, which train.py hands in; start train.py"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], load: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        train(tiny_config(tmp_path / "run", fd_every=2, **settings), load)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_which_net_scores_which_images() -> None:
    assert load_scorer(None, "digits", 8, 1).name == "FD-digits"
    assert load_scorer("digits", "others", 8, 1).feature_dim == 64
    for arguments, message in (
        ((None, "others", 8, 1), "none is bundled for the data set 'others'; give training.fd_features"),
        (
            ("digits", "others", 32, 3),
            "reads images of 8 pixels with 1 channels, these have 32 with 3; give another net",
        ),
    ):
        with pytest.raises(UserError) as caught:
            load_scorer(*arguments)
        assert message in str(caught.value)


def test_it_may_be_turned_on_and_off_on_resume(tmp_path: Path) -> None:
    from gspn_dit.training.run_directory import MAY_DIFFER

    assert {"training.fd_every", "training.fd_samples", "training.fd_features"} <= set(MAY_DIFFER)
    with pytest.raises(UserError, match=r"training\.fd_every is 0, but must be null or at least 1"):
        changed(tiny_config(tmp_path, fd_every=0))


def test_stream_without_held_out_images_is_refused_before_a_net_is_looked_for(tmp_path: Path) -> None:
    config = changed(tiny_config(tmp_path, fd_every=2), data={"name": "hf", "path": "somewhere", "streaming": True})
    task = create_task(tiny_config(tmp_path))
    task.config, task.validation_data = config, None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="a stream without a validation split has no images to compare with"):
        QuickFD(config, task, Accelerator(cpu=True), load_scorer)

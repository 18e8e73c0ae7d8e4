"""The comparison of whole models, on the CPU with two tiny ones."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import models
from gspn_dit.errors import UserError

TINY = ["--device", "cpu", "--dtype", "float32", "--batch", "2", "--latent-size", "8", "--steps", "2"]


def test_measures_a_step_and_a_forward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    models.main([*TINY, "--only", "GSPN-N/2"])
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == "GSPN-N/2"
    for what in ("train_step", "forward"):
        row = result[what]
        assert row["images_per_second"] == pytest.approx(2e3 / row["best_ms"], rel=1e-2)
        assert row["images_per_second"] >= row["median_images_per_second"] > 0
        assert row["peak_bytes"] > 4 * result["parameters"]


def test_ratios_are_of_the_first_model_to_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"a": {"images_per_second": 3.0, "peak_bytes": 10}, "b": {"images_per_second": 2.0, "peak_bytes": 40}}
    monkeypatch.setattr(
        models, "_in_a_process", lambda name, options: dict.fromkeys(("train_step", "forward"), figures[name])
    )
    report = models.compare(models._options([*TINY, "--models", "a", "b", "--train-steps", "0"]))
    assert report["ratio"]["forward"] == report["ratio"]["train_step"] == {"images_per_second": 1.5, "peak_bytes": 0.25}
    assert report["settings"]["batch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], r"^--batch is 0, but must be at least 1$"),
        (["--train-steps", "1"], r"^--train-steps is 1, but must be 0 or at least 2$"),
    ],
)
def test_refuses_what_cannot_be_measured(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.main([*TINY, *arguments])


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gspn_dit.ops.cuda.binding.problem", lambda: "PyTorch sees no CUDA device")
    with pytest.raises(UserError, match=r"^the models cannot be measured on a GPU: PyTorch sees no CUDA device$"):
        models.main(["--device", "cuda"])


@pytest.mark.slow
def test_trains_and_resumes() -> None:
    """Both processes of train.py: four steps, each logged once, with the loss going on where it stopped."""
    options: argparse.Namespace = models._options([*TINY, "--train-steps", "4"])
    result = models.train_and_resume("DiT-N/2", options)
    assert (result["steps"], result["resumed_at"]) == (4, 2)
    assert all(0 < value < 10 for value in result["loss"].values())


@pytest.mark.slow
def test_a_failing_run_says_why() -> None:
    options = models._options([*TINY, "--train-steps", "2", "--latent-size", "7"])
    with pytest.raises(UserError, match=r"^DiT-N/2 did not train to step 1: .*not divisible by the patch size"):
        models.train_and_resume("DiT-N/2", options)

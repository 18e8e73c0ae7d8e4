"""Losses that explode: skipped, counted, gone back from, and all of it the same after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn_dit.checkpoint import find_checkpoints, read_manifest
from gspn_dit.errors import UserError
from gspn_dit.training import guard, loop
from gspn_dit.training.guard import SpikeGuard
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", 4)


def step(watcher: SpikeGuard, loss: float, took: bool = True) -> bool:
    """Let a guard judge a loss; a spike, or what is not finite, is skipped. Return whether it is a spike."""
    spike = bool(watcher.judge(torch.tensor(loss)))
    watcher.follow(torch.tensor(float(took and not spike and math.isfinite(loss))))
    return spike


def made(patience: int = 3) -> SpikeGuard:
    return SpikeGuard(5.0, patience, torch.device("cpu"))


def test_a_spike_is_far_above_the_median_of_the_steps_taken() -> None:
    watcher = made()
    assert not any(step(watcher, loss) for loss in (1e6, 2.0, 1.0, 3.0))  # too few to judge by
    assert watcher.window.tolist() == [1e6, 2.0, 1.0, 3.0]  # median 2: 10 is the limit
    assert not step(watcher, 10.0)
    assert step(watcher, 15.1)  # of 2, 1, 3, 10 the median is 2 again
    assert not step(watcher, math.nan) and not step(watcher, math.inf)  # skipped, for another reason
    assert watcher.window.tolist() == [2.0, 1.0, 3.0, 10.0]
    assert (int(watcher.spikes), int(watcher.skipped_in_a_row), int(watcher.taken_in_a_row)) == (1, 3, 0)
    assert not step(watcher, 4.0)
    assert (int(watcher.skipped_in_a_row), int(watcher.taken_in_a_row)) == (0, 1)


def test_a_checkpoint_is_good_once_the_steps_after_it_were_taken() -> None:
    watcher = made(patience=3)
    for number in range(1, 10):
        step(watcher, 1.0)
        assert not watcher.must_go_back(number)
        if number == 4:
            watcher.saved(4)
        assert watcher.good == (4 if number == 9 else None)  # asked at 6, too early, and at 9
        assert watcher.needed == ({4} if number >= 4 else set())
    watcher.saved(9)
    for number in range(10, 16):
        assert step(watcher, 100.0)
        assert watcher.must_go_back(number) == (number in (12, 15))
    watcher.went_back()
    assert (watcher.good, watcher.candidate, watcher.returns) == (4, None, 1)
    assert not watcher.must_go_back(15)


def test_saved_state_is_all_there_is() -> None:
    first, second = made(), made()
    for loss in (1.0, 2.0, 1 / 3):
        step(first, loss)
    first.saved(3)
    second.restore(first.state())
    assert second.state() == first.state()
    losses = (math.pi, 90.0, 2.0, math.nan, 80.0, 81.0)
    assert [step(first, loss) for loss in losses] == [step(second, loss) for loss in losses]
    assert second.state() == first.state() and int(first.spikes) == 3


# -- in a run --------------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = 1e3) -> None:
    """Multiply the losses of some steps."""
    original = loop.Trainer.micro_losses

    def micro_losses(trainer: loop.Trainer, numbers: range) -> dict[str, torch.Tensor]:
        losses = original(trainer, numbers)
        return {name: loss * factor for name, loss in losses.items()} if trainer.step in steps else losses

    monkeypatch.setattr(loop.Trainer, "micro_losses", micro_losses)


def guarded(output_dir: Path, **training: Any) -> Any:
    settings = {"max_steps": 24, "checkpoint_every": 4, "spike_ratio": 20.0, "max_spikes": 3, "keep_last": 1}
    return tiny_config(output_dir, **{**settings, **training})


def test_a_planted_spike_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {9})
    run_training(guarded(tmp_path, max_steps=10, checkpoint_every=1, keep_last=10))
    assert_same_tensors(tensors_of(tmp_path, 9), tensors_of(tmp_path, 10))
    last = metrics_of(tmp_path)[-2]
    assert (last["spikes"], last["nonfinite_steps"]) == (1, 0) and last["loss"] > 100


def test_without_a_guard_the_spike_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, {9})
    run_training(guarded(tmp_path, max_steps=10, checkpoint_every=1, keep_last=10, spike_ratio=None))
    before, after = (tensors_of(tmp_path, step)["model/patch_embed.weight"] for step in (9, 10))
    assert not torch.equal(before, after) and "spikes" not in metrics_of(tmp_path)[-2]


def test_a_run_goes_back_and_on_the_same_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spikes in steps 13 to 18: at 15 and 18 the weights are those of step 4 again, whose checkpoint was kept."""
    plant(monkeypatch, set(range(12, 18)))
    run_training(guarded(tmp_path / "whole"))
    line = "step 15: 3 steps in a row were skipped as the loss exploded; weights, averages and optimiser are those"
    assert f"{line} of step 4 again" in capsys.readouterr().out
    original = loop.Trainer.train_step

    def dies(trainer: loop.Trainer) -> Any:
        if trainer.step == died_at:
            raise RuntimeError("killed")
        return original(trainer)

    for died_at in (11, 14, 17, 19):
        run = tmp_path / str(died_at)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(loop.Trainer, "train_step", dies)
            run_training(guarded(run))
        run_training(guarded(run), resume="auto")
        assert_same_tensors(tensors_of(tmp_path / "whole", 24), tensors_of(run, 24))
        assert metrics_of(tmp_path / "whole") == metrics_of(run)
        states = [read_manifest(find_checkpoints(place)[24])["spike_guard"] for place in (tmp_path / "whole", run)]
        assert states[0] == states[1]
    assert (states[0]["spikes"], states[0]["good"]) == (6, 20)


def test_a_return_brings_back_weights_averages_and_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, set(range(12, 15)))
    run_training(guarded(tmp_path, max_steps=15, checkpoint_every=1, keep_last=20))
    manifest = read_manifest(find_checkpoints(tmp_path)[15])
    good = manifest["spike_guard"]["good"]
    assert_same_tensors(tensors_of(tmp_path, good), tensors_of(tmp_path, 15))
    assert manifest["ema"] == read_manifest(find_checkpoints(tmp_path)[good])["ema"]


@pytest.mark.parametrize(
    ("steps", "said"),
    [(range(5, 24), "none is good yet"), (range(12, 40), "3 returns to step 4 did not help")],
)
def test_where_nothing_helps_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: range, said: str
) -> None:
    plant(monkeypatch, set(steps))
    with pytest.raises(UserError, match=f"3 steps in a row up to step .* no checkpoint to go back to .{said}"):
        run_training(guarded(tmp_path, max_steps=40))


def test_few_step_objectives_are_judged_by_their_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loss is bounded whatever explodes."""
    original = loop.Trainer.micro_losses

    def micro_losses(trainer: loop.Trainer, numbers: range) -> dict[str, torch.Tensor]:
        losses = original(trainer, numbers)
        return {**losses, "error": losses["error"] * (1e3 if trainer.step == 6 else 1)}

    monkeypatch.setattr(loop.Trainer, "micro_losses", micro_losses)
    config = changed(guarded(tmp_path, max_steps=8, spike_ratio=100.0), objective={"name": "flow_map"})
    run_training(config)
    assert metrics_of(tmp_path)[-2]["spikes"] == 1

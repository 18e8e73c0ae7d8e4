"""Training is deterministic and resumes bit-exactly: accumulation, skipped steps, signals, what is written."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn_dit.checkpoint import find_checkpoints, read_manifest
from gspn_dit.config import Config
from gspn_dit.data.batches import Batches
from gspn_dit.errors import UserError
from gspn_dit.training import loop
from tests.training.conftest import changed, run_training, tiny_config


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    directory = find_checkpoints(run)[step]
    return {
        f"{stem}/{name}": tensor
        for stem in ("model", "ema", "optimizer")
        for name, tensor in load_file(directory / f"{stem}.safetensors").items()
    }


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The logged lines without what depends on the machine: speed and memory."""
    machine = {"images_per_second", "model_flops_per_second", "peak_memory_bytes"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in machine} for line in lines]


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def poison_batches(monkeypatch: pytest.MonkeyPatch, steps: set[int], batch_size: int = 8) -> None:
    """Make the training batches of some steps NaN."""
    original = Batches.shuffled

    def shuffled(self: Batches, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        latents, labels = original(self, numbers)
        return (latents * float("nan") if numbers[0] // batch_size in steps else latents), labels

    monkeypatch.setattr(Batches, "shuffled", shuffled)


def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_training(tiny_config(whole, validate_every=2))
    run_training(tiny_config(parted, validate_every=2, max_steps=2))
    run_training(tiny_config(parted, validate_every=2), resume="auto")
    assert_same_tensors(tensors_of(whole, 4), tensors_of(parted, 4))
    assert metrics_of(whole) == metrics_of(parted)


def test_metrics_after_the_checkpoint_are_cut_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_training(tiny_config(whole))
    original = loop.Trainer.train_step

    def dies_in_the_fourth_step(trainer: loop.Trainer) -> Any:
        if trainer.state.step == 3:
            raise RuntimeError("killed")
        return original(trainer)

    monkeypatch.setattr(loop.Trainer, "train_step", dies_in_the_fourth_step)
    with pytest.raises(RuntimeError, match="killed"):
        run_training(tiny_config(killed))
    assert [line["step"] for line in metrics_of(killed)] == [1, 2, 3]
    monkeypatch.undo()
    later = killed / "samples" / "step-00000003.png"  # of a step that is taken again, and draws no grid now
    later.parent.mkdir(exist_ok=True)
    later.write_bytes(b"old")
    run_training(tiny_config(killed), resume="auto")
    assert metrics_of(whole) == metrics_of(killed)
    assert_same_tensors(tensors_of(whole, 4), tensors_of(killed, 4))
    assert not later.exists()


def test_accumulation_changes_the_order_of_sums_alone(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for steps in (1, 2, 4):
            run_training(tiny_config(tmp_path / str(steps), gradient_accumulation_steps=steps, max_steps=10))
    finally:
        torch.set_default_dtype(torch.float32)
    reference = tensors_of(tmp_path / "1", 10)
    assert reference["model/patch_embed.weight"].dtype == torch.float64
    for steps in (2, 4):
        for name, tensor in tensors_of(tmp_path / str(steps), 10).items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-9, atol=1e-12, msg=name)


def test_nonfinite_loss_with_finite_gradients_is_skipped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Trainer.micro_losses

    def micro_losses(trainer: loop.Trainer, numbers: range) -> dict[str, torch.Tensor]:
        (loss,) = original(trainer, numbers).values()
        return {"loss": loss + float("inf") if trainer.state.step == 2 else loss}

    monkeypatch.setattr(loop.Trainer, "micro_losses", micro_losses)
    run_training(tiny_config(tmp_path, checkpoint_every=1))
    assert_same_tensors(tensors_of(tmp_path, 2), tensors_of(tmp_path, 3))
    assert metrics_of(tmp_path)[-2]["nonfinite_steps"] == 1


@pytest.mark.parametrize("processes, accumulation", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_sample_numbers_are_shared_out_without_gap_or_overlap(processes: int, accumulation: int) -> None:
    class Fake:
        num_processes = processes

    seen = []
    for rank in range(processes):
        trainer = loop.Trainer.__new__(loop.Trainer)
        trainer.config = tiny_config(Path("unused"), gradient_accumulation_steps=accumulation)
        trainer.accelerator = Fake()  # type: ignore[assignment]
        trainer.accelerator.process_index = rank  # type: ignore[misc]
        for micro_step in range(accumulation):
            seen.extend(trainer.sample_numbers(3, micro_step))
    assert sorted(seen) == list(range(24, 32))


def test_nonfinite_step_is_skipped_counted_and_logged_as_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_batches(monkeypatch, {2})
    run_training(tiny_config(tmp_path, checkpoint_every=1))
    before, after, later = (tensors_of(tmp_path, step) for step in (2, 3, 4))
    assert_same_tensors(before, after)
    assert not torch.equal(after["model/patch_embed.weight"], later["model/patch_embed.weight"])
    assert torch.isfinite(later["model/patch_embed.weight"]).all()
    lines = [line for line in metrics_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] is None
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 1, 1]
    assert read_manifest(find_checkpoints(tmp_path)[4])["nonfinite_steps"] == 1


def test_too_many_nonfinite_steps_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_batches(monkeypatch, {0, 2, 3, 4})
    with pytest.raises(UserError, match="3 steps in a row up to step 5 had a non-finite loss or gradient"):
        run_training(tiny_config(tmp_path, max_steps=20, max_nonfinite_steps=3, checkpoint_every=2))
    assert metrics_of(tmp_path)[-1]["step"] == 5
    newest = max(find_checkpoints(tmp_path))
    assert newest == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path, newest).values())


def test_signal_saves_and_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Trainer.train_step

    def asked_to_stop_in_the_third_step(trainer: loop.Trainer) -> Any:
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(trainer)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop.Trainer, "train_step", asked_to_stop_in_the_third_step)
    run_training(tiny_config(tmp_path / "stopped", max_steps=6, checkpoint_every=100))
    assert list(find_checkpoints(tmp_path / "stopped")) == [3]
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    run_training(tiny_config(tmp_path / "stopped", max_steps=6, checkpoint_every=100), resume="auto")
    run_training(tiny_config(tmp_path / "whole", max_steps=6, checkpoint_every=100))
    assert_same_tensors(tensors_of(tmp_path / "stopped", 6), tensors_of(tmp_path / "whole", 6))


def test_what_a_run_writes_and_when(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        max_steps=5,
        checkpoint_every=2,
        keep_last=1,
        keep_every=4,
        sample_every=3,
        validate_every=4,
        log_every=2,
    )
    run_training(config)
    assert list(find_checkpoints(tmp_path)) == [4, 5]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000003.png", "step-00000005.png"]
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 5]
    quartiles = [lines[-1][f"val_loss_q{number}"] for number in (1, 2, 3, 4)]
    assert lines[-1]["val_loss"] == pytest.approx(sum(quartiles) / 4)
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["git_commit"]
    manifest = read_manifest(find_checkpoints(tmp_path)[5])
    assert manifest["format_version"] == 1 and manifest["step"] == 5
    assert manifest["latent"] == {"name": "identity", "image_size": 8, "image_channels": 1}
    assert manifest["class_names"] == [str(digit) for digit in range(10)]


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(tiny_config(tmp_path))
    weights = find_checkpoints(tmp_path)[4] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    run_training(tiny_config(tmp_path), resume="auto")
    assert "checkpoint of step 4 is ignored: its file model.safetensors has" in capsys.readouterr().out
    assert list(find_checkpoints(tmp_path)) == [2, 4]


def test_run_without_a_usable_checkpoint_is_not_started_afresh(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path, checkpoint_every=4))
    manifest = find_checkpoints(tmp_path)[4] / "config.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="that of step 4 is not usable, it has format_version 2"):
        run_training(tiny_config(tmp_path, checkpoint_every=4), resume="auto")
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resume_stays_within_the_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_training(tiny_config(first))
    run_training(tiny_config(second, max_steps=2))
    with pytest.raises(UserError, match="is not of the run in"):
        run_training(tiny_config(second), resume=str(first))
    with pytest.raises(UserError, match="goes on to step 4; give another output_dir to branch off"):
        run_training(tiny_config(first), resume=str(first / "checkpoints" / "step-00000002"))
    run_training(tiny_config(tmp_path / "branch"), resume=str(first / "checkpoints" / "step-00000002"))
    assert_same_tensors(tensors_of(first, 4), tensors_of(tmp_path / "branch", 4))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run to resume"):
        run_training(tiny_config(tmp_path / "thesis"), resume="auto")


def write_folder(folder: Path, value: int, broken: bool = False) -> None:
    """Two classes of four 8×8 images; the last one cut short if asked for."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 40, (8, 8), dtype=np.uint8)
            Image.fromarray(noise + np.uint8(value)).save(folder / name / f"{number}.png")
    if broken:
        path = folder / "b" / "3.png"
        path.write_bytes(path.read_bytes()[:-30])


def folder_config(output_dir: Path, data: Path, fraction: float = 0.25) -> Config:
    keys = {"name": "imagefolder", "path": str(data), "validation_fraction": fraction}
    return changed(tiny_config(output_dir, max_steps=1, batch_size=4), data=keys)


def test_images_of_another_folder_are_noticed_though_the_labels_are_equal(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", 0)
    write_folder(tmp_path / "two", 100)
    run_training(folder_config(tmp_path / "run", tmp_path / "one"))
    with pytest.raises(UserError, match="was trained on other data"):
        run_training(folder_config(tmp_path / "run", tmp_path / "two"), resume="auto")


def test_unreadable_image_is_named_before_anything_is_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 0, broken=True)
    with pytest.raises(UserError, match=r"b/3\.png"):
        run_training(folder_config(tmp_path / "run", tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_training_without_a_validation_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", 0)
    run_training(folder_config(tmp_path / "run", tmp_path / "data", fraction=0.0))
    assert not any("val_loss" in line for line in metrics_of(tmp_path / "run"))
    assert read_manifest(find_checkpoints(tmp_path / "run")[1])["data"]["images"] == 8


def test_full_disk_outside_a_save_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gspn_dit.training.run_directory.RunDirectory.log", refuse)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left on device"):
        run_training(tiny_config(tmp_path))


def test_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(tiny_config(tmp_path, max_steps=2))
    before = (tmp_path / "metrics.jsonl").read_text()
    run_training(tiny_config(tmp_path, max_steps=2), resume="auto")
    assert "already at step 2 of 2" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resume_refuses_another_model_by_the_name_of_the_key(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=2)
    run_training(config)
    with pytest.raises(UserError, match=r"model\.scan_window = None, this run has 1"):
        run_training(changed(config, model={"scan_window": 1}), resume="auto")
    with pytest.raises(UserError, match=r"training\.learning_rate = 0\.01, this run has 0\.5"):
        run_training(changed(config, training={"learning_rate": 0.5}), resume="auto")
    allowed = changed(config, training={"max_steps": 3, "log_every": 3, "keep_last": 2}, data={"path": None})
    run_training(allowed, resume="auto")
    assert max(find_checkpoints(tmp_path)) == 3


def test_resume_refuses_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, max_steps=2)
    run_training(config)
    monkeypatch.setattr("gspn_dit.data.build.fingerprint", lambda images: "another")
    with pytest.raises(UserError, match="was trained on other data: 1437 images of 'digits' then"):
        run_training(config, resume="auto")


def test_output_directory_that_is_not_empty_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"is not empty; give --resume auto .* --overwrite"):
        run_training(tiny_config(tmp_path, max_steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    run_training(tiny_config(tmp_path, max_steps=2), overwrite=True)
    run_training(tiny_config(tmp_path, max_steps=1), overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert list(find_checkpoints(tmp_path)) == [1]


def test_batch_must_divide_and_world_size_must_be_as_asked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.num_processes is 2, but 1 are running"):
        run_training(tiny_config(tmp_path / "run", num_processes=2))
    assert not (tmp_path / "run").exists()


def test_patch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = changed(tiny_config(tmp_path / "run"), model={"name": "GSPN-N/3"})
    with pytest.raises(UserError, match="8×8 is not divisible by the patch size 3"):
        run_training(config)
    assert not (tmp_path / "run").exists()


def test_speed_and_memory_are_logged_in_units_that_compare(tmp_path: Path) -> None:
    """Two operations per multiply-add and three passes; a process that runs torch holds more than 100 MB."""
    from gspn_dit.models import create_model
    from gspn_dit.models.flops import forward_multiply_adds

    run_training(tiny_config(tmp_path, max_steps=1))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    model = create_model("GSPN-N/4", 10, 1, 8, hidden_size=16, depth=2)
    operations = line["model_flops_per_second"] / line["images_per_second"]
    assert operations == pytest.approx(6 * forward_multiply_adds(model, 8, 8))
    assert 1e8 < line["peak_memory_bytes"] < 1e12

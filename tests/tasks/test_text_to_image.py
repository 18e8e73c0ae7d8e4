"""Text-to-image training: exact resume, captions and their dropout by sample number, distillation, refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gspn_dit.checkpoint import find_checkpoints, read_manifest
from gspn_dit.config import Config
from gspn_dit.errors import UserError
from gspn_dit.models.text_unet import Captioned, rebuild_unet, unet_cost
from gspn_dit.models.unet import GSPNAdapter
from gspn_dit.models.unet_scans import GSPNSelfAttention
from gspn_dit.tasks import create_task
from gspn_dit.tasks.distillation import Taps
from tests.captioned import text_config, write_captioned, write_encoder
from tests.tiny import write_run
from tests.training.conftest import run_training
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of

pytest.importorskip("transformers", reason="needs transformers (pip install 'gspn-dit[text]')")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("captioned")
    return write_captioned(folder / "data"), write_encoder(folder / "encoder")


def task_of(config: Config) -> Any:
    return create_task(config)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path, places: tuple[Path, str]) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_training(text_config(whole, *places, validate_every=2))
    run_training(text_config(parted, *places, validate_every=2, max_steps=2))
    run_training(text_config(parted, *places, validate_every=2), resume="auto")
    assert_same_tensors(tensors_of(whole, 4), tensors_of(parted, 4))
    assert metrics_of(whole) == metrics_of(parted)
    assert {"val_loss", "val_loss_q1"} <= metrics_of(whole)[-1].keys()
    assert Image.open(whole / "samples" / "step-00000004.png").width > 48


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(tmp_path: Path, places: tuple[Path, str]) -> None:
    for processes in (1, 2):
        config = text_config(tmp_path / str(processes), *places, max_steps=3)
        file = tmp_path / f"{processes}.json"
        file.write_text(json.dumps(config.to_dict()))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "tests/training/train_in_float64.py", "--config", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (tensors_of(tmp_path / str(processes), 3) for processes in (1, 2))
    for key in one:
        if key.startswith("model/"):
            torch.testing.assert_close(one[key], two[key], rtol=1e-7, atol=1e-9)


def test_captions_are_drawn_and_dropped_by_sample_number(tmp_path: Path, places: tuple[Path, str]) -> None:
    task = task_of(text_config(tmp_path, *places, class_dropout=0.3))
    seen: list[Any] = []
    table = task.table
    names = {number: text for text, number in table.numbers.items()}
    original = Captioned.__call__

    def spy(self: Captioned, latents: Any, timesteps: Any, numbers: Any, keep_mask: Any = None) -> Any:
        seen.extend(names[int(number)] for number in numbers)
        return original(self, latents, timesteps, numbers)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Captioned, "__call__", spy)
        for start in range(0, 120, 40):
            task.loss(task.model, range(start, start + 40))
        whole, seen[:] = list(seen), []
        task.loss(task.model, range(50, 60))
    assert seen == whole[50:60]
    assert 20 < whole.count("") < 55  # 36 of 120 are dropped in the mean
    assert {text for text in whole if text} == {"a cat", "a dog", "a red cat", "a red dog"}


def test_the_caption_matters_and_padding_does_not(tmp_path: Path, places: tuple[Path, str]) -> None:
    task = task_of(text_config(tmp_path, *places))
    numbers = torch.tensor([task.table.numbers[text] for text in ("a cat", "a red dog")])
    called, latents, timesteps = (
        Captioned(task.model, task.table, 8),
        torch.randn(2, 3, 8, 8),
        torch.tensor([10.0, 500.0]),
    )
    with torch.no_grad():
        prediction = called(latents, timesteps, numbers)
        swapped = called(latents, timesteps, numbers.flip(0))
        texts = task.table.batch(numbers)
        states, mask = texts.states, texts.mask
        padded = torch.nn.functional.pad(states, (0, 0, 0, 3), value=7.0)
        longer = task.model(latents, timesteps, padded, encoder_attention_mask=torch.nn.functional.pad(mask, (0, 3)))
    assert (prediction - swapped).abs().max() > 1e-4
    torch.testing.assert_close(prediction, longer.sample, rtol=1e-4, atol=1e-5)


def test_the_checkpoint_rebuilds_the_model(tmp_path: Path, places: tuple[Path, str]) -> None:
    config = text_config(
        tmp_path, *places, {"unet": {"variant": "qkv", "proxy_ratio": 8, "patch_size": 2}}, max_steps=2
    )
    run_training(config)
    directory = find_checkpoints(tmp_path)[2]
    manifest = read_manifest(directory)
    unet = rebuild_unet(manifest["model"])
    weights = tensors_of(tmp_path, 2)
    unet.load_state_dict({key.removeprefix("model/"): w for key, w in weights.items() if key.startswith("model/")})
    assert sum(isinstance(module, GSPNSelfAttention) for module in unet.modules()) == 7
    with pytest.raises(UserError, match="was trained from scratch, weights and scans alike, so no adapter of it"):
        GSPNAdapter.from_checkpoint(tmp_path)
    assert manifest["text"]["max_tokens"] == 8 and manifest["data"]["images"] == 12


@pytest.mark.parametrize("mixer", ["attention", "gspn"])
def test_multiply_adds_by_hand(tmp_path: Path, places: tuple[Path, str], mixer: str) -> None:
    """Torch's own counter knows linear maps and convolutions; attention and scans are counted by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    task = task_of(text_config(tmp_path, *places, {"unet": {"mixer": "attention"}}))
    length = task.table.length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        called = Captioned(task.model, task.table, 8)
        called(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([task.table.numbers["a red dog"]]))
    expected = counter.get_total_flops() // 2  # of the kernels of a CPU, attention's products are not counted
    described = dict(task.describe()["model"])
    levels = ((64, 8, 3), (16, 16, 4))  # tokens, width, transformer blocks
    expected += sum(blocks * 2 * tokens * (tokens + length) * width for tokens, width, blocks in levels)
    if mixer == "gspn":
        described["scans"] = {"variant": "pure", "window": None, "proxy_ratio": 8, "skip": True, "weight_groups": None}
        for tokens, width, layers in levels:
            attention = 2 * tokens * tokens * width + 4 * tokens * width**2
            scans = tokens * (width * width // 8 + 21 * width * width // 8 + width**2) + 24 * tokens * width
            expected += layers * (scans - attention)
    assert unet_cost(described, 8, 8, length).multiply_adds == expected


# -- distillation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(places: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with attention."""
    run = tmp_path_factory.mktemp("teacher")
    run_training(text_config(run, *places, {"unet": {"mixer": "attention"}}, max_steps=2))
    return run


def student(run: Path, places: tuple[Path, str], teacher: Path, options: Any = None, **training: Any) -> Config:
    return text_config(run, *places, {"unet": {"teacher": str(teacher), **(options or {})}}, **training)


@pytest.mark.parametrize("teacher_inputs", [False, True])
def test_distillation_trains_scans_alone_towards_their_teacher(
    tmp_path: Path, places: tuple[Path, str], teacher: Path, teacher_inputs: bool
) -> None:
    options = {"teacher_inputs": teacher_inputs}
    run_training(student(tmp_path, places, teacher, options, max_steps=40, batch_size=8, checkpoint_every=40))
    lines = [line for line in metrics_of(tmp_path) if "loss_layers" in line]
    first, last = lines[0], lines[-1]
    assert sum(line["loss_layers"] for line in lines[-5:]) < 0.7 * sum(line["loss_layers"] for line in lines[:5])
    for line in (first, last):
        parts = line["loss_target"] + 0.5 * line["loss_teacher"] + 0.5 * line["loss_layers"]
        assert line["loss"] == pytest.approx(line["loss_layers"] if teacher_inputs else parts, rel=1e-5)
    before, after = (tensors_of(run, step) for run, step in ((teacher, 2), (tmp_path, 40)))
    kept = [key for key in after if key.startswith("model/") and ".attn1." not in key]
    assert kept and all(torch.equal(after[key], before[key.replace("model/", "ema/")]) for key in kept)


def test_what_gives_no_adapter(tmp_path: Path, teacher: Path) -> None:
    """Scans of a run from scratch are refused in `test_the_checkpoint_rebuilds_the_model`."""
    with pytest.raises(UserError, match=r"nowhere does not exist; give a run directory"):
        GSPNAdapter.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not of task text-to-image; give a run with unet\.teacher"):
        GSPNAdapter.from_checkpoint(write_run(tmp_path / "by_class"))
    with pytest.raises(UserError, match=r"has no scans, so no adapter .*; give a run with unet\.teacher"):
        GSPNAdapter.from_checkpoint(teacher)


def test_distillation_resumes_bit_for_bit(tmp_path: Path, places: tuple[Path, str], teacher: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_training(student(whole, places, teacher, validate_every=2))
    run_training(student(parted, places, teacher, validate_every=2, max_steps=2))
    run_training(student(parted, places, teacher, validate_every=2), resume="auto")
    assert_same_tensors(tensors_of(whole, 4), tensors_of(parted, 4))
    assert metrics_of(whole) == metrics_of(parted)


def train_until(config: Config, last: int) -> None:
    """Train on, in a process of its own, which SIGKILL ends when so many steps are done."""
    from gspn_dit.training import loop

    original = loop.Trainer.train_step

    def train_step(trainer: loop.Trainer) -> Any:
        if trainer.state.step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer)

    loop.Trainer.train_step = train_step  # type: ignore[method-assign]
    run_training(config, resume="auto")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_distillation_that_is_killed_twice_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, places: tuple[Path, str], teacher: Path
) -> None:
    whole, killed = (student(tmp_path / name, places, teacher, max_steps=6) for name in ("whole", "killed"))
    run_training(whole)
    context = multiprocessing.get_context("spawn")
    for last in (3, 5):
        process = context.Process(target=train_until, args=(killed, last))
        process.start()
        process.join(timeout=300)
        assert process.exitcode == -signal.SIGKILL
        assert max(find_checkpoints(tmp_path / "killed")) == last - 1
    run_training(killed, resume="auto")
    assert_same_tensors(tensors_of(tmp_path / "whole", 6), tensors_of(tmp_path / "killed", 6))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")


def test_teacher_and_student_share_what_is_frozen(tmp_path: Path, places: tuple[Path, str], teacher: Path) -> None:
    task = task_of(student(tmp_path, places, teacher))
    mine, its = dict(task.model.named_parameters()), dict(task.distillation.teacher.named_parameters())
    shared = [name for name in its if ".attn1." not in name]
    assert all(mine[name] is its[name] for name in shared)
    trained = {name for name, parameter in mine.items() if parameter.requires_grad}
    assert trained == {name for name in mine if ".attn1." in name}


def test_a_first_stage_gives_each_scan_its_teachers_input(
    tmp_path: Path, places: tuple[Path, str], teacher: Path
) -> None:
    task = task_of(student(tmp_path, places, teacher, {"teacher_inputs": True}))
    for parameter in task.model.parameters():  # scans whose outputs are far off, so that their own inputs would be
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    task.loss(task.model, range(4))
    student_taps, teacher_taps = task.distillation._of_student, task.distillation._of_teacher
    assert len(teacher_taps.inputs) == 7
    for name, given in teacher_taps.inputs.items():
        assert torch.equal(student_taps.inputs[name], given)
        mixer = task.model.get_submodule(name)
        grid = (8, 8) if given.shape[1] == 64 else (4, 4)
        torch.testing.assert_close(student_taps.outputs[name], mixer(given, gspn_grid=grid))


def test_distillation_in_bf16_stays_finite(tmp_path: Path, places: tuple[Path, str], teacher: Path) -> None:
    run_training(student(tmp_path, places, teacher, max_steps=6, mixed_precision="bf16", activation_checkpointing=True))
    lines = metrics_of(tmp_path)
    assert all(line["nonfinite_steps"] == 0 for line in lines if "loss" in line)
    assert all(line["loss"] is not None for line in lines if "loss" in line)


def test_taps_read_no_recomputed_pass() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn1(x)

    model = torch.nn.Sequential(Block())
    taps = Taps(model)
    with taps.reading():
        first = model(torch.ones(1, 2))
        model(torch.zeros(1, 2))
    assert torch.equal(taps.outputs["0.attn1"], first) and torch.equal(taps.inputs["0.attn1"], torch.ones(1, 2))
    assert not model[0].attn1._forward_hooks


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"name": "GSPN-B/2"}}, "model.name is GSPN-B/2, but task text-to-image trains a diffusers UNet"),
        ({"unet": {"channels": [12]}}, r"unet: unet.channels \[12\] must be multiples of 8"),
        ({"unet": {"proxy_ratio": 3}}, "unet: proxy_ratio 3 does not divide the 8 channels"),
        ({"unet": {"teacher": "nowhere"}}, "checkpoint nowhere does not exist"),
        ({"data": {"caption_column": "captoin"}}, "has no 'captoin'"),
        ({"training": {"repa_features": "some.npy"}}, "training.repa_features does not go with task text-to-image"),
        ({"objective": {"name": "epsilon"}, "sampling": {"sampler": "euler"}}, "unknown sampler 'euler'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, places: tuple[Path, str], sections: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(text_config(tmp_path / "run", *places, sections))
    assert not (tmp_path / "run").exists()


def test_teachers_that_are_refused(tmp_path: Path, places: tuple[Path, str], teacher: Path) -> None:
    with pytest.raises(UserError, match="its channels of a latent is 3, and 12 is needed here"):
        task_of(student(tmp_path / "a", places, teacher, {"patch_size": 2}))
    run_training(text_config(tmp_path / "scans", *places, max_steps=2))
    with pytest.raises(UserError, match=r"give a run of unet\.mixer attention"):
        task_of(student(tmp_path / "b", places, tmp_path / "scans"))


def test_images_that_cannot_be_halved_often_enough(tmp_path: Path, places: tuple[Path, str]) -> None:
    config = text_config(tmp_path / "run", *places, {"unet": {"channels": [8, 8, 8], "patch_size": 4}})
    with pytest.raises(UserError, match="8×8 are not divisible by 16"):
        task_of(config)

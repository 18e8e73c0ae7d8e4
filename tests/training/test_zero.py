"""DeepSpeed's ZeRO computes, saves and resumes what replicated training does; what it cannot do is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gspn_dit.checkpoint import find_checkpoints
from gspn_dit.errors import UserError
from gspn_dit.training.strategy import zero
from tests.training.conftest import run_training, tiny_config
from tests.training.test_loop import metrics_of
from tests.training.test_multiprocess import ENVIRONMENT, ROOT, command
from tests.training.test_sharding import assert_close, assert_same_metrics, choose, exports, train_in_turn

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'gspn-dit[deepspeed]'"
)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.multiprocess
def test_zero_trains_resumes_and_exports_as_replicated_training_does(tmp_path: Path) -> None:
    many = {"max_steps": 6, "gradient_accumulation_steps": 2}
    train_in_turn(
        tmp_path,
        {"name": "none", **many},
        {"name": "zero1", "sharding": "zero1", **many},
        {"name": "zero2", "sharding": "zero2", **many},
        {"name": "parted", "sharding": "zero2", **many, "max_steps": 3},
        {"name": "parted", "sharding": "zero2", **many},
        {"name": "joined", "sharding": "zero2", **many, "max_steps": 3},
        {"name": "joined", "sharding": "fsdp", **many, "max_steps": 4},
        {"name": "joined", "sharding": "zero1", **many, "max_steps": 5},
        {"name": "joined", "sharding": "none", **many},
        {"name": "compiled", "sharding": "zero2", "compile": True, **many},
        poison=True,
    )
    replicated = exports(tmp_path / "none", 6)
    for name in ("zero1", "zero2", "joined", "compiled"):
        assert_close(exports(tmp_path / name, 6), replicated, 1e-6)
    whole, parted = (exports(tmp_path / name, 6, "optimizer") for name in ("zero2", "parted"))
    assert all(whole[name].equal(tensor) for name, tensor in parted.items())
    # Moments of gradients that nearly cancel show in their last digits in which order processes were added up.
    assert_close(whole, exports(tmp_path / "none", 6, "optimizer"), 1e-5)
    # A step that is not finite in one process is skipped, counted and logged as replicated training does it.
    lines = [line for line in metrics_of(tmp_path / "none") if "loss" in line]
    assert [line["nonfinite_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    for name in ("zero1", "zero2", "compiled"):
        assert_same_metrics(tmp_path / name, tmp_path / "none")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.multiprocess
def test_accelerates_deepspeed_launch_file_trains_with_zero(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", "configs/accelerate/deepspeed.yaml"]
    training = command(tmp_path / "run", 1, "--training.max_steps", "2", "--training.num_processes", "2")
    for more, expected in ((["--training.sharding", "zero1"], 1), ([], 0)):
        done = subprocess.run(
            [*launch, *training[1:], *more], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == expected, done.stderr
        assert ("asks for zero2, training.sharding for zero1" in done.stderr) == bool(expected)
    assert (find_checkpoints(tmp_path / "run")[2] / "optimizer.safetensors").exists()


def test_a_launch_file_chooses_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zero.launched_zero() is None
    monkeypatch.setattr(zero, "check_installed", lambda: None)
    monkeypatch.setattr("gspn_dit.training.strategy.check_installed", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert choose() == "zero2"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    assert choose() == choose("zero1") == "zero1"
    with pytest.raises(UserError, match=r"the launch file asks for zero1, training\.sharding for fsdp"):
        choose("fsdp")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ZERO_STAGE", "3", r"ZeRO stage 3, but this trainer drives 1 and 2; configs/accelerate/fsdp\.yaml"),
        ("ZERO_STAGE", "0", r"ZeRO stage 0, but"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "for offload_optimizer_device, which this trainer does not do"),
        ("CONFIG_FILE", "ds.json", r"for config_file.*as configs/accelerate/deepspeed\.yaml does"),
    ],
)
def test_what_the_trainer_does_not_drive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UserError, match=message):
        run_training(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_missing_deepspeed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'gspn-dit\[deepspeed\]'.*fsdp"):
        choose("zero2")

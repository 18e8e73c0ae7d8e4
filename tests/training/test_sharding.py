"""Training split over processes computes, saves, resumes and exports what the same training does with whole weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gspn_dit.errors import UserError
from gspn_dit.training.checkpoint import find_checkpoints
from gspn_dit.training.post_hoc_ema import find_snapshots, write_reconstruction
from gspn_dit.training.sharding import wants_sharding
from tests.training.conftest import run_training, tiny_config
from tests.training.test_multiprocess import ENVIRONMENT, ROOT, train

WHOLE = ("model", "ema", "ema-0.050", "ema-0.100")


def exports(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, by file and name."""
    directory = find_checkpoints(run)[step]
    return {
        f"{stem}/{name}": tensor
        for stem in WHOLE
        for name, tensor in load_file(directory / f"{stem}.safetensors").items()
    }


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        difference = (tensor - other[name]).double().norm()
        assert difference <= tolerance * other[name].double().norm().clamp_min(1e-12), name


def options(steps: int, sharding: str, *more: str) -> list[str]:
    return [
        *("--training.max_steps", str(steps), "--training.sharding", sharding, "--training.log_every", "6"),
        *("--training.checkpoint_every", "6", "--training.validate_every", "6", "--training.sample_every", "12"),
        *("--training.ema_sigma_rel", "[0.05,0.1]", "--training.ema_snapshot_every", "6"),
        *("--training.gradient_accumulation_steps", "2", *more),
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sharded_training_saves_resumes_and_exports_as_replicated_training_does(tmp_path: Path) -> None:
    def run(name: str, processes: int, *arguments: str) -> None:
        done = train(tmp_path / name, processes, *arguments)
        assert done.returncode == 0, done.stderr

    run("replicated", 2, *options(12, "none"))
    run("sharded", 2, *options(12, "fsdp"))
    replicated, sharded = exports(tmp_path / "replicated", 12), exports(tmp_path / "sharded", 12)
    assert_close(sharded, replicated, 1e-6)
    directory = find_checkpoints(tmp_path / "sharded")[12]
    assert not (directory / "optimizer.safetensors").exists()
    assert len(list((directory / "sharded").glob("*.distcp"))) == 2  # each process wrote its own
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("replicated", "sharded")
    ]
    for one, other in zip(*lines, strict=True):
        for key in {"step", "loss", "grad_norm", "val_loss", "val_loss_q3"} & {*one, *other}:
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
    assert len(find_snapshots(tmp_path / "sharded")) == 4
    assert write_reconstruction(tmp_path / "sharded", 0.1, None, None)[1] < 1e-6

    run("parted", 2, *options(6, "fsdp"))
    run("parted", 2, *options(12, "fsdp", "--resume", "auto"))
    parted = exports(tmp_path / "parted", 12)
    assert all(torch.equal(parted[name], tensor) for name, tensor in sharded.items())

    for name, processes, first, then in (("joined", 1, "fsdp", "none"), ("split", 2, "none", "fsdp")):
        run(name, 2, *options(6, first))
        run(name, processes, *options(12, then, "--resume", "auto"))
        assert_close(exports(tmp_path / name, 12), replicated, 1e-6)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_gradients_are_exchanged_once_a_step_whatever_the_accumulation(tmp_path: Path, sharding: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [*launcher, "-m", "tests.training.count_exchanges", sharding, str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("exchanges")]
    # One bucket of DDP, or the three blocks and the rest; as many with one micro-step as with four.
    assert lines == ["exchanges 1 1 1" if sharding == "none" else "exchanges 4 4 4"] * 2


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.multiprocess
def test_accelerates_fsdp_launch_file_trains_as_one_process_does(tmp_path: Path) -> None:
    count = min(2, torch.cuda.device_count())
    if count < 2:
        pytest.skip("needs two GPUs")
    common = ["--config", "configs/demo.yaml", "--model.hidden_size", "32", "--model.depth", "2"]
    common += options(12, "none", "--training.trackers", "[]", "--training.batch_size", "64")
    launch = ["accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml", "--num_processes", "2"]
    for name, start in (("one", ["train.py"]), ("two", ["-m", *launch, "train.py"])):
        command = [sys.executable, *start, *common, "--output_dir", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert_close(exports(tmp_path / "two", 12), exports(tmp_path / "one", 12), 1e-4)


def test_one_process_has_nothing_to_split(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path, max_steps=2, sharding="fsdp"))
    assert (find_checkpoints(tmp_path)[2] / "optimizer.safetensors").exists()


def test_fsdp_1_of_a_launch_file_is_refused() -> None:
    from accelerate.utils import DistributedType

    from gspn_dit.config import TrainingConfig

    class Launched:
        distributed_type, is_fsdp2, num_processes = DistributedType.FSDP, False, 2

    with pytest.raises(UserError, match="asks for FSDP 1; set fsdp_config"):
        wants_sharding(TrainingConfig(), Launched())  # type: ignore[arg-type]
    Launched.is_fsdp2 = True
    assert wants_sharding(TrainingConfig(), Launched())  # type: ignore[arg-type]


def test_deepspeed_is_refused_with_what_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"asks for DeepSpeed.*configs/accelerate/fsdp\.yaml"):
        run_training(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_launch_files_are_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == values["num_processes"]
    assert str(loaded.distributed_type).split(".")[-1] == values["distributed_type"]
    assert loaded.mixed_precision == "no"  # the run's config decides

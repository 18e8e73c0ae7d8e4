"""Training split over processes computes, saves, resumes and exports what the same training does with whole weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from gspn_dit.checkpoint import find_checkpoints
from gspn_dit.config import Config, TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.tasks import TASKS, Task
from gspn_dit.training.post_hoc_ema import find_snapshots, write_reconstruction
from gspn_dit.training.strategy import choose_strategy
from tests.training.conftest import run_training, tiny_config
from tests.training.test_loop import metrics_of
from tests.training.test_multiprocess import ENVIRONMENT, ROOT, train

WHOLE = ("model", "ema", "ema-0.050", "ema-0.100")


def exports(run: Path, step: int, *stems: str) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint, by file and name: weights and averages, or what is named."""
    directory = find_checkpoints(run)[step]
    return {
        f"{stem}/{name}": tensor
        for stem in stems or WHOLE
        for name, tensor in load_file(directory / f"{stem}.safetensors").items()
    }


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        difference = (tensor - other[name]).double().norm()
        assert difference <= tolerance * other[name].double().norm().clamp_min(1e-12), name


def assert_same_metrics(one: Path, other: Path) -> None:
    """Compare the logged lines of two runs, but for speed and memory."""
    lines, expected = (
        [{key: math.nan if value is None else value for key, value in line.items()} for line in metrics_of(run)]
        for run in (one, other)
    )
    for line, as_before in zip(lines, expected, strict=True):
        assert line == pytest.approx(as_before, rel=1e-5, nan_ok=True)


def train_in_turn(folder: Path, *runs: dict[str, Any], poison: bool = False) -> None:
    """Train tiny configs, one after another, in the same two processes; a run's keys are those of `training`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [*launcher, "-m", "tests.training.train_in_turn", str(folder), json.dumps(runs), *["poison"] * poison]
    done = subprocess.run(script, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def sharded_state(run: Path, step: int) -> Path:
    """Write the optimiser's state of a sharded checkpoint as one file of whole tensors, beside the run."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = run.parent / f"{run.name}-optimizer.pt"
    dcp_to_torch_save(find_checkpoints(run)[step] / "sharded", file)
    return file


def options(steps: int, sharding: str, *more: str) -> list[str]:
    return [
        *("--training.max_steps", str(steps), "--training.sharding", sharding, "--training.log_every", "6"),
        *("--training.checkpoint_every", "6", "--training.validate_every", "6", "--training.sample_every", "12"),
        *("--training.ema_sigma_rel", "[0.05,0.1]", "--training.ema_snapshot_every", "6"),
        *("--training.gradient_accumulation_steps", "2", *more),
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_alignment_trains_sharded_as_it_does_replicated(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(1437, 4, 6)).astype(np.float16))
    aligned = {"repa_features": str(tmp_path / "features.npy"), "repa_depth": 2, "repa_projector": "conv"}
    train_in_turn(tmp_path, *({"name": name, "sharding": name, **aligned} for name in ("none", "fsdp")))
    stems = ("model", "ema", "repa")
    assert_close(*(exports(tmp_path / name, 4, *stems) for name in ("fsdp", "none")), 1e-5)


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
    assert_same_metrics(tmp_path / "sharded", tmp_path / "replicated")
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


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training three ways; in one process of the two steps 2 and 4 are not finite."""
    folder = tmp_path_factory.mktemp("poisoned")
    runs = {"none": {}, "fsdp": {"sharding": "fsdp"}, "compiled": {"sharding": "fsdp", "compile": True}}
    train_in_turn(folder, *({"name": name, "max_steps": 6, **keys} for name, keys in runs.items()), poison=True)
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(poisoned: Path) -> None:
    """The processes themselves have compared their weights, averages and counts."""
    replicated = exports(poisoned / "none", 6)
    assert_close(exports(poisoned / "fsdp", 6), replicated, 1e-6)
    assert all(torch.isfinite(tensor).all() for tensor in replicated.values())
    assert_same_metrics(poisoned / "fsdp", poisoned / "none")
    lines = [line for line in metrics_of(poisoned / "fsdp") if "loss" in line]
    assert [line["nonfinite_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False, True, False, False]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]
    optimizer = torch.load(sharded_state(poisoned / "fsdp", 6), weights_only=True)
    for name, tensor in exports(poisoned / "none", 6, "optimizer").items():
        difference = (optimizer[name.removeprefix("optimizer/")] - tensor).double().norm()
        assert difference <= 1e-5 * tensor.double().norm().clamp_min(1e-12), name
        assert not name.endswith(".step") or tensor == 4


@pytest.mark.slow
@pytest.mark.multiprocess
def test_compiled_blocks_train_sharded_as_eager_ones_do(poisoned: Path) -> None:
    assert_close(exports(poisoned / "compiled", 6), exports(poisoned / "fsdp", 6), 1e-5)
    assert_same_metrics(poisoned / "compiled", poisoned / "fsdp")


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
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("launch_file", ["fsdp.yaml", "deepspeed.yaml"])
def test_launch_files_train_on_gpus_as_one_process_does(tmp_path: Path, launch_file: str, processes: int) -> None:
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs GPUs: {processes}")
    if launch_file == "deepspeed.yaml":
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'gspn-dit[deepspeed]'")
    common = ["--config", "configs/demo.yaml", "--model.hidden_size", "32", "--model.depth", "2"]
    common += options(12, "none", "--training.trackers", "[]", "--training.batch_size", "64")
    launch = ["accelerate.commands.launch", "--config_file", f"configs/accelerate/{launch_file}"]
    launch += ["--num_processes", str(processes)]
    for name, start in (("plain", ["train.py"]), ("launched", ["-m", *launch, "train.py"])):
        command = [sys.executable, *start, *common, "--output_dir", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert_close(exports(tmp_path / "launched", 12), exports(tmp_path / "plain", 12), 1e-4)
    sharded = (find_checkpoints(tmp_path / "launched")[12] / "sharded").is_dir()
    assert sharded == (launch_file == "fsdp.yaml" and processes == 2)  # one process has nothing to split


def test_one_process_has_nothing_to_split(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path, max_steps=2, sharding="fsdp"))
    assert (find_checkpoints(tmp_path)[2] / "optimizer.safetensors").exists()


class Launched:
    """What `choose_strategy` asks of an accelerator."""

    def __init__(self, kind: DistributedType = DistributedType.MULTI_GPU, processes: int = 2, fsdp: int = 2) -> None:
        self.distributed_type, self.num_processes, self.is_fsdp2 = kind, processes, fsdp == 2


def choose(
    sharding: str = "none", launched: Launched | None = None, task: str = "class-conditional", **training: Any
) -> str:
    config = Config(task=task, training=TrainingConfig(sharding=sharding, **training))
    return choose_strategy(config, launched or Launched())  # type: ignore[arg-type]


def test_launch_file_or_config_choose_what_is_split() -> None:
    fsdp = Launched(DistributedType.FSDP)
    assert choose() == "none"
    assert choose("fsdp") == choose("none", fsdp) == choose("fsdp", fsdp) == "fsdp"
    assert choose("fsdp", Launched(processes=1)) == choose("zero2", Launched(processes=1)) == "none"
    with pytest.raises(UserError, match="asks for FSDP 1; set fsdp_config"):
        choose("none", Launched(DistributedType.FSDP, fsdp=1))
    with pytest.raises(UserError, match=r"the launch file asks for fsdp, training\.sharding for zero2"):
        choose("zero2", fsdp)


def test_the_task_says_whether_its_state_can_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the config or by the launch file, FSDP's and DeepSpeed's alike."""
    fsdp, alone = Launched(DistributedType.FSDP), Launched(processes=1)
    for sharding, launched in (("none", fsdp), ("fsdp", None), ("zero1", alone)):
        with pytest.raises(UserError) as caught:
            choose(sharding, launched, "text-to-image")
        kind = "zero1" if sharding == "zero1" else "fsdp"
        assert str(caught.value) == f"task text-to-image does not go with sharding ({kind}); leave one of them out"
    assert choose("none", None, "text-to-image") == "none"
    monkeypatch.setattr("gspn_dit.training.strategy.launched_zero", lambda: "zero2")
    with pytest.raises(UserError, match=r"task text-to-image does not go with sharding \(zero2\)"):
        choose("none", None, "text-to-image")
    monkeypatch.setitem(
        TASKS, "whole", type("Whole", (Task,), {"excludes_sharding": staticmethod(lambda config: "unet.teacher")})
    )
    with pytest.raises(UserError, match=r"unet.teacher does not go with sharding \(zero2\)"):
        choose("none", None, "whole")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_launch_files_are_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == values["num_processes"]
    assert str(loaded.distributed_type).split(".")[-1] == values["distributed_type"]
    assert loaded.mixed_precision == "no"  # the run's config decides

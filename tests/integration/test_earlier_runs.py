"""Runs that an earlier version wrote still load, resume and sample; `tests/data_files/earlier` holds them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gspn_dit import GSPNPipeline, environment
from gspn_dit.checkpoint import find_checkpoints, find_incomplete, resolve_checkpoint
from gspn_dit.config import load_config
from gspn_dit.ops.cpu import binding as cpu
from gspn_dit.sample import parse_arguments
from gspn_dit.sample import run as sample
from gspn_dit.training.post_hoc_ema import write_reconstruction
from tests.training.conftest import fresh_accelerator, run_training  # noqa: F401  # a fixture

EARLIER = Path(__file__).parents[1] / "data_files" / "earlier"
RUNS = ["gspn", "attention"]
# Instruction sets round differently; two short steps at a learning rate of 1e-3 keep that far below this.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two copies of the runs, in the directory that their configs count from."""
    for copy in ("first", "second"):
        shutil.copytree(EARLIER, tmp_path / copy)
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path


def resume(run: str) -> dict[str, torch.Tensor]:
    """Finish a run; return the tensors of its last checkpoint."""
    run_training(load_config(f"{run}/config.yaml"), resume="auto")
    last = find_checkpoints(run)[4]
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(last.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", RUNS)
def test_checkpoints_load_exactly(run: str) -> None:
    assert find_incomplete(EARLIER / run) == {}
    checkpoint = resolve_checkpoint(EARLIER / run)
    assert checkpoint.name == {"gspn": "step-00000002", "attention": "step-00000004"}[run]
    for weights in ("model", "ema"):
        pipeline = GSPNPipeline.from_pretrained(EARLIER / run, weights=weights)
        stored, loaded = load_file(checkpoint / f"{weights}.safetensors"), pipeline.model.state_dict()
        assert stored.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def rounding_environment() -> dict[str, Any]:
    """What decides the last bits of a float32 sum; environment.json holds it for the machine that resumes exactly."""
    machine = environment.machine()
    facts = {name: machine[name] for name in ("processor", "instruction_sets")}
    return {"torch": torch.__version__, "kernels": cpu.describe(), **facts}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_goes_on_as_it_would_have(run: str, runs: Path) -> None:
    """Bit by bit with attention where the environment is the recorded one, else within rounding.

    With GSPN it is within rounding everywhere: the scan adds up in another order since that run was written.
    """
    if run == "attention":
        for copy in ("first", "second"):
            shutil.rmtree(runs / copy / run / "checkpoints" / "step-00000004")
    first = resume(run)
    os.chdir(runs / "second")
    second = resume(run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    recorded = json.loads((EARLIER / "environment.json").read_text(encoding="utf-8"))
    exact = run == "attention" and rounding_environment() == recorded
    for now, then in zip(metrics(runs / "first" / run), metrics(EARLIER / run), strict=True):
        assert now.keys() == then.keys()
        for key in now.keys() & {"loss", "grad_norm", "learning_rate", "val_loss"}:
            assert now[key] == (then[key] if exact else pytest.approx(then[key], rel=1e-3))
    if run == "attention":
        for file in sorted((EARLIER / run / "checkpoints" / "step-00000004").glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if exact:
                    assert torch.equal(first[f"{file.stem}/{name}"], tensor), name
                # The loss does not depend on the keys' bias: its gradient is rounding noise, which Adam scales up.
                elif "qkv.bias" not in name:
                    torch.testing.assert_close(first[f"{file.stem}/{name}"], tensor, **TOLERANCE, msg=name)


@pytest.mark.parametrize("run", RUNS)
def test_samples_are_those_of_then(run: str, runs: Path) -> None:
    sampler = {"gspn": "euler", "attention": "ddim"}[run]
    options = f"--classes 0-9 --per-class 1 --steps 4 --seed 3 --sampler {sampler} --save-npz {runs}/now.npz"
    sample(parse_arguments(["--checkpoint", run, *options.split()]))
    now, then = np.load(runs / "now.npz"), np.load(EARLIER / run / "samples.npz")
    assert now.files == then.files
    # A value on the border of two grey levels may fall to either side.
    assert np.abs(now["arr_0"].astype(int) - then["arr_0"].astype(int)).max() <= 1
    assert np.array_equal(now["arr_1"], then["arr_1"])


def test_snapshots_are_combined_after_training(runs: Path) -> None:
    resume("gspn")
    written, error = write_reconstruction(Path("gspn"), 0.1, None, None)
    assert error < 1e-6
    snapshot = load_file("gspn/ema_snapshots/step-00000004-ema-0.100.safetensors")
    for name, tensor in load_file(written / "ema.safetensors").items():
        torch.testing.assert_close(tensor, snapshot[name].to(tensor.dtype), rtol=1e-3, atol=1e-5)

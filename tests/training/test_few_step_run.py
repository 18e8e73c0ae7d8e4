"""Few-step objectives in a run: from a velocity model or from scratch, resumed bit by bit, sampled in one step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn_dit.checkpoint import find_checkpoints, load_tensors, read_manifest
from gspn_dit.config import Config, load_config
from gspn_dit.errors import UserError
from gspn_dit.pipeline import GSPNPipeline
from gspn_dit.sample import parse_arguments, run
from gspn_dit.tasks import create_task
from tests.training.conftest import changed, run_training, tiny_config
from tests.training.test_loop import assert_same_tensors, metrics_of, tensors_of

BOTH = pytest.mark.parametrize("name", ["flow_map", "mean_flow"])


def few_step(output_dir: Path, name: str, model: dict[str, Any] | None = None, **training: Any) -> Config:
    config = tiny_config(output_dir, **training)
    return changed(config, objective={"name": name}, sampling={"steps": 1}, model=model or {})


@BOTH
@pytest.mark.parametrize("model", [{}, {"name": "DiT-N/4", "mixer": "gspn"}], ids=["GSPN", "DiT"])
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path, name: str, model: dict[str, Any]) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    model = {"hidden_size": 16, "depth": 2, "drop_path_rate": 0.2, **model}
    options = {"validate_every": 2, "sample_every": 2, "ema_sigma_rel": [0.1], "spike_ratio": 50.0}
    run_training(few_step(whole, name, model, **options))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        from gspn_dit.training import loop

        original = loop.Trainer.train_step

        def dies(trainer: loop.Trainer) -> Any:
            if trainer.step == 3:
                raise RuntimeError("killed")
            return original(trainer)

        patch.setattr(loop.Trainer, "train_step", dies)
        run_training(few_step(parted, name, model, **options))
    run_training(few_step(parted, name, model, **options), resume="auto")
    assert_same_tensors(tensors_of(whole, 4), tensors_of(parted, 4))
    assert metrics_of(whole) == metrics_of(parted)
    assert (whole / "samples" / "step-00000004.png").read_bytes() == (
        parted / "samples" / "step-00000004.png"
    ).read_bytes()


@BOTH
def test_a_velocity_run_is_learnt_on_from(tmp_path: Path, name: str) -> None:
    """Its weights load, but a smooth embedding of times imitates its own; that of spans has no effect yet."""
    run_training(tiny_config(tmp_path / "velocity"))
    task = create_task(few_step(tmp_path / "few", name))
    fresh = create_task(tiny_config(tmp_path / "other")).model
    own = {key: value.clone() for key, value in task.model.state_dict().items()}
    assert {key for key in own if key not in fresh.state_dict()} == {
        key for key in own if key.startswith("span_embed.")
    }
    assert all(torch.equal(own[key], value) for key, value in fresh.state_dict().items())
    task.start_from(str(tmp_path / "velocity"))
    taught = load_tensors(find_checkpoints(tmp_path / "velocity")[4], "ema")
    after = task.model.state_dict()
    kept = [key for key in after if not key.startswith("timestep_embed.")]
    assert all(torch.equal(after[key], taught.get(key, own[key])) for key in kept)
    fresh.load_state_dict(taught)
    latents, times, labels = torch.randn(3, 1, 8, 8), torch.tensor([100.0, 500.0, 1000.0]), torch.tensor([1, 2, 10])
    with torch.no_grad():
        one, other = (task.model(latents, times, labels, spans=spans) for spans in (None, times))
        given, smooth = (model.timestep_embed(torch.arange(1001.0)) for model in (fresh, task.model))
    assert torch.equal(one, other) and one.abs().max() > 0
    assert (given - smooth).mean(dim=0).abs().max() < 1e-5 and (given - smooth).std() < 0.9 * given.std(dim=0).mean()
    assert (smooth[1:] - smooth[:-1]).abs().max() < 0.1 * (given[1:] - given[:-1]).abs().max()
    run_training(few_step(tmp_path / "few", name, initialize_from=str(tmp_path / "velocity")))
    assert load_tensors(find_checkpoints(tmp_path / "few")[4], "model")["span_embed.mix.weight"].abs().max() > 0


def test_digits_in_one_step_are_learnt_from_the_demo() -> None:
    """The recipe has the demo's model and data, and the packaged weights load; it draws in one step."""
    demo, one = (load_config(f"configs/{name}.yaml") for name in ("demo", "digits_one_step"))
    assert (one.model, one.data, one.latent, one.sampling.steps) == (demo.model, demo.data, demo.latent, 1)
    assert one.training.initialize_from == "builtin:digits"
    task = create_task(one)
    before = task.model.patch_embed.weight.clone()
    task.start_from(one.training.initialize_from)
    assert not torch.equal(task.model.patch_embed.weight, before)


def test_a_few_step_run_is_no_velocity_run(tmp_path: Path) -> None:
    run_training(few_step(tmp_path / "few", "flow_map"))
    with pytest.raises(UserError, match=r"belongs to another model: 'span_embed\.expand\.bias'"):
        run_training(tiny_config(tmp_path / "velocity", initialize_from=str(tmp_path / "few")))


@BOTH
def test_sampling_in_one_step_just_works(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(few_step(tmp_path / "run", name))
    manifest = read_manifest(find_checkpoints(tmp_path / "run")[4])
    assert manifest["model"]["second_time"] is True
    assert {"loss", "error"} <= metrics_of(tmp_path / "run")[0].keys()
    out = tmp_path / "grid.png"
    run(parse_arguments(["--checkpoint", str(tmp_path / "run"), "--steps", "1", "--out", str(out)]))
    assert out.exists()
    assert "--guidance-scale 2 is ignored" in capsys.readouterr().out
    pipeline = GSPNPipeline.from_checkpoint(tmp_path / "run")
    for steps in (1, 2, 4):
        assert pipeline([0, 1], steps, output_type="np").images.shape == (2, 8, 8, 1)
    with pytest.raises(UserError, match="whose guidance the model has learnt"):
        pipeline([0], 1, guidance_scale=2.0)
    pipeline.save_pretrained(tmp_path / "saved")
    again = GSPNPipeline.from_pretrained(tmp_path / "saved")
    assert (again([3], 1, output_type="np").images == pipeline([3], 1, output_type="np").images).all()


@pytest.mark.parametrize(
    ("objective", "training", "said"),
    [
        ({"name": "mean_flow", "derivative": "jvp"}, {"compile": True}, "does not go with training.compile"),
        ({"name": "flow_map", "derivative": "jvp"}, {}, "jvp is for mean_flow, but objective.name is flow_map"),
        ({"name": "flow_map"}, {"repa_features": "f.npy"}, "does not go with objective.name flow_map"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, objective: dict[str, Any], training: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run_training(changed(tiny_config(tmp_path / "run", **training), objective=objective))
    assert not (tmp_path / "run").exists()


def test_exact_derivatives_train_on_the_cpu_alone(tmp_path: Path) -> None:
    config = few_step(tmp_path, "mean_flow", max_steps=1)
    config = changed(config, objective={"derivative": "jvp"})
    run_training(config)
    assert metrics_of(tmp_path)[0]["nonfinite_steps"] == 0
    with pytest.raises(UserError, match="jvp runs on CPUs alone, and this is cuda"):
        create_task(config).to(torch.device("cuda"))


@pytest.mark.slow
@BOTH
def test_bfloat16_stays_finite_over_the_length_of_the_demo(tmp_path: Path, name: str) -> None:
    steps = load_config("configs/demo.yaml").training.max_steps
    config = few_step(tmp_path, name, max_steps=steps, batch_size=64, mixed_precision="bf16", learning_rate=2e-3)
    run_training(changed(config, training={"log_every": 10, "checkpoint_every": steps}))
    lines = [line for line in metrics_of(tmp_path) if "loss" in line]
    assert len(lines) == steps / 10 and lines[-1]["nonfinite_steps"] == 0
    assert all(math.isfinite(line["error"]) for line in lines)

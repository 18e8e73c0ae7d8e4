"""`train.py --dry-run`: figures by hand for small models, the published ones for the recipes, nothing written."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import saved_bytes
from gspn_dit.config import Config, DataConfig, LatentConfig, ModelConfig, TrainingConfig, flatten, load_config
from gspn_dit.data.facts import data_facts
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from gspn_dit.tasks import TASKS, Plan, Task, task_class
from gspn_dit.tasks.class_conditional import ClassConditional
from gspn_dit.training.dry_run import (
    UTILISATION,
    Estimate,
    dry_run,
    estimate,
    estimate_memory,
    hours_on,
    kept_checkpoints,
)
from tests.data.tiny_vae import write_vae

ROOT = Path(__file__).parents[2]
CLASSIFIERS = sorted((ROOT / "configs").glob("imagenet1k_*.yaml"))
RECIPES = sorted({*(ROOT / "configs").glob("imagenet*.yaml")} - {*CLASSIFIERS})


def small(**training: Any) -> Config:
    """A config of a small model whose data are not there."""
    return Config(
        model=ModelConfig("GSPN-N/2", hidden_size=32, depth=2),
        data=DataConfig("latents", "nowhere", image_size=64),
        training=TrainingConfig(batch_size=8, max_steps=100, **training),
    )


def planned(name: str, size: int = 8, **options: Any) -> Plan:
    """The plan of a small model of latents 4×size×size."""
    config = dataclasses.replace(small(), model=ModelConfig(name, hidden_size=32, **options))
    return ClassConditional.plan(dataclasses.replace(config, data=DataConfig("latents", "nowhere", 8 * size)))


# -- activations and state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GSPN-N/2", "DiT-N/2"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_are_those_that_autograd_keeps(name: str, precision: Any) -> None:
    """Counted once without memory and once for real, on a batch of three."""
    settings = TrainingConfig(mixed_precision=precision)
    counted = estimate_memory(planned(name, 16, depth=2), 3, settings, 1)
    model = create_model(name, 1000, 4, 16, 4, hidden_size=32, depth=2)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(torch.zeros(3, 4, 16, 16), torch.zeros(3), torch.zeros(3, dtype=torch.int64)).float().square()

    real = saved_bytes(forward, list(model.parameters()))
    assert counted.activations + counted.copies == pytest.approx(real, rel=0.02)
    assert (counted.copies > 0) == (precision == "bf16")


def test_state_is_four_bytes_for_each_parameter_and_copy() -> None:
    plan = planned("DiT-N/2", depth=2)
    copy = 4 * sum(parameter.numel() for parameter in plan.model.parameters())
    alone = estimate_memory(plan, 2, TrainingConfig(), 1)
    assert (alone.weights, alone.gradients, alone.averages, alone.optimizer) == (copy, copy, copy, 2 * copy)
    assert alone.total == 5 * copy + alone.activations
    averages = TrainingConfig(ema_sigma_rel=[0.05, 0.1])
    assert estimate_memory(plan, 2, averages, 1).averages == 3 * copy
    assert estimate_memory(plan, 2, TrainingConfig(), 4).gradients == 2 * copy  # and DDP's buckets
    sharded = estimate_memory(plan, 2, TrainingConfig(sharding="fsdp"), 4)
    assert (sharded.weights, sharded.gradients, sharded.optimizer) == (copy // 4, copy // 4, 2 * (copy // 4))
    # ZeRO keeps weights and averages whole; a model this small fits into one bucket.
    one, two = (estimate_memory(plan, 2, TrainingConfig(sharding=f"zero{stage}"), 4) for stage in (1, 2))
    assert (one.weights, one.averages, one.optimizer) == (two.weights, two.averages, two.optimizer)
    assert (two.weights, two.averages, two.optimizer) == (copy, copy, 3 * (copy // 4))
    assert (one.gradients, two.gradients) == (2 * copy + copy // 4, copy + copy // 4)
    assert estimate_memory(plan, 2, TrainingConfig(sharding="zero2"), 1) == alone


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    plan = planned("GSPN-N/2", depth=6)
    one, four = (estimate_memory(plan, batch, TrainingConfig(), 1) for batch in (1, 4))
    assert four.activations == 4 * one.activations
    assert four.working == 4 * one.working
    # 16 tokens of 32 channels: 12 logits and 8 gates for each, their gradients, 4 bytes.
    assert one.working == 16 * 32 * 20 * 2 * 4
    checkpointed = estimate_memory(plan, 4, TrainingConfig(activation_checkpointing=True), 1)
    assert checkpointed.activations < 0.7 * four.activations
    assert plan.model.gradient_checkpointing is False


def test_the_model_is_left_on_the_meta_device() -> None:
    plan = planned("GSPN-N/2", depth=2)
    before = [id(parameter) for parameter in plan.model.parameters()]
    estimate_memory(plan, 1, TrainingConfig(), 1)
    assert [id(parameter) for parameter in plan.model.parameters()] == before
    assert all(parameter.is_meta for parameter in plan.model.parameters())


# -- the recipes -----------------------------------------------------------------------------------------------------

PUBLISHED_PARAMETERS = {
    **{"GSPN-B/2": 137e6, "GSPN-L/2": 443e6, "GSPN-XL/2": 690e6},
    **{"DiT-B/2": 130.5e6, "DiT-L/2": 458.1e6, "DiT-XL/2": 675.1e6},
    **{"GSPN2-B/2": 137e6, "GSPN2-L/2": 443e6, "GSPN2-XL/2": 690e6},  # GSPN's sizes
}


def test_there_is_a_recipe_for_every_model_and_a_larger_batch_and_resolution() -> None:
    names = {path.stem for path in RECIPES}
    expected = {f"imagenet256_{family}_{size}" for family in ("gspn", "gspn2", "dit") for size in ("b2", "l2", "xl2")}
    assert names >= expected | {"imagenet256_gspn_xl2_batch1024", "imagenet512_gspn_xl2", "imagenet512_dit_xl2"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_the_published_values(path: Path) -> None:
    config = load_config(path)
    settings = config.training
    _, family, size, *variant = path.stem.replace("imagenet", "").split("_")
    assert config.model.name == {"gspn": "GSPN", "gspn2": "GSPN2", "dit": "DiT"}[family] + f"-{size[:-1].upper()}/2"
    assert settings.batch_size == (1024 if variant else 256)
    assert settings.max_steps == (3_000_000 if config.data.image_size == 512 else 400_000)
    assert (settings.learning_rate, settings.weight_decay, settings.adam_betas) == (1e-4, 0, (0.9, 0.999))
    assert (settings.class_dropout, settings.ema_decay) == (0.1, 0.9999)
    assert (settings.warmup_steps, settings.learning_rate_schedule) == (0, "constant")
    assert (config.objective.name, config.data.horizontal_flip) == ("epsilon", True)
    assert config.data.path == f"data/imagenet{config.data.image_size}-latents"
    assert config.output_dir == f"runs/{path.stem}"


def figures_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """Everything but memory, which takes seconds."""
    zero = dataclasses.replace(estimate_memory(planned("DiT-N/2", depth=1), 1, TrainingConfig(), 1))
    monkeypatch.setattr("gspn_dit.training.dry_run.estimate_memory", lambda *arguments: zero)
    return estimate(load_config(path), 8)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters_are_the_published_ones(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(path, monkeypatch)
    published = PUBLISHED_PARAMETERS[load_config(path).model.name]
    bound = {"gspn": 0.008, "gspn2": 0.02, "dit": 0.005}[path.stem.split("_")[1]]
    assert figures.parameters == pytest.approx(published, rel=bound)


@pytest.mark.parametrize(
    ("size", "batch", "base_rate", "drop_path", "parameters", "multiply_adds"),
    [
        ("tiny", 2048, 5e-4, 0.2, 31_337_468, 5.30e9),
        ("small", 2048, 3e-4, 0.4, 50_221_250, 12.0e9),
        ("base", 1024, 5e-4, 0.5, 92_611_828, 15.85e9),
    ],
)
def test_recipes_of_classification_hold_the_published_values(
    size: str,
    batch: int,
    base_rate: float,
    drop_path: float,
    parameters: int,
    multiply_adds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path,) = (path for path in CLASSIFIERS if path.stem == f"imagenet1k_gspn_{size}")
    config, figures = load_config(path), figures_of(path, monkeypatch)
    settings, epoch = config.training, 1_281_167 / batch
    assert figures.parameters == parameters
    assert figures.plan.multiply_adds == pytest.approx(multiply_adds, rel=0.03)
    assert (settings.max_steps, settings.warmup_steps) == (round(300 * epoch), round(20 * epoch))
    rates = (settings.initial_learning_rate, settings.learning_rate, settings.final_learning_rate)
    assert settings.batch_size == batch and rates == pytest.approx([x * batch / 512 for x in (5e-7, base_rate, 5e-6)])
    assert config.model.drop_path_rate == drop_path
    assert (settings.weight_decay, settings.decay_vectors, settings.max_grad_norm) == (0.05, False, 5.0)
    assert config.output_dir == f"runs/{path.stem}"


def test_classifiers_differ_in_what_depends_on_their_size_alone() -> None:
    """The augmentation and all the rest is one recipe."""
    of_size = {"output_dir", "model.name", "model.drop_path_rate"}
    of_size |= {f"training.{key}" for key in ("max_steps", "batch_size", "warmup_steps")}
    of_size |= {f"training.{key}learning_rate" for key in ("initial_", "", "final_")}
    of_size |= {f"training.{key}_every" for key in ("checkpoint", "validate", "sample")}
    common = [
        {key: value for key, value in flatten(load_config(path).to_dict()) if key not in of_size}
        for path in CLASSIFIERS
    ]
    assert len(common) == 3 and common[0] == common[1] == common[2]


def test_flops_of_dit_xl_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(ROOT / "configs" / "imagenet256_dit_xl2.yaml", monkeypatch)
    assert figures.plan.multiply_adds == pytest.approx(118.6e9, rel=0.02)
    assert "in scans" not in str(figures.plan.rows)
    assert figures.training_flops == 6 * figures.plan.multiply_adds


def test_scans_are_six_multiply_adds_for_each_token_channel_and_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(ROOT / "configs" / "imagenet256_gspn_b2.yaml", monkeypatch)
    scans = 31 * 6 * 4 * 256 * 900
    assert figures.plan.multiply_adds > scans
    assert figures.plan.rows[2][1].startswith(f"{scans / 1e9:.3g} G of them in scans")


# -- data, batch, checkpoints ----------------------------------------------------------------------------------------


def test_data_that_are_not_there_are_taken_to_be_imagenet() -> None:
    facts = data_facts(small())
    assert (facts.images, facts.num_classes, facts.channels, facts.size) == (1_281_167, 1000, 4, 8)
    assert facts.bytes == 1_281_167 * 2 * 8 * 64 * 2  # two mirror images, 8 moments of 8×8, two bytes
    assert facts.source == "data.path nowhere does not exist; these are ImageNet's figures"
    pixels = data_facts(Config(data=DataConfig("imagefolder", "nowhere", 32)))
    assert (pixels.channels, pixels.size, pixels.bytes) == (3, 32, 1_281_167 * 32 * 32 * 3)
    encoded = data_facts(Config(data=DataConfig("imagefolder", "nowhere", 32), latent=LatentConfig("kl", "some/vae")))
    assert (encoded.channels, encoded.size) == (4, 4)


@pytest.mark.parametrize(
    ("data", "kind", "row"),
    [
        # 768 channels of 16×16 of an image and its mirror image in float16: 504 GB a side
        ("imagefolder", "rae", "would write 1007.55 GB, which is a lot: encode while training"),
        ("imagefolder", "kl", "would write 41.98 GB, and no step would pay for the encoder"),
        ("latents", "rae", "1007.55 GB on disk, read once an epoch; data.name imagefolder, latent.name and latent.vae"),
        ("latents", "kl", None),
    ],
)
def test_large_caches_of_latents_are_advised_against(data: str, kind: Any, row: str | None) -> None:
    latent = LatentConfig(kind, "some/vae")
    config = Config(data=DataConfig(data, "nowhere", 256), latent=latent, model=ModelConfig("GSPN-N/1", 32, 2))
    found = [text for name, text in task_class(config.task).plan(config).rows if name == "latents"]
    assert found == [] if row is None else row in found[0]


def test_a_dry_run_asks_the_autoencoder_that_is_there(tmp_path: Path) -> None:
    vae = str(write_vae(tmp_path / "vae"))
    facts = data_facts(Config(data=DataConfig("imagefolder", "nowhere", 32), latent=LatentConfig("kl", vae)))
    assert (facts.channels, facts.size) == (2, 16)
    assert facts.cache_bytes == 1_281_167 * 2 * 4 * 16 * 16 * 2
    assert facts.natural_shift == 1


def test_data_that_are_there_are_looked_at() -> None:
    facts = data_facts(Config(data=DataConfig("digits")))
    assert (facts.images, facts.num_classes, facts.channels, facts.size) == (1437, 10, 1, 8)
    assert facts.bytes == 1437 * 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig("latents", "nowhere"), "a dry run without data needs data.image_size"),
        (DataConfig("latents", "nowhere", 36), "data.image_size 36 is not divisible by 8, the autoencoder's factor"),
    ],
)
def test_data_that_cannot_be_guessed(data: DataConfig, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        data_facts(Config(data=data))


def test_what_training_would_refuse_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 8 is not divisible by 3 processes × 1 accumulation steps"):
        estimate(small(), 3)
    with pytest.raises(UserError, match=r"data.buckets does not go with sharding \(fsdp\); leave one of them out"):
        settings = TrainingConfig(sharding="fsdp", batch_size=8)
        estimate(Config(data=DataConfig(image_size=8, buckets=["8x8", "4x16"]), training=settings), 1)
    with pytest.raises(UserError, match="model: unknown model 'GSPN-M/2'"):
        estimate(dataclasses.replace(small(), model=ModelConfig("GSPN-M/2")), 1)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"checkpoint_every": 10, "keep_last": 2}, 2),  # 90, 100
        ({"checkpoint_every": 30, "keep_last": 2}, 2),  # 90, 100
        ({"checkpoint_every": 10, "keep_last": 2, "keep_every": 50}, 3),  # 50, 90, 100
        ({"checkpoint_every": 10, "keep_last": 20}, 10),
        ({"checkpoint_every": 1000, "keep_last": 2}, 1),
    ],
)
def test_checkpoints_that_are_left(options: dict[str, int], kept: int) -> None:
    assert kept_checkpoints(small(**options)) == kept


# -- the command -----------------------------------------------------------------------------------------------------


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = dataclasses.replace(small(checkpoint_every=10, ema_sigma_rel=[0.1], ema_snapshot_every=30))
    dry_run(config)
    text = capsys.readouterr().out
    parameters = estimate(config, 2).parameters
    assert f"GSPN-N/2, {parameters:,} parameters" in text
    assert "8 images = 2 GPUs × 1 accumulation steps × 4" in text
    assert re.search(r"^hours +A100 .*, H100 .*; on 2 of them$", text, re.MULTILINE)
    assert "at 40% of the float32 peak that NVIDIA states, which is assumed, not measured" in text
    assert "100 steps, 800 images, 0.000624 epochs" in text
    assert f"checkpoints: 2 × {20 * parameters / 1e6:.2f} MB" in text  # weights, two averages, two moments
    assert f"ema_snapshots: 4 × {2 * parameters / 1e6:.2f} MB" in text
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "1")
    dry_run(config)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_command_answers_in_seconds_without_writing(tmp_path: Path) -> None:
    """The largest recipe: the seconds of processor time of the whole process, imports included."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "imagenet256_gspn_xl2.yaml")]
    code = (
        "import json, resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([done.returncode, done.stdout, done.stderr, usage.ru_utime + usage.ru_stime]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    returncode, output, errors, seconds = json.loads(done.stdout)
    assert (returncode, errors) == (0, "")
    assert "GSPN-XL/2, 691,704,260 parameters" in output
    assert seconds < 30
    assert not list(tmp_path.iterdir())


class Sum(Task):
    """Knows no image and no class: a linear map of three numbers to one."""

    @classmethod
    def plan(cls, config: Config) -> Plan:
        with torch.device("meta"):
            model = torch.nn.Linear(3, 1, bias=False)
        return Plan(model, lambda batch: (torch.empty(batch, 3),), 3, 50, "fifty triples", [("model", "a sum")])


def test_any_task_answers_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three weights: each figure by hand."""
    monkeypatch.setitem(TASKS, "sum", Sum)
    config = dataclasses.replace(small(), task="sum", output_dir=str(tmp_path / "run"))
    figures = estimate(config, 2)
    assert (figures.parameters, figures.micro_batch, figures.training_flops) == (3, 4, 18)
    memory = figures.memory
    assert (memory.weights, memory.gradients, memory.averages, memory.optimizer) == (12, 24, 12, 24)
    # Kept of four samples: three inputs, and the output, which the stand-in of a loss squares.
    assert (memory.copies, memory.activations, memory.working) == (0, 4 * 4 * (3 + 1), 0)
    dry_run(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model      a sum"
    assert [line for line in lines if line.startswith("data ")] == ["data       fifty triples"]
    assert "100 steps, 800 images, 16 epochs" in "\n".join(lines)
    assert not list(tmp_path.iterdir())


def test_a_task_without_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "mine", Task)
    with pytest.raises(UserError) as caught:
        dry_run(dataclasses.replace(small(), task="mine"))
    assert str(caught.value) == "--dry-run is not known to task mine; start without it"
    with pytest.raises(UserError, match="unknown task 'txt'; allowed are"):
        dry_run(dataclasses.replace(small(), task="txt"))


def test_hours_by_hand() -> None:
    """40% of 312 TFLOP/s on 8 GPUs are 998.4e12 FLOP a second."""
    flops = 998.4e12 * 3600 * 5
    assert hours_on(flops, 8, TrainingConfig(mixed_precision="bf16"))["A100"] == pytest.approx(5)
    assert hours_on(flops, 8, TrainingConfig(tf32=True))["A100"] == pytest.approx(10)
    assert hours_on(flops, 8, TrainingConfig())["A100"] == pytest.approx(80)
    assert hours_on(1e12 * UTILISATION * 3600, 1, TrainingConfig())["RTX 4090"] == pytest.approx(1 / 82.6)
    one = hours_on(flops, 1, TrainingConfig(mixed_precision="bf16"))
    assert one["A100"] == pytest.approx(40) and one["B200"] < one["H100"] == one["H200"] < one["A100"]

"""The configuration: what is read, what is refused and how, and that it survives being written and read again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn_dit.config import (
    ClassificationConfig,
    Config,
    DataConfig,
    LatentConfig,
    ModelConfig,
    ObjectiveConfig,
    SamplingConfig,
    TextConfig,
    TrainArguments,
    TrainingConfig,
    UNetConfig,
    config_from_dict,
    flatten,
    load_config,
    parse_train_arguments,
    save_config,
)
from gspn_dit.diffusion import create_objective
from gspn_dit.errors import UserError
from gspn_dit.models import create_model
from gspn_dit.models.text_unet import create_unet, mount_scans
from gspn_dit.ops import DIRECTIONS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))

FIXED_KEYS = [
    "task",
    "output_dir",
    "seed",
    "model.name",
    "data.name",
    "data.path",
    "training.max_steps",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.learning_rate",
    "training.checkpoint_every",
    "training.log_every",
    "training.sample_every",
    "training.validate_every",
    "training.mixed_precision",
    "objective.name",
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write a config file and return its path."""

    def to_file(text: str) -> str:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return str(path)

    return to_file


def parse(*arguments: str) -> TrainArguments:
    return parse_train_arguments(list(arguments))


def refusal(*arguments: str) -> str:
    """The message, on one line, with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    return " ".join(str(caught.value).split())


# -- values --------------------------------------------------------------------------------------------------------


def test_names_that_other_tools_rely_on_exist() -> None:
    keys = dict(flatten(Config().to_dict()))
    assert set(FIXED_KEYS) <= set(keys)


def test_without_arguments_every_value_is_the_default() -> None:
    assert parse() == TrainArguments(Config(), resume=None, overwrite=False)


def test_file_sets_what_it_names_and_leaves_the_rest(write: Callable[[str], str]) -> None:
    config = load_config(write("seed: 7\nmodel:\n  depth: 4\ndata:\n  path: a/b\n"))
    assert config == Config(seed=7, model=ModelConfig(depth=4), data=DataConfig(path="a/b"))


@pytest.mark.parametrize("text", ["", "# nothing\n", "training: {}\n"])
def test_a_file_may_set_nothing(write: Callable[[str], str], text: str) -> None:
    assert load_config(write(text)) == Config()


@pytest.mark.parametrize("order", ["file first", "file last"])
def test_command_line_beats_the_file_wherever_it_stands(write: Callable[[str], str], order: str) -> None:
    file = ["--config", write("seed: 7\ntraining:\n  max_steps: 10\n  batch_size: 32\n")]
    options = ["--training.max_steps", "20", "--model.name=GSPN-N/2"]
    config = parse(*file, *options).config if order == "file first" else parse(*options, *file).config
    training = TrainingConfig(max_steps=20, batch_size=32)
    assert config == Config(seed=7, model=ModelConfig(name="GSPN-N/2"), training=training)


@pytest.mark.parametrize("spelling", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_floats_in_every_spelling(write: Callable[[str], str], spelling: str) -> None:
    # YAML 1.1 reads 1e-4, which has no point, as a string.
    assert load_config(write(f"training:\n  learning_rate: {spelling}\n")).training.learning_rate == 1e-4
    assert parse("--training.learning_rate", spelling).config.training.learning_rate == 1e-4


def test_whole_number_where_a_float_is_asked_for(write: Callable[[str], str]) -> None:
    scale = load_config(write("sampling:\n  guidance_scale: 3\n")).sampling.guidance_scale
    assert (scale, type(scale)) == (3.0, float)


@pytest.mark.parametrize("value", ["no", "'no'", "bf16"])
def test_mixed_precision_no_needs_no_quotes(write: Callable[[str], str], value: str) -> None:
    read = load_config(write(f"training:\n  mixed_precision: {value}\n")).training.mixed_precision
    assert read == value.strip("'")
    assert parse("--training.mixed_precision", value.strip("'")).config.training.mixed_precision == read


def test_sequences_become_what_the_types_say() -> None:
    config = parse("--sampling.guidance_interval", "[0.1,0.7]", "--training.trackers", "[]").config
    assert config.sampling.guidance_interval == (0.1, 0.7)
    assert config.training.trackers == []


def test_null_is_a_value_of_the_optional_keys(write: Callable[[str], str]) -> None:
    config = parse("--config", write("model:\n  depth: 4\ndata:\n  path: x\n"), "--model.depth", "null").config
    assert (config.model.depth, config.data.path) == (None, "x")


def test_negative_numbers_on_the_command_line() -> None:
    assert parse("--objective.logit_normal_mean", "-0.5").config.objective.logit_normal_mean == -0.5


@pytest.mark.parametrize(
    ("arguments", "resume", "overwrite"),
    [
        ((), None, False),
        (("--resume", "auto"), "auto", False),
        (("--resume=runs/a",), "runs/a", False),
        (("--overwrite",), None, True),
    ],
)
def test_resume_and_overwrite(arguments: tuple[str, ...], resume: str | None, overwrite: bool) -> None:
    parsed = parse(*arguments)
    assert (parsed.resume, parsed.overwrite) == (resume, overwrite)


def test_overrides_are_the_options_that_were_set() -> None:
    assert ModelConfig(name="GSPN-N/2").overrides() == {}
    assert ModelConfig(depth=4, drop_path_rate=0.0).overrides() == {"depth": 4, "drop_path_rate": 0.0}


# -- keys that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("training.max_step", "training.max_steps"),  # abbreviated
        ("training.batch", "training.batch_size"),
        ("training.learning_rat", "training.learning_rate"),
        ("traning.batch_size", "training.batch_size"),  # misspelt
        ("learning_rate", "training.learning_rate"),  # without its section
        ("output", "output_dir"),
        ("training.max-steps", "training.max_steps"),
    ],
)
def test_unknown_key_is_refused_with_the_right_one(write: Callable[[str], str], key: str, right: str) -> None:
    message = refusal(f"--{key}", "3")
    assert f"command line: unknown key '{key}'; did you mean '" in message
    assert message.endswith(f"'{right}'?") or message.endswith(f"'{right.split('.')[-1]}'?")

    section, _, last = key.rpartition(".")
    file = write(f"{section}:\n  {last}: 3\n" if section else f"{last}: 3\n")
    assert refusal("--config", file) == message.replace("command line", file)


@pytest.mark.parametrize("flag", ["resum", "resumes", "overwrit", "conf"])
def test_flags_are_not_abbreviated(flag: str) -> None:
    right = {"resum": "resume", "resumes": "resume", "overwrit": "overwrite", "conf": "config"}[flag]
    assert refusal(f"--{flag}", "auto") == f"command line: unknown key '{flag}'; did you mean '{right}'?"


@pytest.mark.parametrize("text", ["training: 3\n", "training:\n", "training: [1]\n"])
def test_section_is_not_a_key(write: Callable[[str], str], text: str) -> None:
    file = write(text)
    assert refusal("--config", file) == f"{file}: 'training' is a section; give its keys as training.KEY"
    assert "'training' is a section" in refusal("--training", "{}")


def test_every_unknown_key_of_a_checkpoint_is_refused() -> None:
    tree = Config().to_dict()
    with pytest.raises(UserError, match="bogus"):
        config_from_dict({**tree, "bogus": 1})
    with pytest.raises(UserError, match="max_stepz"):
        config_from_dict({**tree, "training": {"max_stepz": 1}})


@pytest.mark.parametrize("word", ["stray", "-x"])
def test_stray_arguments_are_named(word: str) -> None:
    assert word in refusal(word)


# -- values that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.max_steps", "many"),
        ("training.max_steps", "1.5"),
        ("training.max_steps", "true"),
        ("training.learning_rate", "fast"),
        ("training.learning_rate", ".nan"),
        ("training.learning_rate", "true"),
        ("training.mixed_precision", "fp16"),
        ("training.trackers", "tensorboard"),
        ("data.horizontal_flip", "7"),
        ("objective.timestep_sampling", "noise"),
        ("sampling.guidance_interval", "0.5"),
        ("sampling.guidance_interval", "[0.1, 0.5, 0.9]"),
        ("model", "GSPN-N/2"),
        ("seed", "1.5"),
    ],
)
def test_ill_typed_value_is_refused_by_its_key(write: Callable[[str], str], key: str, value: str) -> None:
    section, _, last = key.rpartition(".")
    file = write(f"{section}:\n  {last}: {value}\n" if section else f"{last}: {value}\n")
    assert key in refusal("--config", file)
    if section:
        assert key in refusal(f"--{key}", value)


@pytest.mark.parametrize("key", ["output_dir", "seed", "model.name", "training.max_steps", "data.name"])
def test_null_is_refused_where_nothing_stands_for_it(write: Callable[[str], str], key: str) -> None:
    section, _, last = key.rpartition(".")
    file = write(f"{section}:\n  {last}: null\n" if section else f"{last}:\n")
    assert f"{key} is null" in refusal("--config", file)


def test_null_on_the_command_line_is_a_word_where_words_are_asked_for() -> None:
    assert parse("--output_dir", "null").config.output_dir == "null"
    assert "seed" in refusal("--seed", "null")


def test_options_of_dit_are_refused_for_another_family() -> None:
    key, value = "mlp", "swiglu"
    assert ModelConfig("DiT-S/2", **{key: value}).overrides() == {key: value}
    assert refusal("--model.name", "GSPN-N/2", f"--model.{key}", str(value).lower()) == (
        f"model.{key} is for DiT and GSPN2 models, but model.name is GSPN-N/2; leave it out"
    )


@pytest.mark.parametrize("option", [("long_skips", False), ("conditioning", "adaln-zero"), ("gate_norm", True)])
def test_options_of_gspn_are_refused_for_another_family(option: tuple[str, Any]) -> None:
    key, value = option
    assert ModelConfig("GSPN-S/2", **{key: value}).overrides() == {key: value}
    assert refusal("--model.name", "DiT-N/2", f"--model.{key}", str(value).lower()) == (
        f"model.{key} is for GSPN models, but model.name is DiT-N/2; leave it out"
    )


@pytest.mark.parametrize("given", [["right", "right"], ["rigth"], []])
def test_scan_directions_are_some_of_the_four_and_each_once(given: list[str]) -> None:
    assert refusal("--model.scan_directions", json.dumps(given)) == (
        f"model.scan_directions is {given}, but must hold different ones of {', '.join(DIRECTIONS)}"
    )
    assert parse("--model.scan_directions", '["up", "left"]').config.model.overrides() == {
        "scan_directions": ["up", "left"]
    }


OUT_OF_RANGE = [
    (Config, "seed", -1),
    (Config, "seed", 2**63),
    (Config, "output_dir", ""),
    (ModelConfig, "hidden_size", 0),
    (ModelConfig, "depth", 0),
    (ModelConfig, "num_heads", 0),
    (ModelConfig, "weight_groups", 0),
    (ModelConfig, "scan_window", 0),
    (ModelConfig, "drop_path_rate", 1.0),
    (ModelConfig, "drop_path_rate", -0.1),
    (DataConfig, "validation_fraction", 0.6),
    (DataConfig, "image_size", 0),
    (DataConfig, "buckets", ["24x40"]),
    (DataConfig, "buckets", ["24 40"]),
    (DataConfig, "buckets", ["0x40"]),
    (ObjectiveConfig, "logit_normal_std", 0.0),
    (ObjectiveConfig, "timestep_shift", 0.0),
    (ObjectiveConfig, "sampling_shift", 0.0),
    (TrainingConfig, "max_steps", 0),
    (TrainingConfig, "batch_size", 0),
    (TrainingConfig, "gradient_accumulation_steps", 0),
    (TrainingConfig, "num_processes", 0),
    (TrainingConfig, "cpu_threads", 0),
    (TrainingConfig, "learning_rate", 0.0),
    (TrainingConfig, "learning_rate", float("nan")),
    (TrainingConfig, "warmup_steps", -1),
    (TrainingConfig, "weight_decay", -0.1),
    (TrainingConfig, "adam_betas", (0.9, 1.0)),
    (TrainingConfig, "max_grad_norm", 0.0),
    (TrainingConfig, "class_dropout", 1.0),
    (TrainingConfig, "ema_decay", 1.0),
    (TrainingConfig, "log_every", 0),
    (TrainingConfig, "checkpoint_every", 0),
    (TrainingConfig, "sample_every", 0),
    (TrainingConfig, "validate_every", 0),
    (TrainingConfig, "keep_last", 0),
    (TrainingConfig, "keep_every", 0),
    (TrainingConfig, "fd_every", 0),
    (TrainingConfig, "fd_samples", 0),
    (TrainingConfig, "validation_images", 0),
    (TrainingConfig, "max_nonfinite_steps", 0),
    (TrainingConfig, "spike_ratio", 1.0),
    (TrainingConfig, "max_spikes", 0),
    (ModelConfig, "scan_window", 2**64),
    (UNetConfig, "window", 2**64),
    (ObjectiveConfig, "guidance_scale", 0.5),
    (ObjectiveConfig, "guidance_mix", 0.0),
    (ObjectiveConfig, "pair_share", 1.0),
    (ObjectiveConfig, "final_step", 0.2),
    (TrainingConfig, "trackers", ["mlflow"]),
    (TrainingConfig, "ema_sigma_rel", [0.05, 0.3]),
    (TrainingConfig, "ema_snapshot_every", 0),
    (TrainingConfig, "repa_weight", 0.0),
    (TrainingConfig, "repa_depth", 0),
    (TrainingConfig, "muon_momentum", 1.0),
    (DataConfig, "streaming_shuffle_images", 0),
    (SamplingConfig, "steps", 0),
    (SamplingConfig, "per_class", 0),
    (SamplingConfig, "max_classes", 0),
    (SamplingConfig, "guidance_scale", -1.0),
    (SamplingConfig, "guidance_scale", float("inf")),
    (SamplingConfig, "guidance_channels", 0),
    (SamplingConfig, "guidance_interval", (0.5, 0.1)),
    (SamplingConfig, "guidance_interval", (0.0, 1.1)),
]


@pytest.mark.parametrize(("section", "name", "value"), OUT_OF_RANGE, ids=lambda value: getattr(value, "__name__", None))
def test_out_of_range_value_is_refused_by_its_key(section: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        section(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "-1"), "seed is -1, but must lie in [0, 2^63)"),
        (("--training.max_steps", "0"), "training.max_steps is 0, but must be at least 1"),
        (("--output_dir", ""), "output_dir is empty, but must name a directory"),
        (("--latent.name", "kl"), "latent.name is kl, but latent.vae names no autoencoder"),
        (("--latent.vae", "x"), "latent.vae is x, but latent.name is identity; set latent.name kl"),
        (
            ("--training.batch_size", "10", "--training.gradient_accumulation_steps", "4"),
            "training.batch_size 10 is not divisible by training.gradient_accumulation_steps 4",
        ),
        (
            ("--sampling.guidance_interval", "[0.5,0.1]"),
            "sampling.guidance_interval is [0.5, 0.1], but must be [low, high] with 0 ≤ low ≤ high ≤ 1",
        ),
    ],
)
def test_message_says_what_was_given_and_what_is_allowed(arguments: tuple[str, ...], message: str) -> None:
    assert refusal(*arguments) == message


# -- files that are refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["training: [\n", "\x00", "a: b: c\n"])
def test_file_that_is_not_yaml(write: Callable[[str], str], text: str) -> None:
    file = write(text)
    assert refusal("--config", file).startswith(f"config file {file} cannot be read: ")


def test_file_of_another_shape(write: Callable[[str], str]) -> None:
    file = write("- 1\n")
    assert refusal("--config", file) == f"config file {file} must hold keys and values, not a list"


def test_file_that_does_not_exist_or_is_a_directory_or_is_left_out(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert refusal("--config", missing) == f"config file {missing} does not exist"
    assert refusal(f"--config={missing}") == f"config file {missing} does not exist"
    assert refusal("--config", str(tmp_path)).startswith(f"config file {tmp_path} cannot be read: ")
    assert refusal("--config") == refusal("--config=") == "--config needs a file"


def test_two_files(write: Callable[[str], str]) -> None:
    file = write("seed: 1\n")
    assert refusal("--config", file, f"--config={file}") == "--config is given 2 times; give one file"


# -- round trips ---------------------------------------------------------------------------------------------------

ODD_TEXTS = ["no", "1e5", "123", "true", "[1]", "{a: 1}", " a b ", "é: ü", "a'b\"c", "C:\\x"]


def no_default() -> Config:
    """A config with another value than the default in every leaf that has one."""
    return Config(
        task="text-to-image",
        output_dir="other",
        seed=2**63 - 1,
        model=ModelConfig(
            *("DiT-N/2", 32, 4, 8, 2, 0.05, "gspn", 2, True, ["down", "right"]),
            **dict(
                mixer_options={"mine": 3},
                backbone_options={"stem": 2},
                lpu=True,
                norm="rms",
                mlp="swiglu",
                interpolate_positions=True,
                scan_skip=True,
                proxy_channels=5,
                proxy_ratio=7,
                stem_conv=True,
                mlp_ratio=1.5,
                attention_every=2,
                conv_every=4,
                scan_global_every=3,
            ),
        ),
        data=DataConfig("hf", "some/path", 32, 0.25, True, True, 77, "caption"),
        latent=LatentConfig("kl", "some/vae", check=False),
        objective=ObjectiveConfig(
            "epsilon", "logit_normal", -0.3, 1.7, 3.0, 2.0, 1.5, 0.3, 0.5, "uniform", 0.01, "jvp"
        ),
        text=TextConfig("some/encoder", 77, table="some/texts", prompts=["a cat"]),
        unet=UNetConfig([32], 2, 16, 4, "gspn", "qkv", 4, 16, False, 8, "some/teacher", True),
        classification=ClassificationConfig(
            *((0.1, 0.9), (0.5, 2.0), 3, "bilinear", 0.4, 9.0, 0.5, 3, 0.25, 0.8, 1.0, 0.3, 0.1),
            *([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.875),
        ),
        training=TrainingConfig(
            **dict(initialize_from="some/run"),
            **dict(
                max_steps=7,
                batch_size=12,
                gradient_accumulation_steps=3,
                num_processes=2,
                cpu_threads=3,
                learning_rate=3e-7,
            ),
            **dict(warmup_steps=5, learning_rate_schedule="cosine", weight_decay=0.1, adam_betas=(0.8, 0.95)),
            **dict(max_grad_norm=0.5, class_dropout=0.2, ema_decay=1 / 3, mixed_precision="bf16"),
            **dict(spike_ratio=5.0, max_spikes=4, optimizer="muon", muon_momentum=0.9),
            **dict(max_nonfinite_steps=3, log_every=1, checkpoint_every=2, keep_last=1, keep_every=4, sample_every=6),
            **dict(validate_every=9, validation_images=11, trackers=[]),
            **dict(ema_sigma_rel=[0.05, 0.13], ema_snapshot_every=17, ema_snapshot_dtype="float32", tf32=True),
            **dict(compile=True, activation_checkpointing=True, sharding="fsdp"),
            **dict(repa_features="features.npy", repa_weight=0.25, repa_depth=3),
            **dict(repa_projector="conv", repa_normalise=True),
            **dict(fd_every=13, fd_samples=15, fd_features="digits"),
            **dict(initial_learning_rate=1e-9, final_learning_rate=2e-9, decay_vectors=False, layer_decay=0.75),
        ),
        sampling=SamplingConfig(3, 1.1, (0.1, 0.9), 2, 4, "heun", 3),
    )


def test_the_example_of_round_trips_leaves_no_default() -> None:
    defaults = dict(flatten(Config().to_dict()))
    same = {key for key, value in flatten(no_default().to_dict()) if value == defaults.get(key)}
    # What a DiT has not, what alone can have a teacher, and what epsilon and text-to-image do not go with.
    of_gspn = {"model.long_skips", "model.conditioning", "model.gate_norm"}
    assert same == {*of_gspn, "unet.mixer", "objective.prediction", "data.buckets"}


GSPN_OPTIONS = Config(
    model=ModelConfig("GSPN-N/2", long_skips=False, conditioning="adaln-zero", gate_norm=True),
    data=DataConfig(image_size=32, buckets=["24x40", "40x24"]),
    objective=ObjectiveConfig(prediction="data"),
)


@pytest.mark.parametrize("config", [Config(), no_default(), GSPN_OPTIONS], ids=["defaults", "no defaults", "gspn"])
def test_round_trips_through_a_file_and_a_dict(tmp_path: Path, config: Config) -> None:
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_texts_that_yaml_could_misread_survive(tmp_path: Path, text: str) -> None:
    config = Config(output_dir=text, data=DataConfig(path=text))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config.to_dict()) == config
    assert parse(f"--output_dir={text}").config.output_dir == text


def test_to_dict_is_plain_json() -> None:
    tree = no_default().to_dict()
    assert tree["sampling"]["guidance_interval"] == [0.1, 0.9]
    assert tree["training"]["max_steps"] == 7
    assert json.loads(json.dumps(tree)) == tree


def test_frozen() -> None:
    config = Config()
    for part in (config, config.model, config.data, config.latent, config.objective, config.training, config.sampling):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, "other")


# -- as a user starts it ---------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Start `python train.py` in a folder that is not the checkout; return it and its CPU seconds."""
    checkout = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    environment.pop("RANK", None)
    before = os.times()
    command = [sys.executable, str(checkout / "train.py"), *arguments]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = os.times()
    return finished, after.children_user - before.children_user + after.children_system - before.children_system


def test_help_names_every_key_within_three_seconds(tmp_path: Path) -> None:
    finished, seconds = start(tmp_path, "--help")
    assert (finished.returncode, finished.stderr) == (0, "")
    missing = [key for key, _ in flatten(Config().to_dict()) if f"--{key} " not in finished.stdout]
    assert missing == []
    assert all(flag in finished.stdout for flag in ("--config", "--resume", "--overwrite"))
    assert seconds < 3


def test_a_mistake_is_one_line_and_exit_code_2_at_once(tmp_path: Path) -> None:
    finished, seconds = start(tmp_path, "--training.max_step", "3")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        "train.py: error: command line: unknown key 'training.max_step'; did you mean 'training.max_steps'?\n"
    )
    assert seconds < 3
    assert list(tmp_path.iterdir()) == []


# -- the configs of the project ------------------------------------------------------------------------------------


def test_there_are_configs() -> None:
    assert "demo.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_and_its_model_instantiates(path: Path) -> None:
    config = load_config(path)
    if config.task == "text-to-image":
        with torch.device("meta"):
            unet = mount_scans(create_unet(config.unet, 3, 3, 384), config.unet)
        assert len(unet.mixers) == 7
        return
    if config.task == "classification":
        from gspn_dit.tasks.classification import build_model, model_arguments

        with torch.device("meta"):
            assert build_model(model_arguments(config, 10, 3))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        return
    channels, size = (1, 8) if config.data.name == "digits" else (4, 32)
    out_channels = create_objective(config.objective).out_channels(channels)
    with torch.device("meta"):
        model = create_model(config.model.name, 10, channels, size, out_channels, **config.model.overrides())
        output = model(torch.zeros(2, channels, size, size), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert output.shape == (2, out_channels, size, size)


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("training:\n  max_steps: 1\nseed: 1\ntraining:\n  batch_size: 2\n")
    with pytest.raises(UserError, match=r"key 'training' is given twice \(line 4\)"):
        load_config(path)

"""The configuration of a run: typed, frozen dataclasses, read from YAML and overridden on the command line.

A key that does not exist, is misspelt or abbreviated, or has a value of another type is refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from gspn_dit.errors import UserError, nearest


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_interval(name: str, interval: tuple[float, float]) -> None:
    low, high = interval
    _require(0 <= low <= high <= 1, f"{name} is {list(interval)}, but must be [low, high] with 0 ≤ low ≤ high ≤ 1")


SCAN_DIRECTIONS = ("right", "left", "down", "up")
"""`gspn_dit.ops.DIRECTIONS`, which would load torch."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network; a value of null keeps the preset's."""

    name: str = "GSPN-B/2"
    """Preset and patch size, such as GSPN-XL/2 or DiT-XL/2."""
    hidden_size: int | None = None
    depth: int | None = None
    weight_groups: int | None = None
    """Number of groups of channels that share propagation weights (GSPN-2); null: one per channel."""
    scan_window: int | None = None
    """Lines after which the scan restarts (local GSPN); null: global."""
    drop_path_rate: float | None = None
    """Probability that stochastic depth drops the last block's branch; rises linearly from 0."""
    mixer: Literal["attention", "gspn"] | None = None
    """What mixes the tokens of a DiT model; null: attention."""
    num_heads: int | None = None
    """Heads of attention; DiT models alone."""
    positions: bool | None = None
    """Add sines and cosines of the place to the patches of a DiT model; null: with attention, not with scans."""
    scan_directions: list[str] | None = None
    """Directions of the scan, of right, left, down and up; null: all four."""
    long_skips: bool | None = None
    """Join each encoder block to its mirror in the decoder; GSPN models alone; null: true."""
    conditioning: Literal["additive", "adaln-zero"] | None = None
    """How timestep and class act: added once to the tokens (additive, what null means), or by modulating every block;
    GSPN models alone."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "depth", "num_heads", "weight_groups", "scan_window"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name} is {value}, but must be at least 1")
        rate = self.drop_path_rate
        _require(rate is None or 0 <= rate < 1, f"model.drop_path_rate is {rate}, but must lie in [0, 1)")
        given = self.scan_directions
        _require(
            given is None or (0 < len(given) == len(set(given)) and set(given) <= set(SCAN_DIRECTIONS)),
            f"model.scan_directions is {given}, but must hold different ones of {', '.join(SCAN_DIRECTIONS)}",
        )
        for family, other, names in (
            ("DiT", "GSPN-", ("mixer", "num_heads", "positions")),
            ("GSPN", "DiT-", ("long_skips", "conditioning")),
        ):
            for name in names:
                refused = self.name.startswith(other) and getattr(self, name) is not None
                _require(
                    not refused, f"model.{name} is for {family} models, but model.name is {self.name}; leave it out"
                )

    def overrides(self) -> dict[str, Any]:
        """Return the options that were set, for `create_model`."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key != "name" and value is not None}


@dataclass(frozen=True)
class DataConfig:
    """Which labelled images."""

    name: Literal["digits", "imagefolder", "hf", "latents"] = "digits"
    path: str | None = None
    """Directory of an image folder, a saved Hugging Face data set or encoded latents."""
    image_size: int | None = None
    """Pixels; images are centre-cropped and resized to it. null: all images share one size."""
    validation_fraction: float = 0.1
    """Share held out where the source has no validation split of its own."""
    horizontal_flip: bool = False
    """Mirror half of the training images, chosen by sample number."""
    streaming: bool = False
    """hf: read the training images in the order they are stored, never the whole set; see docs/latents.md."""
    streaming_shuffle_images: int = 1024
    """Images of a stream that are shuffled among themselves."""

    def __post_init__(self) -> None:
        fraction = self.validation_fraction
        _require(0 <= fraction <= 0.5, f"data.validation_fraction is {fraction}, but must lie in [0, 0.5]")
        _require(
            self.image_size is None or self.image_size >= 1,
            f"data.image_size is {self.image_size}, but must be at least 1",
        )
        _require(not self.streaming or self.name == "hf", f"data.streaming is for data.name hf, not {self.name}")
        block = self.streaming_shuffle_images
        _require(block >= 1, f"data.streaming_shuffle_images is {block}, but must be at least 1")


@dataclass(frozen=True)
class LatentConfig:
    """What the model generates: pixels, or the latents of an autoencoder."""

    name: Literal["identity", "kl"] = "identity"
    """kl: latents of `vae`. With data.name latents it is always kl, and the autoencoder the one that encoded them."""
    vae: str | None = None
    """Directory or hub name of an AutoencoderKL; with data.name latents where it lies now, if it was moved."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict, and at which times."""

    name: Literal["velocity", "epsilon"] = "velocity"
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_normal_mean: float = 0.0
    logit_normal_std: float = 1.0
    timestep_shift: float = 1.0
    """t becomes s·t / (1 + (s-1)·t); above 1 favours noise (Esser et al., 2403.03206, eq. 23)."""

    def __post_init__(self) -> None:
        _require(self.logit_normal_std > 0, f"objective.logit_normal_std is {self.logit_normal_std}, but must be > 0")
        _require(self.timestep_shift > 0, f"objective.timestep_shift is {self.timestep_shift}, but must be > 0")


TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation and what is written on the way; a step is one optimiser step."""

    max_steps: int = 400_000
    initialize_from: str | None = None
    """Run directory or checkpoint whose averaged weights the model starts from (fine-tuning); null: from scratch."""
    batch_size: int = 256
    """Images per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    num_processes: int | None = None
    """Number of processes this run must have; null: any."""
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up; cosine falls to 0 at max_steps."""
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    class_dropout: float = 0.1
    """Probability that a label is replaced by the null label."""
    ema_decay: float = 0.9999
    ema_sigma_rel: list[float] = field(default_factory=list)
    """Relative lengths of power-function averages kept beside (EDM2: [0.05, 0.1]), from which others are made."""
    ema_snapshot_every: int = 5_000
    """Steps between snapshots of these averages."""
    ema_snapshot_dtype: Literal["float16", "float32"] = "float16"
    mixed_precision: Literal["no", "bf16"] = "no"
    tf32: bool = False
    """Let float32 products on NVIDIA tensor cores round their factors to 10 bits: faster, less exact."""
    compile: bool = False
    """Compile the blocks of the model with torch.compile."""
    activation_checkpointing: bool = False
    """Keep only the inputs of blocks and run each block again in the backward pass: less memory, a third more time."""
    repa_features: str | None = None
    """Features of the training images, .npy [images, tokens, dimensions], to align hidden tokens with; null: none."""
    repa_weight: float = 0.5
    """Weight of the alignment in the loss (arXiv 2410.06940)."""
    repa_depth: int = 8
    """Block whose output is aligned; the first is 1."""
    sharding: Literal["none", "fsdp", "zero1", "zero2"] = "none"
    """What is split over the processes. fsdp: weights, gradients, averages and optimiser state; zero1: the optimiser
    state alone, by DeepSpeed; zero2: the gradients, too."""
    max_nonfinite_steps: int = 10
    """Stop after this many non-finite steps in a row; each one is skipped."""
    log_every: int = 50
    checkpoint_every: int = 5_000
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept for good."""
    sample_every: int = 5_000
    validate_every: int = 5_000
    validation_images: int = 1_024
    """At most this many validation images, each at one fixed time and noise."""
    fd_every: int | None = None
    """Steps between quick Fréchet distances of few samples, a trend that compares with no figure; null: none."""
    fd_samples: int = 1_000
    fd_features: str | None = None
    """Feature net: a bundled one, a file of fid.train_features, or inception; null: the one bundled for the data."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for name in (
            *("max_steps", "batch_size", "gradient_accumulation_steps", "log_every", "checkpoint_every", "keep_last"),
            *(
                "sample_every",
                "validate_every",
                "validation_images",
                "max_nonfinite_steps",
                "ema_snapshot_every",
                "repa_depth",
            ),
            "fd_samples",
        ):
            _require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}, but must be at least 1")
        _require(self.warmup_steps >= 0, f"training.warmup_steps is {self.warmup_steps}, but must be at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            _require(getattr(self, name) > 0, f"training.{name} is {getattr(self, name)}, but must be above 0")
        for name in ("num_processes", "keep_every", "fd_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"training.{name} is {value}, but must be null or at least 1")
        _require(self.weight_decay >= 0, f"training.weight_decay is {self.weight_decay}, but must be at least 0")
        for name in ("class_dropout", "ema_decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"training.{name} is {value}, but must lie in [0, 1)")
        betas = list(self.adam_betas)
        _require(all(0 <= beta < 1 for beta in betas), f"training.adam_betas is {betas}, but both must lie in [0, 1)")
        _require(self.repa_weight > 0, f"training.repa_weight is {self.repa_weight}, but must be above 0")
        lengths = self.ema_sigma_rel
        _require(
            all(0.01 <= length <= 0.28 for length in lengths) and len({f"{x:.3f}" for x in lengths}) == len(lengths),
            f"training.ema_sigma_rel is {lengths}, but must hold different lengths in [0.01, 0.28], to three decimals",
        )
        unknown = sorted(set(self.trackers) - set(TRACKERS))
        _require(not unknown, f"training.trackers has {unknown}, but can hold {', '.join(TRACKERS)}")
        _require(
            self.batch_size % self.gradient_accumulation_steps == 0,
            f"training.batch_size {self.batch_size} is not divisible by "
            f"training.gradient_accumulation_steps {self.gradient_accumulation_steps}",
        )


@dataclass(frozen=True)
class SamplingConfig:
    """The grids drawn while training, from EMA weights with a fixed seed."""

    steps: int = 50
    guidance_scale: float = 2.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts at times t inside [low, high]; t is 1 for noise and 0 for data."""
    per_class: int = 8
    max_classes: int = 10
    sampler: str | None = None
    """One of the objective's samplers; null: its first (euler for velocity, ddpm for epsilon)."""
    guidance_channels: int | None = None
    """Guide the first channels alone (3 in DiT's published figures); null: all."""

    def __post_init__(self) -> None:
        for name in ("steps", "per_class", "max_classes"):
            _require(getattr(self, name) >= 1, f"sampling.{name} is {getattr(self, name)}, but must be at least 1")
        scale = self.guidance_scale
        _require(0 <= scale < float("inf"), f"sampling.guidance_scale is {scale}, but must be at least 0 and finite")
        channels = self.guidance_channels
        _require(
            channels is None or channels >= 1,
            f"sampling.guidance_channels is {channels}, but must be null or at least 1",
        )
        _require_interval("sampling.guidance_interval", self.guidance_interval)


@dataclass(frozen=True)
class Config:
    """Everything a run is a function of."""

    output_dir: str = "runs/default"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _require(bool(self.output_dir), "output_dir is empty, but must name a directory")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}, but must lie in [0, 2^63)")
        _require(
            self.latent.name != "kl" or self.data.name == "latents" or bool(self.latent.vae),
            "latent.name is kl, but latent.vae names no autoencoder",
        )
        _require(
            self.latent.vae is None or self.latent.name == "kl" or self.data.name == "latents",
            f"latent.vae is {self.latent.vae}, but latent.name is {self.latent.name}; set latent.name kl",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the nested dict of plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class TrainArguments:
    """What `train.py` was asked for."""

    config: Config
    resume: str | None
    overwrite: bool
    dry_run: bool = False
    """Print what the run would take and write, and stop."""


@functools.cache
def _known_keys() -> list[str]:
    return [key for key, _ in flatten(dataclasses.asdict(Config()))]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_keys(keys: Sequence[str], source: str, also: Sequence[str] = ()) -> None:
    sections = {key.split(".")[0] for key in _known_keys() if "." in key}
    for key in keys:
        if key in sections:
            raise UserError(f"{source}: '{key}' is a section; give its keys as {key}.KEY")
        if key not in _known_keys():
            last_words = [known.split(".")[-1] for known in _known_keys()]
            hint = nearest(key, [*_known_keys(), *also]) or nearest(key.split(".")[-1], last_words)
            raise UserError(f"{source}: unknown key '{key}'{hint}")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"key '{key_node.value}' is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a config file into a nested dict whose keys are known; raises UserError with the file's name."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} must hold keys and values, not a {type(tree).__name__}")
    _check_keys([str(key) for key, _ in flatten({str(k): v for k, v in tree.items()})], str(path))
    training = tree.get("training")
    if isinstance(training, dict) and training.get("mixed_precision") is False:
        training["mixed_precision"] = "no"  # YAML reads an unquoted no as false
    return tree


@functools.cache
def _build_parser(program: str) -> Any:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        description="Train a class-conditional diffusion model; every key of the config can be given as --section.key.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument(
        "--resume",
        type=str | None,
        help="'auto' continues output_dir from its newest complete checkpoint, or starts it; DIR: a checkpoint",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what output_dir holds and start afresh")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs, memory, steps, data and what would be written, and stop",
    )
    parser.add_class_arguments(Config, None, as_group=False)
    return parser


def _parse(arguments: list[str], tree: Mapping[str, Any], program: str) -> TrainArguments:
    import argparse

    parser = _build_parser(program)
    try:
        parsed = parser.parse_args(["--config", json.dumps(tree), *arguments])
        _check_nulls(parsed)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        built = instantiate(parsed)
        config = Config(**{spec.name: built[spec.name] for spec in dataclasses.fields(Config)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(str(error).replace("Parser key ", "config key ")) from None
    return TrainArguments(config, parsed.resume, parsed.overwrite, parsed.dry_run)


def _check_nulls(parsed: Mapping[str, Any]) -> None:
    """Refuse null, which the parser takes for any key, where it is not the default: nothing would replace it."""
    for key, default in flatten(dataclasses.asdict(Config())):
        if parsed[key] is None and default is not None:
            raise UserError(f"config key {key} is null, but needs a value; leave the key out for {default!r}")


def parse_train_arguments(arguments: Sequence[str] | None = None, program: str = "train.py") -> TrainArguments:
    """Parse `--config FILE --section.key value … --resume auto|DIR --overwrite --dry-run`; the command line beats
    the file.

    Raises UserError for an unknown, abbreviated or ill-typed key, or a value out of range.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in given or "--help" in given:
        _build_parser(program).print_help()
        sys.exit(0)
    rest, files = [], []
    tokens = iter(given)
    for token in tokens:
        if token == "--config":
            files.append(next(tokens, ""))
        elif token.startswith("--config="):
            files.append(token.partition("=")[2])
        else:
            rest.append(token)
    if "" in files:
        raise UserError("--config needs a file")
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times; give one file")
    options = [token[2:].split("=")[0] for token in rest if token.startswith("--")]
    flags = ("config", "resume", "overwrite", "dry-run")
    _check_keys([key for key in options if key not in flags], "command line", flags)
    return _parse(rest, read_yaml(files[0]) if files else {}, program)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a YAML file into a `Config`; keys it does not name keep their defaults."""
    return _parse([], read_yaml(path), "config").config


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a `Config` from the dict that `Config.to_dict` gave (a checkpoint's)."""
    return _parse([], tree, "config").config


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML that `load_config` reads back equal."""
    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

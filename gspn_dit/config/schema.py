"""The keys of a config, their types, defaults and ranges: frozen dataclasses that check themselves.

Those of training and its previews are in `training`, those of one task in `classification` and `text`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from gspn_dit.config.classification import ClassificationConfig
from gspn_dit.config.section import Section, require, require_line_count
from gspn_dit.config.text import TextConfig, UNetConfig
from gspn_dit.config.training import SamplingConfig, TrainingConfig
from gspn_dit.sampling_options import parse_size

SCAN_DIRECTIONS = ("right", "left", "down", "up")
"""`gspn_dit.ops.DIRECTIONS`, which would load torch."""


@dataclass(frozen=True)
class ModelConfig(Section):
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
    mixer: str | None = None
    """What mixes the tokens, of `gspn_dit.models.mixers.MIXERS`: attention, gspn, conv, linear, neighbourhood. null:
    attention in DiT models, gspn in GSPN models."""
    num_heads: int | None = None
    """Heads of attention, of whichever kind."""
    positions: bool | None = None
    """Add sines and cosines of the place to the patches; null: in DiT models with attention alone."""
    scan_directions: list[str] | None = None
    """Directions of the scan, of right, left, down and up; null: all four."""
    long_skips: bool | None = None
    """Join each encoder block to its mirror in the decoder; GSPN models alone; null: true."""
    conditioning: Literal["additive", "adaln-zero"] | None = None
    """How timestep and class act: added once to the tokens (additive, what null means), or by modulating every block;
    GSPN models alone."""
    mixer_options: dict[str, Any] | None = None
    """Options of the mixer that have no key here, by name."""
    backbone_options: dict[str, Any] | None = None
    """Options of a classification backbone, by name; task classification alone."""
    lpu: bool | None = None
    """Add a depthwise 3×3 convolution to the tokens before each block; null: false."""
    stem_conv: bool | None = None
    """Add a depthwise 3×3 convolution to the embedded patches, once; null: false."""
    norm: Literal["layer", "rms"] | None = None
    """Of the blocks: LayerNorm (layer, what null means) or RMSNorm. Those of a scan are `mixer_options.scan_norm`."""
    gate_norm: bool | None = None
    """Norm what a GSPN model's block squares; null: false, as published."""
    mlp_ratio: float | None = None
    """Width of the blocks' MLPs over the model's; null: 4 in DiT models; none in GSPN models, whose published block has
    no token-wise path beside its convolutions."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """Of a DiT model's blocks: with GELU (what null means), or SwiGLU of about as many weights. Rotary positions of
    attention are `mixer_options.rotary`."""
    interpolate_positions: bool | None = None
    """Squeeze the positions of another size of image into the range of the training size's; null: false."""
    scan_skip: bool | None = None
    """Add (a linear map of the proxy) ⊙ tokens to the merged scan; null: false."""
    proxy_channels: int | None = None
    """Width of the proxy from which a scan's weights and gates come; null: the model's width by `proxy_ratio`."""
    proxy_ratio: int | None = None
    """Null: 16."""
    attention_every: int | None = None
    """Every so many blocks one, the last, has attention in the mixer's place; null: none has."""
    conv_every: int | None = None
    """Every so many blocks one, the last, has a convolution in the mixer's place; null: none has."""
    scan_global_every: int | None = None
    """With `scan_window`: every so many blocks the scan of one, the last, is global; null: none is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("hidden_size", "depth", "num_heads", "weight_groups", "scan_window", "proxy_channels", "proxy_ratio")
        for name in sizes:
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name} is {value}, but must be at least 1")
        require_line_count("model.scan_window", self.scan_window)
        for name in ("attention_every", "conv_every", "scan_global_every"):
            value = getattr(self, name)
            require(value is None or value >= 2, f"model.{name} is {value}, but must be at least 2")
        ratio = self.mlp_ratio
        require(ratio is None or 0 < ratio <= 64, f"model.mlp_ratio is {ratio}, but must lie in (0, 64]")
        rate = self.drop_path_rate
        require(rate is None or 0 <= rate < 1, f"model.drop_path_rate is {rate}, but must lie in [0, 1)")
        given = self.scan_directions
        require(
            given is None or (0 < len(given) == len(set(given)) and set(given) <= set(SCAN_DIRECTIONS)),
            f"model.scan_directions is {given}, but must hold different ones of {', '.join(SCAN_DIRECTIONS)}",
        )
        for name in self.mixer_options or {}:
            require(not hasattr(self, name), f"model.mixer_options.{name} has a key of its own, model.{name}")
        for family, other, names in (
            ("DiT and GSPN2", ("GSPN-",), ("mlp",)),
            ("GSPN", ("DiT-", "GSPN2-"), ("long_skips", "conditioning", "gate_norm")),
        ):
            for name in names:
                refused = self.name.startswith(other) and getattr(self, name) is not None
                require(
                    not refused, f"model.{name} is for {family} models, but model.name is {self.name}; leave it out"
                )

    def overrides(self) -> dict[str, Any]:
        """Return the options that were set, for `create_model`."""
        values = dataclasses.asdict(self)
        values.update(values.pop("mixer_options") or {})
        return {key: value for key, value in values.items() if key != "name" and value is not None}


@dataclass(frozen=True)
class DataConfig(Section):
    """Which labelled images."""

    name: str = "digits"
    """digits, imagefolder, hf, latents, or what else is registered in `gspn_dit.data.sources.SOURCES`."""
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
    caption_column: str = "text"
    """Where the captions are, one or several for an image: a key of metadata.jsonl or a column; text-to-image alone."""
    buckets: list[str] = field(default_factory=list)
    """Sizes of training images, HEIGHTxWIDTH in pixels, such as [32x32, 24x40, 40x24]: each image is resized and
    cropped to the one of the nearest aspect, in turn to those of one aspect. Empty: squares of image_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = self.validation_fraction
        require(0 <= fraction <= 0.5, f"data.validation_fraction is {fraction}, but must lie in [0, 0.5]")
        require(
            self.image_size is None or self.image_size >= 1,
            f"data.image_size is {self.image_size}, but must be at least 1",
        )
        block = self.streaming_shuffle_images
        require(block >= 1, f"data.streaming_shuffle_images is {block}, but must be at least 1")
        sizes = self.bucket_sizes()
        require(
            not sizes or self.image_size is not None,
            "data.buckets needs data.image_size: the side of squares of about their area, which previews show",
        )
        require(
            len(set(sizes)) == len(sizes),
            f"data.buckets is {self.buckets}, of which two are the same; keep one of them",
        )

    def bucket_sizes(self) -> list[tuple[int, int]]:
        """Return height and width of each of `buckets`; raises ValueError for one that is no size."""
        return [parse_size(text, "data.buckets") for text in self.buckets]


@dataclass(frozen=True)
class LatentConfig(Section):
    """What the model generates: pixels, or the latents of an autoencoder."""

    name: Literal["identity", "kl", "dc", "rae", "flux2"] = "identity"
    """identity: pixels; else the kind of `vae`: an AutoencoderKL, AutoencoderDC, AutoencoderRAE or AutoencoderKLFlux2.
    With data.name latents it is that of the autoencoder that encoded them."""
    vae: str | None = None
    """Directory or hub name of an autoencoder; with data.name latents where it lies now, if it was moved."""
    check: bool = True
    """Refuse a run whose latents are far from mean 0 and deviation 1 though the autoencoder reconstructs them."""


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """What the model learns to predict, and at which times."""

    name: str = "velocity"
    """velocity, epsilon, or what else is registered in `gspn_dit.diffusion.OBJECTIVES`."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_normal_mean: float = 0.0
    logit_normal_std: float = 1.0
    timestep_shift: float | None = None
    """t becomes s·t / (1 + (s-1)·t); above 1 favours noise (Esser et al., 2403.03206, eq. 23). null: of velocity in the
    latents of an autoencoder √(C·H·W / 4096) where that is above 1 (RAE, 2510.11690); else 1."""
    sampling_shift: float | None = None
    """The same of the times that a sampler visits; null: as in training. All objectives but epsilon."""
    guidance_scale: float | None = None
    """Guidance that flow_map and mean_flow learn; null: as published, 3 and 2."""
    guidance_mix: float | None = None
    """Share of the data in their guided target, the rest is the model's own prediction; null: 0.25 and 0.5."""
    pair_share: float = 0.25
    """Share of the samples from which flow_map and mean_flow learn a step; the others learn the velocity."""
    pair_times: Literal["published", "uniform"] = "published"
    """Distribution of the steps' times; uniform ones reach t = 1 and s = 0 more often, as short trainings need."""
    final_step: float = 0.002
    """How long the part of a step is by which flow_map learns it at the end of a training; at the start it is 0.1."""
    derivative: Literal["differences", "jvp"] = "differences"
    """How mean_flow derives the model along the path: two more calls, or exactly (on CPUs alone)."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the model of objective velocity outputs; the loss is the velocity's either way (data: arXiv 2511.13720)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.prediction == "velocity" or self.name not in ("epsilon", "flow_map", "mean_flow"),
            f"objective.prediction data is for objective.name velocity, not {self.name}; leave one of them out",
        )
        require(self.logit_normal_std > 0, f"objective.logit_normal_std is {self.logit_normal_std}, but must be > 0")
        for name in ("timestep_shift", "sampling_shift"):
            shift = getattr(self, name)
            require(shift is None or shift > 0, f"objective.{name} is {shift}, but must be null or > 0")
        scale, mix = self.guidance_scale, self.guidance_mix
        require(
            scale is None or scale >= 1, f"objective.guidance_scale is {scale}, but must be null or at least 1 (none)"
        )
        require(mix is None or 0 < mix <= 1, f"objective.guidance_mix is {mix}, but must be null or lie in (0, 1]")
        share, final = self.pair_share, self.final_step
        require(0 < final <= 0.1, f"objective.final_step is {final}, but must lie in (0, 0.1]")
        require(0 < share < 1, f"objective.pair_share is {share}, but must lie in (0, 1)")


@dataclass(frozen=True)
class Config(Section):
    """Everything a run is a function of."""

    task: str = "class-conditional"
    """What the run learns, of `gspn_dit.tasks.TASKS`."""
    output_dir: str = "runs/default"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    classification: ClassificationConfig = field(default_factory=ClassificationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output_dir), "output_dir is empty, but must name a directory")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}, but must lie in [0, 2^63)")
        require(
            not self.data.buckets or self.task not in ("text-to-image", "classification"),
            f"data.buckets does not go with task {self.task}; leave it out",
        )
        pixels, encoded = self.latent.name == "identity", self.data.name == "latents"
        require(
            pixels or encoded or bool(self.latent.vae),
            f"latent.name is {self.latent.name}, but latent.vae names no autoencoder",
        )
        require(
            self.latent.vae is None or not pixels or encoded,
            f"latent.vae is {self.latent.vae}, but latent.name is identity; set latent.name kl",
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

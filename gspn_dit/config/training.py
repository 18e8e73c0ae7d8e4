"""The keys of the optimisation, of what is written on the way, and of previews."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gspn_dit.config.section import Section, require
from gspn_dit.sampling_options import check_guidance

TRACKERS = ("tensorboard", "wandb", "trackio")
COUNTS = (
    *("max_steps", "batch_size", "gradient_accumulation_steps", "max_nonfinite_steps", "max_spikes", "repa_depth"),
    *("log_every", "checkpoint_every", "sample_every", "validate_every", "ema_snapshot_every", "keep_last"),
    *("validation_images", "fd_samples"),
)
OPTIONAL_COUNTS = ("num_processes", "cpu_threads", "keep_every", "fd_every")


@dataclass(frozen=True)
class TrainingConfig(Section):
    """The optimisation and what is written on the way; a step is one optimiser step."""

    max_steps: int = 400_000
    initialize_from: str | None = None
    """Run directory or checkpoint whose EMA weights the model starts from (fine-tuning); null: from scratch."""
    batch_size: int = 256
    """Images per optimiser step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    num_processes: int | None = None
    """Number of processes this run must have; null: any."""
    cpu_threads: int | None = None
    """Threads of each process on a CPU; null: as many as the run began with, whose bits it keeps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon moves the matrices of blocks by their orthogonalised momentum, and the rest as adamw does; rates and decay
    carry over from one to the other (arXiv 2502.16982)."""
    muon_momentum: float = 0.95
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    initial_learning_rate: float = 0.0
    """From which the warm-up starts."""
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up; cosine falls to final_learning_rate at max_steps."""
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    decay_vectors: bool = True
    """Decay biases, scales of norms and other vectors, too; false: matrices and kernels alone."""
    layer_decay: float = 1.0
    """Each block learns at this times the rate of the next one; the head at the full rate (arXiv 2106.08254)."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; null: they are not."""
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
    """Keep the inputs of blocks alone and recompute each block in the backward pass: less memory, a third more time."""
    repa_features: str | None = None
    """Features of the training images to align hidden tokens with: of `gspn_dit.prepare.features`, or a .npy [images,
    tokens, dimensions]; null: none."""
    repa_weight: float = 0.5
    """Weight of the alignment in the loss (arXiv 2410.06940)."""
    repa_depth: int = 8
    """Block whose output is aligned; the first is 1."""
    repa_projector: Literal["mlp", "conv"] = "mlp"
    """What maps tokens to features: three linear maps (REPA), or a 3×3 convolution (iREPA, arXiv 2512.10794)."""
    repa_normalise: bool = False
    """Subtract the features' mean over an image and divide by their deviation, as iREPA does."""
    sharding: Literal["none", "fsdp", "zero1", "zero2"] = "none"
    """What is split over the processes. fsdp: weights, gradients, averages and optimiser state; zero1: the optimiser
    state alone, by DeepSpeed; zero2: the gradients, too."""
    max_nonfinite_steps: int = 10
    """Stop after this many non-finite steps in a row; each one is skipped."""
    spike_ratio: float | None = None
    """Skip steps whose loss, or error where the objective has one, is above this many times the median of the last 50
    steps; null: take them."""
    max_spikes: int = 10
    """After this many skipped steps in a row, weights, averages and optimiser go back to the last checkpoint that was
    followed by good ones; data and noise go on."""
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
    """Feature net: a bundled one, a file of fid.train_features, a run of task classification, or inception; null: the
    one bundled for the data."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts()
        self._check_rates()
        self._check_averages()
        unknown = sorted(set(self.trackers) - set(TRACKERS))
        require(not unknown, f"training.trackers has {unknown}, but can hold {', '.join(TRACKERS)}")

    def _check_counts(self) -> None:
        for name in COUNTS:
            require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}, but must be at least 1")
        for name in OPTIONAL_COUNTS:
            value = getattr(self, name)
            require(value is None or value >= 1, f"training.{name} is {value}, but must be null or at least 1")
        require(self.warmup_steps >= 0, f"training.warmup_steps is {self.warmup_steps}, but must be at least 0")
        require(
            self.batch_size % self.gradient_accumulation_steps == 0,
            f"training.batch_size {self.batch_size} is not divisible by "
            f"training.gradient_accumulation_steps {self.gradient_accumulation_steps}",
        )

    def _check_rates(self) -> None:
        require(self.learning_rate > 0, f"training.learning_rate is {self.learning_rate}, but must be above 0")
        for name in ("initial_learning_rate", "final_learning_rate"):
            value = getattr(self, name)
            require(
                0 <= value <= self.learning_rate,
                f"training.{name} is {value}, but must lie in [0, training.learning_rate]",
            )
        require(0 < self.layer_decay <= 1, f"training.layer_decay is {self.layer_decay}, but must lie in (0, 1]")
        require(self.weight_decay >= 0, f"training.weight_decay is {self.weight_decay}, but must be at least 0")
        bound, ratio = self.max_grad_norm, self.spike_ratio
        require(bound is None or bound > 0, f"training.max_grad_norm is {bound}, but must be null or above 0")
        require(ratio is None or ratio > 1, f"training.spike_ratio is {ratio}, but must be null or above 1")
        for name in ("class_dropout", "ema_decay", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name} is {value}, but must lie in [0, 1)")
        betas = list(self.adam_betas)
        require(all(0 <= beta < 1 for beta in betas), f"training.adam_betas is {betas}, but both must lie in [0, 1)")
        require(self.repa_weight > 0, f"training.repa_weight is {self.repa_weight}, but must be above 0")

    def _check_averages(self) -> None:
        lengths = self.ema_sigma_rel
        require(
            all(0.01 <= length <= 0.28 for length in lengths) and len({f"{x:.3f}" for x in lengths}) == len(lengths),
            f"training.ema_sigma_rel is {lengths}, but must hold different lengths in [0.01, 0.28], to three decimals",
        )


@dataclass(frozen=True)
class SamplingConfig(Section):
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
        super().__post_init__()
        for name in ("steps", "per_class", "max_classes"):
            require(getattr(self, name) >= 1, f"sampling.{name} is {getattr(self, name)}, but must be at least 1")
        check_guidance(
            self.guidance_scale,
            self.guidance_interval,
            self.guidance_channels,
            prefix="sampling.guidance_",
            form="[low, high] with",
            every="null or at least 1",
        )

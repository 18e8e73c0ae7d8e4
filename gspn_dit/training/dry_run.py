"""What a config would take and write, printed without a GPU, without the data, and without writing anything."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.config import Config, TrainingConfig
from gspn_dit.data.sources import find_source
from gspn_dit.diffusion import create_objective
from gspn_dit.errors import UserError
from gspn_dit.models import DiffusionModel, create_model
from gspn_dit.models.flops import forward_multiply_adds
from gspn_dit.models.mixers import GSPNMixer, Mixer
from gspn_dit.sampling_options import check_guided_channels
from gspn_dit.training.strategy.zero import STAGES, bucket_elements

FLOAT32_BYTES = 4
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
KL_CHANNELS, KL_FACTOR = 4, 8
"""Of the autoencoder that DiT and GSPN use."""


@dataclass(frozen=True)
class DataFacts:
    """What training needs to know of its data."""

    images: int
    num_classes: int
    channels: int
    """Of the latent."""
    size: int
    """Height and width of the latent."""
    bytes: int
    """On disk for latents, decoded for images."""
    source: str
    """Where these figures come from."""


def data_facts(config: Config) -> DataFacts:
    """Look at the data of a config, or, where they are not there, take ImageNet's figures.

    Raises UserError for data that are damaged, or where neither the data nor the config tell the size of the images.
    """
    data = config.data
    source = find_source(data.name)
    if not source.bundled and not (data.path and Path(data.path).exists()):
        return _imagenet(config)
    if source.latents is not None:  # opened without the autoencoder, which may have to be downloaded
        latents = source.latents(data.path, "train", data.validation_fraction)
        spec, size_bytes = latents.manifest["latent"], sum(shard["bytes"] for shard in latents.manifest["shards"])
        return DataFacts(len(latents), latents.num_classes, spec["channels"], spec["size"], size_bytes, str(data.path))
    from gspn_dit.data.build import build_data

    built = build_data(config)
    images, latent = built.training.images, built.latent
    size_bytes = len(images) * latent.image_size**2 * latent.image_channels
    where = data.path or f"the {data.name} that are bundled"
    return DataFacts(len(images), images.num_classes, latent.channels, latent.size, size_bytes, where)


def _imagenet(config: Config) -> DataFacts:
    data, source = config.data, f"ImageNet's figures: data.path {config.data.path} is not there"
    if data.image_size is None:
        raise UserError(f"data.path {data.path} is not there; a dry run without data needs data.image_size")
    if find_source(data.name).latents is None and config.latent.name == "identity":
        size_bytes = IMAGENET_IMAGES * data.image_size**2 * 3
        return DataFacts(IMAGENET_IMAGES, IMAGENET_CLASSES, 3, data.image_size, size_bytes, source)
    if data.image_size % KL_FACTOR:
        raise UserError(f"data.image_size {data.image_size} is not divisible by {KL_FACTOR}, the autoencoder's factor")
    size = data.image_size // KL_FACTOR
    # Mean and log-variance of each image and its mirror image, float16.
    size_bytes = IMAGENET_IMAGES * 2 * 2 * KL_CHANNELS * size**2 * 2
    return DataFacts(IMAGENET_IMAGES, IMAGENET_CLASSES, KL_CHANNELS, size, size_bytes, source)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU at the height of a training step; CUDA itself, cuDNN and fragmentation come on top."""

    weights: int
    """Float32."""
    gradients: int
    """Float32; under DDP twice, since they are copied to buckets that are exchanged, under ZeRO with one bucket."""
    averages: int
    """The exponential moving average, and one more for each of training.ema_sigma_rel; float32."""
    optimizer: int
    """AdamW's two moments, float32; under ZeRO with a copy of the weights they belong to."""
    copies: int
    """What is kept once, whatever the batch: under autocast the weights in bfloat16."""
    activations: int
    """What autograd keeps of a micro-batch, and with checkpointing one block's activations on top."""
    working: int
    """Logits and gates of one scan with their gradients, which are recomputed in the backward pass."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate_memory(
    model: DiffusionModel, latent_size: int, micro_batch: int, settings: TrainingConfig, processes: int
) -> MemoryEstimate:
    """Estimate the memory of a training step on each GPU.

    State takes 4 bytes per parameter and copy: weights, gradients, averages and two moments; FSDP divides all of it by
    the processes, ZeRO 1 the moments and ZeRO 2 the gradients, too. Activations are what autograd saves, counted
    storage by storage.

    Args:
        model: on the meta device.
        latent_size: height and width of the latent.
        micro_batch: images of one forward pass on one GPU.
        settings: precision, checkpointing, averages and sharding.
        processes: GPUs.
    """
    sharding = settings.sharding if processes > 1 else "none"
    whole = FLOAT32_BYTES * sum(parameter.numel() for parameter in model.parameters())
    part, bucket = whole // processes, FLOAT32_BYTES * bucket_elements(model)
    copy = part if sharding == "fsdp" else whole
    gradients = {
        "none": whole * (2 if processes > 1 else 1),
        "fsdp": part,
        "zero1": whole + part + bucket,
        "zero2": part + bucket,
    }
    once, per_image = _saved_bytes(model, latent_size, settings.mixed_precision, checkpointing=False)
    activations = micro_batch * per_image
    if settings.activation_checkpointing:
        once, kept_per_image = _saved_bytes(model, latent_size, settings.mixed_precision, checkpointing=True)
        activations = micro_batch * (kept_per_image + per_image // len(model.blocks))
    return MemoryEstimate(
        weights=copy,
        gradients=gradients[sharding],
        averages=copy * (1 + len(settings.ema_sigma_rel)),
        optimizer=3 * part if sharding in STAGES else 2 * copy,
        copies=once,
        activations=activations,
        working=micro_batch * _working_bytes(model, latent_size, 2 if settings.mixed_precision == "bf16" else 4),
    )


def _working_bytes(model: DiffusionModel, latent_size: int, element_bytes: int) -> int:
    """Return the bytes that the mixer that needs most recomputes in the backward pass for an image."""
    side = latent_size // model.patch_size
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    return element_bytes * max(mixer.working_elements(side, side) for mixer in mixers)


def _saved_bytes(model: DiffusionModel, latent_size: int, mixed_precision: str, checkpointing: bool) -> tuple[int, int]:
    """Return the bytes that autograd saves once, whatever the batch, and for each image; weights are not counted."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = model.gradient_checkpointing
    model.gradient_checkpointing = checkpointing
    real = {module: dict(module._parameters) for module in model.modules()}
    try:
        with FakeTensorMode():
            for module, parameters in real.items():
                module._parameters.update({name: _on_cpu(value) for name, value in parameters.items()})
            one, two = (_saved_by_forward(model, count, latent_size, mixed_precision) for count in (1, 2))
    finally:
        model.gradient_checkpointing = before
        for module, parameters in real.items():
            module._parameters.update(parameters)
    return 2 * one - two, two - one


def _on_cpu(parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Return a parameter of the same geometry for which autocast works; under FakeTensorMode it takes no memory."""
    if parameter is None:
        return None
    return nn.Parameter(torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu"))


def _saved_by_forward(model: DiffusionModel, batch: int, latent_size: int, mixed_precision: str) -> int:
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    latents = torch.empty(batch, model.in_channels, latent_size, latent_size)
    labels = torch.zeros(batch, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"),
    ):
        loss = model(latents, torch.empty(batch), labels).float().square().mean()
    del loss
    return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class Estimate:
    """All figures of a dry run."""

    data: DataFacts
    parameters: int
    multiply_adds: int
    """Of the forward pass of one image."""
    scan_multiply_adds: int
    """The scans' share of them."""
    processes: int
    micro_batch: int
    """Images of one forward pass on one GPU."""
    memory: MemoryEstimate
    checkpoint_bytes: int
    snapshot_bytes: int
    """Of one snapshot of one power-function average."""

    @property
    def training_flops(self) -> int:
        """Floating-point operations that an image costs in training."""
        return 6 * self.multiply_adds


def estimate(config: Config, processes: int) -> Estimate:
    """Compute the figures of a config on a number of GPUs; raises UserError for what training would refuse."""
    settings, objective = config.training, create_objective(config.objective)
    objective.resolve_sampler(config.sampling.sampler, config.sampling.steps)
    shares = processes * settings.gradient_accumulation_steps
    if settings.batch_size % shares:
        raise UserError(
            f"training.batch_size {settings.batch_size} is not divisible by {processes} processes × "
            f"{settings.gradient_accumulation_steps} accumulation steps"
        )
    facts = data_facts(config)
    check_guided_channels(config.sampling.guidance_channels, facts.channels, "sampling.guidance_channels")
    model = _model_without_memory(config, facts, objective.out_channels(facts.channels))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    side = facts.size // model.patch_size
    scans = [module for module in model.modules() if isinstance(module, GSPNMixer)]
    average = {"float16": 2, "float32": 4}[settings.ema_snapshot_dtype]
    return Estimate(
        data=facts,
        parameters=parameters,
        multiply_adds=forward_multiply_adds(model, facts.size, facts.size),
        scan_multiply_adds=sum(scan.scan_multiply_adds(side, side) for scan in scans),
        processes=processes,
        micro_batch=settings.batch_size // shares,
        memory=estimate_memory(model, facts.size, settings.batch_size // shares, settings, processes),
        # Weights, their averages and AdamW's two moments; manifest and headers are small beside them.
        checkpoint_bytes=FLOAT32_BYTES * parameters * (4 + len(settings.ema_sigma_rel)),
        snapshot_bytes=average * parameters,
    )


def _model_without_memory(config: Config, facts: DataFacts, out_channels: int) -> DiffusionModel:
    overrides: dict[str, Any] = config.model.overrides()
    try:
        with torch.device("meta"):
            return create_model(
                config.model.name, facts.num_classes, facts.channels, facts.size, out_channels, **overrides
            )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def kept_checkpoints(config: Config) -> int:
    """Return how many checkpoints are left when training ends: the newest, and the multiples of `keep_every`."""
    settings = config.training
    steps = {*range(settings.checkpoint_every, settings.max_steps + 1, settings.checkpoint_every), settings.max_steps}
    newest = sorted(steps)[-settings.keep_last :]
    for_good = [step for step in steps if settings.keep_every and step % settings.keep_every == 0]
    return len({*newest, *for_good})


def report(config: Config, figures: Estimate) -> str:
    """Return the figures as text."""
    rows = [*_model_rows(config, figures), *_run_rows(config, figures), *_memory_rows(figures.memory)]
    rows += _written_rows(config, figures)
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def _model_rows(config: Config, figures: Estimate) -> list[tuple[str, str]]:
    data = figures.data
    latent = f"{data.channels}×{data.size}×{data.size}"
    rows = [
        ("model", f"{config.model.name}, {figures.parameters:,} parameters"),
        ("forward", f"{figures.multiply_adds / 1e9:.4g} G multiply-adds for an image of {latent}"),
    ]
    if figures.scan_multiply_adds:
        scans = f"{figures.scan_multiply_adds / 1e9:.3g} G of them in scans, 6 for each token, channel and direction"
        rows.append(("", scans))
    flops = f"{figures.training_flops / 1e12:.3g} TFLOP per image: two for a multiply-add, thrice the forward pass"
    return [*rows, ("training", flops)]


def _run_rows(config: Config, figures: Estimate) -> list[tuple[str, str]]:
    settings, data, sampling = config.training, figures.data, config.sampling
    images = settings.max_steps * settings.batch_size
    flops = f"{figures.training_flops * images:.2e}"
    sampler = create_objective(config.objective).resolve_sampler(sampling.sampler, sampling.steps)
    gpus = f"{figures.processes} GPU{'s' if figures.processes > 1 else ''}"
    shares = f"{gpus} × {settings.gradient_accumulation_steps} accumulation steps"
    return [
        ("objective", f"{config.objective.name}; previews by {sampler} in {sampling.steps} steps"),
        ("batch", f"{settings.batch_size} images = {shares} × {figures.micro_batch}"),
        ("run", f"{settings.max_steps:,} steps, {images:,} images, {images / data.images:.4g} epochs, {flops} FLOP"),
        ("data", f"{data.images:,} images of {data.num_classes} classes, {_gigabytes(data.bytes)} ({data.source})"),
    ]


def _memory_rows(memory: MemoryEstimate) -> list[tuple[str, str]]:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "averages of the weights": memory.averages,
        "AdamW's moments": memory.optimizer,
        "copies of weights, as autocast makes": memory.copies,
        "activations": memory.activations,
        "logits and gates of one scan": memory.working,
    }
    total = f"{_gigabytes(memory.total)} on each GPU, and what CUDA takes for itself"
    return [("memory", total), *(("", f"{_gigabytes(size):>10} {name}") for name, size in parts.items() if size)]


def _written_rows(config: Config, figures: Estimate) -> list[tuple[str, str]]:
    settings, kept = config.training, kept_checkpoints(config)
    size = _gigabytes(figures.checkpoint_bytes)
    rows = [
        ("writes", f"into {config.output_dir}: config.yaml, environment.json, metrics.jsonl, trackers' files"),
        ("", f"checkpoints: {kept} × {size} = {_gigabytes(kept * figures.checkpoint_bytes)}, and one more meanwhile"),
        ("", f"samples: {-(-settings.max_steps // settings.sample_every)} grids"),
    ]
    snapshots = len(settings.ema_sigma_rel) * -(-settings.max_steps // settings.ema_snapshot_every)
    if snapshots:
        size = _gigabytes(figures.snapshot_bytes)
        rows.append(("", f"ema_snapshots: {snapshots} × {size} = {_gigabytes(snapshots * figures.snapshot_bytes)}"))
    return rows


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def dry_run(config: Config) -> None:
    """Print what a run would take and write; of several processes the first one prints.

    Raises UserError for a task other than class-conditional, and for what training would refuse.
    """
    if config.task != "class-conditional":
        raise UserError(f"--dry-run knows what task class-conditional takes, not {config.task}; start without it")
    processes = config.training.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    text = report(config, estimate(config, processes))
    if os.environ.get("RANK", "0") == "0":
        print(text)

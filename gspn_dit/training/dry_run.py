"""What a config would take and write, printed without a GPU, without the data, and without writing anything."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspn_dit.config import Config, TrainingConfig
from gspn_dit.errors import UserError
from gspn_dit.tasks import Plan, task_class
from gspn_dit.tasks.plan import epochs_of, gigabytes
from gspn_dit.training.optimizer import muon_matrices
from gspn_dit.training.strategy import check_sharding
from gspn_dit.training.strategy.zero import STAGES, bucket_elements

FLOAT32_BYTES = 4
PRECISIONS = ("bf16", "TF32", "float32")
PEAK_TFLOPS = {
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "A100": (312, 156, 19.5),
    # SXM: "NVIDIA H100 Tensor Core GPU Architecture", https://resources.nvidia.com/en-us-tensor-core; its data sheet
    # gives 1,979 and 989 with sparsity, which is twice that, and so does https://www.nvidia.com/en-us/data-center/h200/
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    # HGX, 1,000 W: https://nvdam.widen.net/s/xqt56dflgh/nvidia-blackwell-architecture-technical-brief
    "B200": (2250, 1100, 80),
    # https://www.nvidia.com/en-us/data-center/l40s/
    "L40S": (362, 183, 91.6),
    # With float32 sums: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "RTX 4090": (165.2, 82.6, 82.6),
}
"""Dense peaks that NVIDIA states, in 10¹² FLOP a second, in each of `PRECISIONS`."""
UTILISATION = 0.4
"""Share of the peak that a training is taken to reach, for want of a measurement."""


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
    """AdamW's two moments, or Muon's one, float32; under ZeRO with a copy of the weights they belong to."""
    copies: int
    """What is kept once, whatever the batch: under autocast the weights in bfloat16."""
    activations: int
    """What autograd keeps of a micro-batch, and with checkpointing one block's activations on top."""
    working: int
    """Logits and gates of one scan with their gradients, which are recomputed in the backward pass."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate_memory(plan: Plan, micro_batch: int, settings: TrainingConfig, processes: int) -> MemoryEstimate:
    """Estimate the memory of a training step on each GPU.

    State takes 4 bytes per parameter and copy: weights, gradients, averages and moments; FSDP divides all of it by
    the processes, ZeRO 1 the moments and ZeRO 2 the gradients, too. Activations are what autograd saves, counted
    storage by storage.

    Args:
        plan: of the task; its model is left as it is.
        micro_batch: samples of one forward pass on one GPU.
        settings: precision, checkpointing, averages and sharding.
        processes: GPUs.
    """
    model, precision = plan.model, settings.mixed_precision
    sharding = settings.sharding if processes > 1 else "none"
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    every = FLOAT32_BYTES * sum(size for size, _ in sizes)
    whole = FLOAT32_BYTES * sum(size for size, trained in sizes if trained)
    part, bucket = whole // processes, FLOAT32_BYTES * bucket_elements(model)
    copy = every // processes if sharding == "fsdp" else every
    gradients = {
        "none": whole * (2 if processes > 1 else 1),
        "fsdp": part,
        "zero1": whole + part + bucket,
        "zero2": part + bucket,
    }
    spared = FLOAT32_BYTES * muon_elements(plan, settings)
    once, per_image = _saved_bytes(plan, precision, checkpointing=False)
    activations = micro_batch * per_image
    if settings.activation_checkpointing:
        once, kept_per_image = _saved_bytes(plan, precision, checkpointing=True)
        activations = micro_batch * (kept_per_image + per_image // plan.blocks)
    return MemoryEstimate(
        weights=copy + FLOAT32_BYTES * plan.frozen_elements,
        gradients=gradients[sharding],
        averages=copy * (1 + len(settings.ema_sigma_rel)),
        optimizer=3 * part if sharding in STAGES else 2 * (part if sharding == "fsdp" else whole) - spared,
        copies=once,
        activations=activations,
        working=micro_batch * plan.working_elements * (2 if precision == "bf16" else FLOAT32_BYTES),
    )


def muon_elements(plan: Plan, settings: TrainingConfig) -> int:
    """Return the elements of matrices that Muon moves, which have one moment and not two."""
    blocks: Any = getattr(plan.model, "blocks", ())
    return sum(matrix.numel() for matrix in muon_matrices(settings, list(blocks)))


def _saved_bytes(plan: Plan, mixed_precision: str, checkpointing: bool) -> tuple[int, int]:
    """Return the bytes that autograd saves once, whatever the batch, and for each sample; weights are not counted."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model: Any = plan.model
    before = getattr(model, "gradient_checkpointing", False)
    model.gradient_checkpointing = checkpointing
    real = {module: dict(module._parameters) for module in model.modules()}
    try:
        with FakeTensorMode():
            for module, parameters in real.items():
                module._parameters.update({name: _on_cpu(value) for name, value in parameters.items()})
            one, two = (_saved_by_forward(plan, count, mixed_precision) for count in (1, 2))
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


def _saved_by_forward(plan: Plan, batch: int, mixed_precision: str) -> int:
    known = {parameter.untyped_storage()._cdata for parameter in plan.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    inputs = plan.inputs(batch)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"),
    ):
        loss = plan.model(*inputs).float().square().mean()
    del loss
    return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class Estimate:
    """All figures of a dry run."""

    plan: Plan
    """What the task says."""
    parameters: int
    processes: int
    micro_batch: int
    """Samples of one forward pass on one GPU."""
    memory: MemoryEstimate
    checkpoint_bytes: int
    snapshot_bytes: int
    """Of one snapshot of one power-function average."""

    @property
    def training_flops(self) -> int:
        """Floating-point operations that a sample costs in training."""
        return 6 * self.plan.multiply_adds


def estimate(config: Config, processes: int) -> Estimate:
    """Compute the figures of a config on a number of GPUs; raises UserError for what training would refuse."""
    settings = config.training
    check_sharding(config, settings.sharding)
    shares = processes * settings.gradient_accumulation_steps
    if settings.batch_size % shares:
        raise UserError(
            f"training.batch_size {settings.batch_size} is not divisible by {processes} processes × "
            f"{settings.gradient_accumulation_steps} accumulation steps"
        )
    plan = task_class(config.task).plan(config)
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    average = {"float16": 2, "float32": 4}[settings.ema_snapshot_dtype]
    return Estimate(
        plan=plan,
        parameters=parameters,
        processes=processes,
        micro_batch=settings.batch_size // shares,
        memory=estimate_memory(plan, settings.batch_size // shares, settings, processes),
        # Weights, their averages and the optimiser's moments; manifest and headers are small beside them.
        checkpoint_bytes=FLOAT32_BYTES
        * (parameters * (4 + len(settings.ema_sigma_rel)) - muon_elements(plan, settings)),
        snapshot_bytes=average * parameters,
    )


def kept_checkpoints(config: Config) -> int:
    """Return how many checkpoints are left when training ends: the newest, and the multiples of `keep_every`."""
    settings = config.training
    steps = {*range(settings.checkpoint_every, settings.max_steps + 1, settings.checkpoint_every), settings.max_steps}
    newest = sorted(steps)[-settings.keep_last :]
    for_good = [step for step in steps if settings.keep_every and step % settings.keep_every == 0]
    return len({*newest, *for_good})


def report(config: Config, figures: Estimate) -> str:
    """Return the figures as text."""
    rows = [*_model_rows(figures), *_run_rows(config, figures), *_time_rows(config, figures)]
    rows += _memory_rows(figures.memory)
    rows += _written_rows(config, figures)
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def _model_rows(figures: Estimate) -> list[tuple[str, str]]:
    flops = f"{figures.training_flops / 1e12:.3g} TFLOP per image: two for a multiply-add, thrice the forward pass"
    return [*figures.plan.rows, ("training", flops)]


def _run_rows(config: Config, figures: Estimate) -> list[tuple[str, str]]:
    settings, plan = config.training, figures.plan
    images = settings.max_steps * settings.batch_size
    flops = f"{figures.training_flops * images:.2e}"
    gpus = f"{figures.processes} GPU{'s' if figures.processes > 1 else ''}"
    shares = f"{gpus} × {settings.gradient_accumulation_steps} accumulation steps"
    return [
        ("batch", f"{settings.batch_size} images = {shares} × {figures.micro_batch}"),
        (
            "run",
            f"{settings.max_steps:,} steps, {images:,} images, {epochs_of(images, plan.images)} epochs, {flops} FLOP",
        ),
        ("data", plan.data),
    ]


def hours_on(flops: float, processes: int, settings: TrainingConfig) -> dict[str, float]:
    """Return the hours that so many FLOP take on a number of GPUs of each kind, at `UTILISATION` of the peak."""
    column = PRECISIONS.index(_precision(settings))
    rates = {name: UTILISATION * 1e12 * peaks[column] * processes for name, peaks in PEAK_TFLOPS.items()}
    return {name: flops / rate / 3600 for name, rate in rates.items()}


def _precision(settings: TrainingConfig) -> str:
    """Return in which of `PRECISIONS` matrices are multiplied."""
    return "bf16" if settings.mixed_precision == "bf16" else "TF32" if settings.tf32 else "float32"


def _time_rows(config: Config, figures: Estimate) -> list[tuple[str, str]]:
    settings = config.training
    flops = figures.training_flops * settings.max_steps * settings.batch_size
    hours = hours_on(flops, figures.processes, settings)
    text = ", ".join(f"{name} {value:,.3g}" for name, value in hours.items())
    peak = f"{_precision(settings)} peak that NVIDIA states"
    return [
        ("hours", f"{text}; on {figures.processes} of them"),
        ("", f"at {UTILISATION:.0%} of the {peak}, which is assumed, not measured; scans"),
        ("", "are bound by memory and reach less; metrics.jsonl says images_per_second after the first steps"),
    ]


def _memory_rows(memory: MemoryEstimate) -> list[tuple[str, str]]:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "averages of the weights": memory.averages,
        "the optimiser's moments": memory.optimizer,
        "copies of weights, as autocast makes": memory.copies,
        "activations": memory.activations,
        "logits and gates of one scan": memory.working,
    }
    total = f"{gigabytes(memory.total)} on each GPU, and what CUDA takes for itself"
    return [("memory", total), *(("", f"{gigabytes(size):>10} {name}") for name, size in parts.items() if size)]


def _written_rows(config: Config, figures: Estimate) -> list[tuple[str, str]]:
    settings, kept = config.training, kept_checkpoints(config)
    size = gigabytes(figures.checkpoint_bytes)
    rows = [
        ("writes", f"into {config.output_dir}: config.yaml, environment.json, metrics.jsonl, trackers' files"),
        ("", f"checkpoints: {kept} × {size} = {gigabytes(kept * figures.checkpoint_bytes)}, and one more meanwhile"),
        ("", f"samples: {-(-settings.max_steps // settings.sample_every)} grids"),
    ]
    snapshots = len(settings.ema_sigma_rel) * -(-settings.max_steps // settings.ema_snapshot_every)
    if snapshots:
        size = gigabytes(figures.snapshot_bytes)
        rows.append(("", f"ema_snapshots: {snapshots} × {size} = {gigabytes(snapshots * figures.snapshot_bytes)}"))
    return rows


def dry_run(config: Config) -> None:
    """Print what a run would take and write; of several processes the first one prints.

    Raises UserError for a task that makes no plans, and for what training would refuse.
    """
    processes = config.training.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    text = report(config, estimate(config, processes))
    if os.environ.get("RANK", "0") == "0":
        print(text)

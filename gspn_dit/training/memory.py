"""What a training step holds on each GPU, counted without one: a forward pass over tensors that have no memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gspn_dit.config import TrainingConfig
from gspn_dit.models import DiffusionModel
from gspn_dit.models.gspn import GSPNMixer
from gspn_dit.training.zero import STAGES, bucket_elements

FLOAT32_BYTES = 4


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
    """Logits and gates of one scan with their gradients, which are made again in the backward pass."""

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
        working=micro_batch * _scan_bytes(model, latent_size, 2 if settings.mixed_precision == "bf16" else 4),
    )


def _scan_bytes(model: DiffusionModel, latent_size: int, element_bytes: int) -> int:
    """Return the bytes of the logits and gates of one scan of an image, and of their gradients."""
    mixers = [module for module in model.modules() if isinstance(module, GSPNMixer)]
    maps = [sum(part.out_features for part in (m.to_logits, m.to_input_gate, m.to_output_gate)) for m in mixers]
    return 2 * element_bytes * max(maps, default=0) * (latent_size // model.patch_size) ** 2


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

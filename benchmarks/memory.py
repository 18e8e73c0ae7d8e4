"""What a GSPN block keeps for its backward pass, and the peak memory and time of a training step, both ways.

    python -m benchmarks.memory --out benchmarks/results/memory.json

"plain" is the same block written in ordinary operations, so that autograd keeps logits, gates and every input of a
linear map; "recomputed" is the library's; "checkpointed" adds `training.activation_checkpointing`. Each step runs in a
process of its own, whose high-water mark (VmHWM) is the figure.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import CpuDevice, software, status_bytes
from benchmarks.output import publish
from gspn_dit.errors import ArgumentParser, run_cli
from gspn_dit.models.gspn import GSPNBlock
from gspn_dit.ops import DIRECTIONS, gspn_scan

WAYS = ("plain", "recomputed", "checkpointed")
MAX_BYTES_RATIO, MAX_TIME_RATIO, MAX_GRADIENT_DIFFERENCE = 0.25, 1.3, 1e-10


def plain_block(block: GSPNBlock, tokens: Tensor, branch_scale: Tensor | None = None) -> Tensor:
    """Compute a block by ordinary operations; autograd keeps what it wants."""
    mixer = block.mixer
    branch = block.local_conv(block.in_proj(block.norm(tokens)))
    proxy = mixer.to_proxy(branch)
    branch = gspn_scan(
        branch,
        mixer.to_logits(proxy).unflatten(-1, (len(DIRECTIONS), 3, -1)),
        mixer.to_input_gate(proxy).unflatten(-1, (len(DIRECTIONS), -1)),
        mixer.to_output_gate(proxy).unflatten(-1, (len(DIRECTIONS), -1)),
        mixer.merge_weight,
        window=mixer.window,
    )
    branch = block.gate_conv(block.mixer_proj(branch))
    branch = block.out_proj(branch * F.relu(branch))
    if branch_scale is not None:
        branch = branch * branch_scale[:, None, None, None].to(branch.dtype)
    return tokens + branch


def saved_bytes(run: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Return the bytes of the distinct storages that autograd saves during a run, weights not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def measure_block(channels: int, side: int, batch: int, repeats: int) -> dict[str, Any]:
    """Compare one block both ways: bytes saved, largest difference of gradients in float64, seconds."""
    torch.manual_seed(0)
    block = GSPNBlock(channels)
    tokens = torch.randn(batch, side, side, channels, requires_grad=True)
    leaves, parameters = [tokens, *block.parameters()], list(block.parameters())
    ways: dict[str, Callable[..., Tensor]] = {"plain": functools.partial(plain_block, block), "recomputed": block}

    def step(way: Callable[..., Tensor]) -> None:
        torch.autograd.grad(way(tokens).sum(), leaves)

    saved = {name: saved_bytes(functools.partial(way, tokens), parameters) for name, way in ways.items()}
    device = CpuDevice()
    timings = device.time_together({name: functools.partial(step, way) for name, way in ways.items()}, repeats)
    bytes_ratio = saved["recomputed"] / saved["plain"]
    time_ratio = timings["recomputed"].median / timings["plain"].median
    difference = gradient_difference(channels // 8, 6)
    return {
        "shape": {"batch": batch, "height": side, "width": side, "channels": channels, "dtype": "float32"},
        "saved_bytes": {**saved, "ratio": round(bytes_ratio, 4), "target": MAX_BYTES_RATIO},
        "forward_backward": {
            **{name: timing.as_json() for name, timing in timings.items()},
            "ratio_of_medians": round(time_ratio, 4),
            "target": MAX_TIME_RATIO,
        },
        "gradient_difference_float64": {"max_relative": difference, "target": MAX_GRADIENT_DIFFERENCE},
        "met": bytes_ratio <= MAX_BYTES_RATIO
        and time_ratio <= MAX_TIME_RATIO
        and difference <= MAX_GRADIENT_DIFFERENCE,
    }


def gradient_difference(channels: int, side: int) -> float:
    """Return the largest difference of any gradient of the two ways in float64, relative to its largest entry."""
    torch.manual_seed(0)
    block = GSPNBlock(channels).double()
    tokens = torch.randn(2, side, side, channels, dtype=torch.float64, requires_grad=True)
    upstream, leaves = torch.randn_like(tokens), [tokens, *block.parameters()]
    one, other = (
        torch.autograd.grad(output, leaves, upstream) for output in (plain_block(block, tokens), block(tokens))
    )
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))


def step_in_this_process(way: str, name: str, batch: int, dtype: str, steps: int) -> dict[str, Any]:
    """Train a model for some steps in one of the `WAYS`; return its memory in bytes and seconds per step."""
    from gspn_dit.config import TrainingConfig
    from gspn_dit.models import create_model
    from gspn_dit.training.optimizer import create_optimizer, optimizer_step

    torch.manual_seed(0)
    model = create_model(name, num_classes=1000, latent_channels=4, latent_size=32)
    if way == "plain":
        block: Any
        for block in model.blocks:
            block.forward = functools.partial(plain_block, block)
    model.gradient_checkpointing = way == "checkpointed"
    optimizer = create_optimizer(model, TrainingConfig())
    latents, labels = torch.randn(batch, 4, 32, 32), torch.arange(batch)
    before = status_bytes("VmRSS")
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(latents, torch.full((batch,), 500.0), labels).float().square().mean()
        loss.backward()
        optimizer_step(optimizer, model, 1e-4, 1.0)
        seconds.append(time.perf_counter() - began)
    return {
        "peak_bytes": status_bytes("VmHWM"),
        "before_bytes": before,
        "best_seconds": min(seconds),
        "loss": loss.item(),
    }


def measure_steps(name: str, batch: int, dtype: str, steps: int) -> dict[str, Any]:
    """Run the step in each way in a fresh process."""
    results: dict[str, Any] = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.memory", "--way", way, "--model", name, "--batch", str(batch)]
        done = subprocess.run(
            [*command, "--dtype", dtype, "--steps", str(steps)], capture_output=True, encoding="utf-8", check=True
        )
        results[way] = json.loads(done.stdout)
    return {
        "model": name,
        "batch": batch,
        "latent": [4, 32, 32],
        "dtype": dtype,
        "optimizer": "fused AdamW, float32 weights",
        "steps": steps,
        **results,
        "peak_gigabytes": {way: round(results[way]["peak_bytes"] / 1e9, 3) for way in WAYS},
        "peak_ratio": {way: round(results[way]["peak_bytes"] / results["plain"]["peak_bytes"], 4) for way in WAYS},
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = ArgumentParser(prog="benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="GSPN-B/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="runs of the block in each way")
    parser.add_argument("--way", choices=WAYS, help="only this step, in this process")
    parser.add_argument("--out", help="write the JSON here as well")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(step_in_this_process(options.way, options.model, options.batch, options.dtype, options.steps)))
        return
    result = {
        "block": measure_block(channels=900, side=16, batch=2, repeats=options.repeats),
        "step": measure_steps(options.model, options.batch, options.dtype, options.steps),
        "machine": CpuDevice().describe(),
        "software": software(),
    }
    publish(result, options.out)


if __name__ == "__main__":
    run_cli(main)

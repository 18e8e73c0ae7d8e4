"""What benchmarks/mixers.py and benchmarks/scan.py time beside each other: variants, how they are built and run."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from gspn_dit.models.mixers import Mixer

DIT_OF = {384: ("DiT-S/2", {}), 1152: ("DiT-XL/2", {"depth": 1})}
"""The model of each width; of the widest only one block, because 28 need more memory than a laptop has."""
WINDOW, GROUPS = 16, 8
THROUGH_MEMORY = "gspn through memory"
"""The scan whose logits and gates are written to memory, as on a GPU, instead of the fused kernels."""
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"mixer": "attention"},
    "gspn": {"mixer": "gspn"},
    THROUGH_MEMORY: {"mixer": "gspn"},
    "gspn windowed": {"mixer": "gspn", "scan_window": WINDOW},
    "gspn shared": {"mixer": "gspn", "weight_groups": GROUPS},
    "linear": {"mixer": "linear"},
    "conv": {"mixer": "conv"},
}
PEER = "diffusers"
"""`DiTTransformer2DModel` of the same size, among the models."""
EQUAL = "gspn, equal parameters"
"""A DiT-S with scans so wide that it has as many parameters as attention's, within 1%."""
OPTIONS = {**VARIANTS, EQUAL: {"mixer": "gspn", "hidden_size": 392}}
"""Of `create_model`."""


def build(what: str, channels: int, variant: str, side: int) -> tuple[Any, tuple[Any, ...]]:
    """Return a module and the inputs of one image of side² tokens."""
    import torch

    from gspn_dit.models import create_model
    from gspn_dit.models.dit import DiTBlock

    name, size = DIT_OF[channels]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if what == "model":
        latents = torch.randn(1, 4, 2 * side, 2 * side, generator=generator)
        arguments = (latents, torch.tensor([500.0]), torch.tensor([3]))
        if variant == PEER:
            return _peer(name, size, side), arguments
        return create_model(name, 1000, 4, 2 * side, 8, **size, **OPTIONS[variant]), arguments
    one = create_model(name, 1, 4, 2 * side, depth=1, **OPTIONS[variant]).blocks[0]
    assert isinstance(one, DiTBlock)
    tokens = torch.randn(1, side, side, channels, generator=generator, requires_grad=True)
    if what == "mixer":
        return one.mixer, (tokens,)
    return one, (tokens, torch.randn(1, channels, generator=generator))


def _peer(name: str, size: dict[str, Any], side: int) -> Any:
    from diffusers import DiTTransformer2DModel

    from gspn_dit.models.presets import DIT_PRESETS, parse_name

    preset = DIT_PRESETS[parse_name(name)[1]]
    return DiTTransformer2DModel(
        num_attention_heads=preset.num_heads,
        attention_head_dim=preset.hidden_size // preset.num_heads,
        in_channels=4,
        out_channels=8,
        num_layers=size.get("depth", preset.depth),
        sample_size=2 * side,
    )


def create_mixer(variant: str, channels: int) -> Mixer:
    """Return the mixer of a variant alone, with heads of 64 channels where it has any."""
    from gspn_dit.models.mixers import MIXERS, option_names, read_options

    options = dict(VARIANTS[variant])
    name = options.pop("mixer")
    if "num_heads" in option_names(name):
        options["num_heads"] = max(1, channels // 64)
    return MIXERS[name][0](channels, read_options(name, options))


def through_memory() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no fused kernels of the projected scan run."""
    from gspn_dit.ops.cpu import projected

    return mock.patch.object(projected, "fused", return_value=False)


def runner(variant: str, module: Any, arguments: tuple[Any, ...]) -> Callable[[], tuple[float, float, float]]:
    """Return a function that runs forward and backward once: seconds of forward, of both, of all processors."""
    import torch

    leaves = [*module.parameters(), *(a for a in arguments if a.requires_grad)]

    def run() -> tuple[float, float, float]:
        with through_memory() if variant == THROUGH_MEMORY else contextlib.nullcontext():
            return run_here()

    def run_here() -> tuple[float, float, float]:
        began, cpu_began = time.perf_counter(), time.process_time()
        output = module(*arguments)
        output = getattr(output, "sample", output)
        forward = time.perf_counter() - began
        torch.autograd.grad(output, leaves, output.detach())
        return forward, time.perf_counter() - began, time.process_time() - cpu_began

    return run


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed memory back to the system; return whether there is a glibc that listens."""
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1))
    except (OSError, AttributeError):
        return False


def disagreement() -> str | None:
    """Compare mixers with their formulas in float64; return a sentence about the first that is wrong."""
    import torch

    from gspn_dit.models.attention import AttentionMixer, AttentionOptions, LinearAttentionMixer
    from gspn_dit.models.scans import ScanMixer, ScanOptions
    from gspn_dit.ops import gspn_scan

    torch.manual_seed(0)
    tokens = torch.randn(1, 5, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        attention = AttentionMixer(32, AttentionOptions(num_heads=2)).double()
        q, k, v = attention.qkv(tokens).flatten(1, 2).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).reshape(tokens.shape)
        if not torch.allclose(attention(tokens), attention.proj(mixed)):
            return "attention differs from softmax(QKᵀ/√d)V"
        linear = LinearAttentionMixer(32, AttentionOptions(num_heads=2)).double()
        q, k, v = linear.qkv(tokens).flatten(1, 2).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        scores = q.relu() @ k.relu().transpose(-1, -2)
        mixed = (scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).reshape(tokens.shape)
        local = linear.local_conv(linear.qkv(tokens)[..., 64:])
        if not torch.allclose(linear(tokens), linear.proj(mixed + local)):
            return "linear attention differs from φ(Q)φ(K)ᵀV over its sums"
        for groups, window in ((None, None), (None, 4), (4, None)):
            mixer = ScanMixer(32, ScanOptions(weight_groups=groups, scan_window=window)).double()
            x, scan = mixer.in_proj(tokens), mixer.scan
            maps = (scan.to_logits, scan.to_input_gate, scan.to_output_gate)
            logits, u, v = (layer(scan.to_proxy(x)).unflatten(-1, (4, -1)) for layer in maps)
            logits = logits.unflatten(-1, (3, -1))
            y = gspn_scan(x, logits, u, v, scan.merge_weight, window=window, backend="reference")
            for way, context in (("", contextlib.nullcontext()), (" through memory", through_memory())):
                with context:
                    right = torch.allclose(mixer(tokens), mixer.out_proj(y))
                if not right:
                    return f"the scan{way} with {groups} groups and window {window} differs from the reference"
    return None

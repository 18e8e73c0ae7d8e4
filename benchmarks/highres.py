"""One image of 4096×4096 pixels with scans, end to end: the memory it takes beside what was announced.

    python -m benchmarks.highres --out benchmarks/results/highres.json

A UNet and an autoencoder of Stable Diffusion's classes with few channels and weights drawn from a seed: what is shown
is memory, not a picture. The process does nothing else, so that its peak is the image's. Exits with 1 where the image
takes more than was announced, or any tensor grows with the square of the tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.markdown import provenance, short, table
from benchmarks.measure import CpuDevice, software, status_bytes
from benchmarks.output import publish
from gspn_dit import GSPNAdapter, generate_highres
from gspn_dit.errors import ArgumentParser, run_cli
from gspn_dit.highres.memory import LiveMemory
from gspn_dit.highres.request import Stage
from gspn_dit.highres.stages import memory_bound

PROMPT, STEPS = "a cat", 5
STAGES = ((512, 512), (2048, 2048, 0.4), (4096, 4096, 0.2))
"""Height, width and, after the first, strength."""


class TinyPipeline:
    """What `generate_highres` uses of a Stable Diffusion pipeline, with scans, and with weights drawn from a seed."""

    def __init__(self, scheduler: Any = None) -> None:
        torch.manual_seed(0)
        self.unet: Any = UNet2DConditionModel(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=8,
            norm_num_groups=8,
        ).eval()
        self.vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            norm_num_groups=4,
        ).eval()
        self.scheduler = scheduler or DDIMScheduler(clip_sample=False)
        self.adapter = GSPNAdapter.create(self.unet).mount(self.unet)

    def encode_prompt(self, prompt: str, device: Any, count: int, guided: bool, negative_prompt: str | None) -> Any:
        """Return states [1, 4, 8] of the prompt, and of the negative one where there is guidance."""

        def states(text: str) -> Tensor:
            return torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(len(text)))

        return states(prompt), states(negative_prompt or "") if guided else None


def study(out: Path) -> dict[str, Any]:
    """Draw the image into a PNG file and return what it took: bytes, seconds, elements of the largest tensor."""
    pipe, last = TinyPipeline(), Stage(*STAGES[-1])
    states, _ = pipe.encode_prompt(PROMPT, None, 1, True, "")
    announced = memory_bound(pipe, last, {"encoder_hidden_states": states, "pooled": None})
    began = time.perf_counter()
    with LiveMemory() as memory:
        generate_highres(pipe, PROMPT, list(STAGES), out=out, num_inference_steps=STEPS)
    return {
        "stages": STAGES,
        "steps": STEPS,
        "tokens": (last.height // 8) * (last.width // 8),
        "announced_bytes": announced,
        "peak_bytes": status_bytes("VmHWM"),
        "largest_tensor_elements": memory.largest,
        "seconds": round(time.perf_counter() - began, 1),
    }


def highres_table(result: dict[str, Any]) -> str:
    """Tabulate a result of this benchmark."""
    height, width = result["stages"][-1][:2]
    tokens = result["tokens"]
    head = ["pixels", "tokens", "announced", "peak", "largest tensor", "a map of attention would have", "seconds"]
    memory = [f"{result[key] / 1e9:.2f} GB" for key in ("announced_bytes", "peak_bytes")]
    elements = [f"{short(value / 1e6)} million elements" for value in (result["largest_tensor_elements"], tokens**2)]
    row = [f"{height}×{width}", f"{tokens:,}", *memory, *elements, short(result["seconds"])]
    load = f"Load average {result['device']['load_average'][0]:.1f}. "
    return table(head, [row]) + f"\n{load}{provenance(result)}\n"


def main() -> None:
    """The command line."""
    parser = ArgumentParser(prog="benchmarks.highres", description="Draw 4096×4096 pixels and weigh it.")
    parser.add_argument("--image", type=Path, help="PNG file of the image; none: it is drawn and deleted")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = study(options.image or Path(folder) / "large.png")
    publish({**found, "device": CpuDevice().describe(), "software": software()}, options.out)
    if found["peak_bytes"] > found["announced_bytes"] or found["largest_tensor_elements"] >= found["tokens"] ** 2 / 256:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)

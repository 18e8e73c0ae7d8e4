"""Golden samples: what the checkpoint of the package draws, so that a machine can be checked against others.

    python -m gspn_dit.doctor --golden

draws them again and compares latents. `python -m gspn_dit.golden` writes the stored ones anew, after a change that is
meant to move them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gspn_dit.checkpoint import resolve_checkpoint
from gspn_dit.errors import ArgumentParser, UserError, run_cli
from gspn_dit.files import write_atomically

CHECKPOINT = "builtin:digits"
FILE = "golden.safetensors"
STEPS = 10
GUIDANCE_SCALE = 2.0
LARGEST_DIFFERENCE = {"cpu": 1e-4}
"""Allowed in a value of a latent, which lies within about ±1, by type of device: other instruction sets sum in another
order, and ten steps let that grow."""
OTHER_DIFFERENCE = 1e-3
"""On any other device, in float32 without TF32."""


@dataclass(frozen=True)
class Comparison:
    """How far samples lie from the golden ones."""

    device: str
    difference: float
    """The largest, of a latent's value; 0 where every bit is the same."""
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether this machine draws what it should."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        if self.difference == 0:
            return f"golden samples on {self.device}: equal bit for bit"
        return f"golden samples on {self.device}: differ by {self.difference:.2g}, {self.allowed:g} is allowed"


def draw(device: str) -> Tensor:
    """Return the latents of a digit of each class, float32 [10, 1, 8, 8] on the CPU; by seed 0 and the EMA weights."""
    from gspn_dit.pipeline import GSPNPipeline

    pipeline = GSPNPipeline.from_pretrained(CHECKPOINT, device=device)
    pipeline.set_progress_bar_config(disable=True)
    labels = list(range(len(pipeline.class_names)))
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "seed": 0, "output_type": "latent"}
    latents = pipeline(labels, **options).images  # type: ignore[arg-type]
    assert isinstance(latents, Tensor)
    return latents.float().cpu()


def golden_file() -> Path:
    """Return where the stored samples lie."""
    return resolve_checkpoint(CHECKPOINT) / FILE


def compare(device: str) -> Comparison:
    """Draw the samples on a device and compare them with the stored ones; raises UserError where there are none."""
    from safetensors.torch import load_file

    file = golden_file()
    if not file.exists():
        raise UserError(f"{file} is missing; install gspn-dit again")
    stored, drawn = load_file(file)["latents"], draw(device)
    allowed = LARGEST_DIFFERENCE.get(torch.device(device).type, OTHER_DIFFERENCE)
    difference = float((drawn - stored).abs().max())
    return Comparison(device, difference if difference == difference else float("inf"), allowed)


def main() -> None:
    """Write the stored samples."""
    from safetensors.torch import save

    ArgumentParser(description="Draw the golden samples anew and store them in the package.").parse_args()
    write_atomically(golden_file(), save({"latents": draw("cpu").contiguous()}))
    print(golden_file())


if __name__ == "__main__":
    run_cli(main)

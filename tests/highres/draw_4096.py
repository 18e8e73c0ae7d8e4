"""Draw 4096×4096 pixels with a tiny pipeline; print peak memory in bytes, and elements of the largest tensor."""

import sys
from pathlib import Path

from gspn_dit import generate_highres
from gspn_dit.highres.memory import LiveMemory
from tests.highres.test_highres import TinyPipeline


def peak_bytes() -> int:
    """The most memory of this program alone: what getrusage says counts the process that started it, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    stages = [(512, 512), (2048, 2048, 0.4), (4096, 4096, 0.2)]
    with LiveMemory() as memory:
        generate_highres(TinyPipeline(), "a cat", stages, out=sys.argv[1], num_inference_steps=5)
    print(peak_bytes(), memory.largest)

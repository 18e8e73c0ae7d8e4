"""Draw 4096×4096 pixels with a tiny pipeline; print peak memory in bytes, and elements of the largest tensor."""

import resource
import sys

from gspn_dit import generate_highres
from gspn_dit.highres.memory import LiveMemory
from tests.highres.test_highres import TinyPipeline

if __name__ == "__main__":
    stages = [(512, 512), (2048, 2048, 0.4), (4096, 4096, 0.2)]
    with LiveMemory() as memory:
        generate_highres(TinyPipeline(), "a cat", stages, out=sys.argv[1], num_inference_steps=5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, memory.largest)

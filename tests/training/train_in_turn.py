"""Train several tiny configs, one after another, in the same processes; started by torchrun.

torchrun --nproc-per-node 2 -m tests.training.train_in_turn OUTPUT_DIR RUNS [poison]

RUNS is a JSON list of keys of `training`, each with a "name" beside them: the run's directory below OUTPUT_DIR. A name
that comes again is resumed. `poison` gives the second process alone a loss that is not finite in step 2, and in step 4
a finite loss with gradients that are not. After each run all processes must hold the same weights, averages and counts.
"""

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from gspn_dit.config import TrainArguments
from gspn_dit.training import loop
from gspn_dit.training.strategy.sharding import whole
from tests.training.conftest import tiny_config

OPTIONS: dict[str, Any] = {
    "ema_sigma_rel": [0.05, 0.1],
    "checkpoint_every": 100,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.3,
}
"""Rounding grows little at this rate, and the gradients are clipped."""


class CheckedTrainer(loop.Trainer):
    """A trainer whose processes compare what they hold; with `poison`, the second meets what is not finite."""

    poison = False

    def micro_losses(self, numbers: range) -> dict[str, Tensor]:
        loss = super().micro_losses(numbers)["loss"]
        if self.poison and self.accelerator.process_index == 1:
            if self.state.step == 1:
                loss = loss * math.nan
            if self.state.step == 3:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return {"loss": loss}

    def run(self) -> None:
        super().run()
        held = [*self.state.model.parameters(), *self.state.ema.model.parameters(), self.state.nonfinite_steps]
        for tensor in (whole(tensor.detach()).contiguous() for tensor in held):
            first = tensor.clone()
            dist.broadcast(first, 0)
            assert torch.equal(tensor, first)


def main() -> None:
    """Train each config of the command line."""
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    CheckedTrainer.poison = sys.argv[3:] == ["poison"]
    loop.Trainer = CheckedTrainer  # type: ignore[misc]
    # Blocks are traced and differentiated as always, but run by torch: inductor's code has a test of its own.
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign]
    end_training = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # the next run needs the process group
    for run in runs:
        options = {**OPTIONS, **run}
        config = tiny_config(folder / options.pop("name"), **options)
        torch._dynamo.reset()
        loop.train(TrainArguments(config, "auto" if Path(config.output_dir).exists() else None, False))
    end_training(Accelerator(cpu=not torch.accelerator.is_available()))


if __name__ == "__main__":
    main()

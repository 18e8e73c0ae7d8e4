"""Count how often two processes exchange gradients in one optimiser step; started by torchrun.

torchrun --nproc-per-node 2 -m tests.training.count_exchanges SHARDING OUTPUT_DIR
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspn_dit.tasks import create_task
from gspn_dit.training.loop import Trainer, create_accelerator
from gspn_dit.training.run_directory import RunDirectory
from tests.training.conftest import tiny_config

EXCHANGES: list[int] = []


def count_calls(name: str) -> None:
    """Count the calls of a collective of torch.distributed, whose name depends on torch's version."""
    original = getattr(dist, name, None)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        EXCHANGES.append(1)
        assert original is not None
        return original(*arguments, **keywords)

    if original is not None:
        setattr(dist, name, counted)


def average(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket of gradients, counted."""
    EXCHANGES.append(1)
    done = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def main() -> None:
    """Print the exchanges of each of three steps for one and for four micro-steps."""
    sharding, folder = sys.argv[1], Path(sys.argv[2])
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        count_calls(name)
    for accumulation in (1, 4):
        config = tiny_config(folder, sharding=sharding, gradient_accumulation_steps=accumulation)
        trainer = Trainer(config, create_task(config), create_accelerator(config), RunDirectory(folder, None))
        if sharding == "none":
            trainer.state.strategy.forward_model.register_comm_hook(None, average)  # type: ignore[operator]
        counts = []
        for _ in range(3):
            before = len(EXCHANGES)
            trainer.train_step()
            counts.append(len(EXCHANGES) - before)
        if trainer.accelerator.is_main_process:
            print("exchanges", *counts)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()

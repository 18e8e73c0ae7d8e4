"""The processes that share one evaluation, and the three things they tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fid.moments import Moments
from gspn_dit.errors import UserError


@dataclass(frozen=True)
class World:
    """One process of `size`; with size 1 nothing is sent."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own(self, count: int, batch_size: int) -> list[range]:
        """The batches of `count` images that this process computes, of all processes' every size-th one.

        A batch holds the same images however many processes there are, so its features are the same to the last bit.
        """
        starts = range(self.rank * batch_size, count, self.size * batch_size)
        return [range(start, min(start + batch_size, count)) for start in starts]

    def gather(self, rows: Tensor, count: int, batch_size: int) -> Tensor:
        """Rows of every process, [own, …] each, put in image order on the main process; no rows elsewhere."""
        if self.size == 1:
            return rows
        import torch.distributed as dist

        shares = [World(rank, self.size).own(count, batch_size) for rank in range(self.size)]
        lengths = [sum(map(len, share)) for share in shares]
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in shares] if self.is_main else None
        dist.gather(padded, received)
        if received is None:
            return rows[:0]
        whole = rows.new_empty(count, *rows.shape[1:])
        for part, share, length in zip(received, shares, lengths, strict=True):
            whole[torch.tensor([index for batch in share for index in batch], dtype=torch.int64)] = part[:length]
        return whole

    def reduce(self, moments: Moments) -> Moments:
        """The moments of all processes' vectors together, on every process."""
        if self.size == 1:
            return moments
        import torch.distributed as dist

        count = torch.tensor([moments.count], dtype=torch.float64)
        dist.all_reduce(count)
        mean = moments.mean * (moments.count / max(1.0, float(count)))
        dist.all_reduce(mean)
        apart = moments.mean - mean
        scatter = moments.scatter + moments.count * torch.outer(apart, apart)
        dist.all_reduce(scatter)
        return Moments(int(count), mean, scatter)

    def agree(self, value: bool) -> bool:
        """The main process's answer, on every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        answer = torch.tensor([int(value)])
        dist.broadcast(answer, src=0)
        return bool(answer)


@contextmanager
def connect() -> Iterator[World]:
    """The world that `accelerate launch` or `torchrun` has started this process in, or a world of one.

    What is exchanged are features and moments on the CPU, so gloo carries it on every machine.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield World()
        return
    import datetime

    import torch.distributed as dist

    # the main process may compute features of a reference from its cache while others wait
    dist.init_process_group("gloo", timeout=datetime.timedelta(hours=2))
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """`device`, and for a bare "cuda" under a launcher the device of this process."""
    local = os.environ.get("LOCAL_RANK")
    if device != "cuda" or local is None:
        return device
    if int(local) >= torch.cuda.device_count():
        raise UserError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    return f"cuda:{local}"

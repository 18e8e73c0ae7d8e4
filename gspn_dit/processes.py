"""What the processes of a launch that draws images do together: meet, compute alike, and agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn_dit.errors import UserError, advise_on_memory
from gspn_dit.locks import Lock, sole_job
from gspn_dit.sampling_options import choose_device, memory_advice

if TYPE_CHECKING:
    import argparse

    import torch
    from accelerate import PartialState

TIMEOUT = timedelta(days=2)
"""How long processes wait for one another at the end."""


def join(device: str | None) -> tuple[PartialState, str | torch.device]:
    """Meet the other processes of this job; return their state and the device of this one; raises UserError."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=TIMEOUT)
    if state.num_processes == 1:
        return state, choose_device(device)
    if device not in (None, state.device.type):
        raise UserError(
            f"--device {device}: {state.num_processes} processes take a device each; leave it out, or give cpu"
        )
    return state, state.device


@contextmanager
def drawing_job(
    options: argparse.Namespace, chunk: int, check: Callable[[], object]
) -> Iterator[tuple[PartialState, str | torch.device, Lock]]:
    """Meet the other processes of a job that draws images, and hold its `--out` until it ends.

    Args:
        options: `device` and `out`.
        chunk: images that are drawn at a time.
        check: raises UserError if the job cannot go to `--out`.

    Yields:
        The processes' state, the device of this one, and the lock of the output.
    """
    state, device = join(options.device)
    advice = f"{memory_advice(chunk, device)}; what is there is kept, continue with --resume"
    with sole_job(Path(options.out), "--out") as lock, advise_on_memory(advice):
        check()  # again: another job may have been here meanwhile
        yield state, device, lock


def compute_exactly(tf32: bool = False) -> None:
    """Make products depend on their inputs alone, and round them as asked."""
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # on by default, other than for matrix products
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def agree(state: PartialState, settings: Mapping[str, Any], may_differ: Sequence[str]) -> None:
    """Raise UserError unless all processes are about to do the same with the same checkpoint."""
    import torch
    from accelerate.utils import gather

    text = json.dumps({key: value for key, value in settings.items() if key not in may_differ})
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    if len(set(gather(torch.tensor([digest], device=state.device)).tolist())) > 1:
        raise UserError(
            f"the processes find different checkpoints at {settings['checkpoint']}: a run in training saves new ones; "
            "give one of its checkpoints/step-XXXXXXXX, on a file system that all machines share"
        )


def tell(state: PartialState, line: str) -> None:
    """Print a line once."""
    if state.is_main_process:
        print(line, flush=True)

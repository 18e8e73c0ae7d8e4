"""What a person sees while training: a bar in a terminal, a line per log in a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from tqdm import tqdm

TIMED_STEPS, TIMED_SECONDS = 3, 1.0
"""The first estimate of the time is made of so many steps, and of so long, at least; the very first one warms up."""


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, with days in front where there are any.

    >>> duration(59.6), duration(90061)
    ('00:01:00', '1 day 01:01:01')
    """
    days, rest = divmod(round(seconds), 86400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


class Progress:
    """Steps done, loss, images/s and time left; silent but for the main process."""

    def __init__(self, step: int, max_steps: int, accelerator: Accelerator) -> None:
        self.active = accelerator.is_main_process
        self.max_steps, self.step, self.first_step = max_steps, step, step
        self.started = time.perf_counter()
        self.device = accelerator.device
        self.warm: float | None = None
        """When the first step was done."""
        self.estimated = False
        terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self._put(sys.stderr, self.bar.close)

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        if self.bar is not None:
            self._put(sys.stderr, self.bar.update)
        if self.active and not self.estimated:
            self._estimate()

    def _estimate(self) -> None:
        """Say how long the run will take, once a few steps were timed."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # steps are asynchronous; these few are not
        now, timed = time.perf_counter(), self.step - self.first_step - 1
        if self.warm is None:
            self.warm = now
        if timed < TIMED_STEPS or now - self.warm < TIMED_SECONDS:
            return
        self.estimated = True
        seconds = (now - self.warm) / timed
        self.write(
            f"time    about {duration((self.max_steps - self.step) * seconds)} for the {self.max_steps - self.step:,} "
            f"steps left, at {seconds:.3g} s a step; previews, validation and checkpoints come on top"
        )

    def show(self, values: dict[str, Any]) -> None:
        """Show what was logged at this step."""
        text = f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
        if self.bar is not None:
            self._put(sys.stderr, self.bar.set_postfix_str, text)
            return
        remaining = self.max_steps - self.step
        seconds_per_step = (time.perf_counter() - self.started) / max(1, self.step - self.first_step)
        left = duration(remaining * seconds_per_step)
        self.write(f"step {self.step}/{self.max_steps}: {text}, {left} left")

    def write(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self.bar is not None:
            self._put(sys.stdout, self.bar.write, line)
        elif self.active:
            self._put(sys.stdout, lambda: print(line, flush=True))

    def _put(self, stream: TextIO, put: Callable[..., object], *arguments: str) -> None:
        """Show something; a terminal or pipe that is closed ends the showing, not the run."""
        try:
            put(*arguments)
        except OSError:
            self.bar, self.active = None, False
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())  # what is in the buffer is written at the end

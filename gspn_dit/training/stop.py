"""Ending a run when the system asks for it, in all processes at the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ECHO_SECONDS = 1.0
"""A terminal and a launcher may both pass on one Ctrl-C: signals so close together are one."""


class StopSignal:
    """Remembers the first signal that asks to end, instead of dying of it; a second Ctrl-C kills.

    As a context, restores the handlers at its end. A signal that the caller was told to ignore, as by nohup, stays
    ignored.
    """

    def __init__(self, num_processes: int) -> None:
        self.number: int | None = None
        """The signal this process got."""
        self._group: Any = dist.new_group(backend="gloo") if num_processes > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._since = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        asked = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._remember) for number in asked}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            if number == signal.SIGINT:
                _tell("stopping after this step, whose checkpoint is saved; Ctrl-C again kills at once\n")
        elif number == signal.SIGINT and now - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> int | None:
        """Return the signal to stop for, the same in every process; call once per step.

        Processes learn of one another's signals a step late, so that nobody waits for the exchange or the device.
        """
        if self._group is None:
            return self.number
        flag = torch.tensor(self.number or 0)
        exchange = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        previous, self._pending = self._pending, (exchange, flag)
        if previous is None:
            return None
        previous[0].wait()
        return int(previous[1]) or None


def _tell(line: str) -> None:
    """Write to standard error at once: a handler may have interrupted a `print`, which cannot be entered again."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode())

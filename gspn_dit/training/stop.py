"""Ending a run when the system asks for it, in all processes at the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 instead of dying; as a context, restores the handlers at its end."""

    def __init__(self, num_processes: int) -> None:
        self.number: int | None = None
        """The signal this process got."""
        self._group: Any = dist.new_group(backend="gloo") if num_processes > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number

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

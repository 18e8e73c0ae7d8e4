"""Memory for the large results of a scan over logits and gates on a CPU, used again from call to call.

Every fresh page costs a page fault, and glibc gives large tensors back to the system as soon as they are freed: a
backward would spend more time in page faults than in its kernel. Large outputs therefore come from blocks that return
here when the last tensor that uses them is gone. Blocks in use and idle ones together never hold more than was once in
use at the same time. The projected scan, whose results are as small as its tokens, does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

SMALLEST_BYTES = 4 << 20
"""Smaller tensors come from torch's own allocator."""

_ROUNDING = 2 << 20  # huge pages
_WASTE = 1.25  # a block may serve a tensor of no less than its size divided by this


class OutputMemory:
    """Blocks of anonymous memory that tensors borrow."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may be freed by the garbage collector while the lock is held
        self._idle: list[mmap.mmap] = []
        self._lent_bytes = self._most_lent_bytes = 0

    def empty(self, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
        """Return uninitialised contiguous CPU tensors."""
        return [self._one(shape, dtype) for shape in shapes]

    def _one(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST_BYTES:
            return torch.empty(shape, dtype=dtype)
        block = self._take(size)
        loan = (ctypes.c_byte * size).from_buffer(block)
        weakref.finalize(loan, self._give_back, block).atexit = False
        # The storage of the tensor keeps `loan` alive.
        tensor = torch.frombuffer(loan, dtype=dtype, count=math.prod(shape)).view(shape)
        fill = getattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        if fill and torch.are_deterministic_algorithms_enabled():
            tensor.fill_(math.nan)  # as torch.empty does
        return tensor

    def _take(self, size: int) -> mmap.mmap:
        block = self._find(size)
        with self._lock:
            self._lent_bytes += len(block)
            self._most_lent_bytes = max(self._most_lent_bytes, self._lent_bytes)
            self._drop_idle()
        return block

    def _find(self, size: int) -> mmap.mmap:
        with self._lock:
            fitting = [block for block in self._idle if size <= len(block) <= size * _WASTE + _ROUNDING]
            if fitting:
                block = min(fitting, key=len)
                self._idle = [other for other in self._idle if other is not block]
                return block
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        block = mmap.mmap(-1, -(-size // _ROUNDING) * _ROUNDING, flags=private)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            self._lent_bytes -= len(block)
            self._idle.append(block)
            self._drop_idle()

    def _drop_idle(self) -> None:
        while self._idle and self._lent_bytes + self.idle_bytes() > self._most_lent_bytes:
            del self._idle[0]

    def idle_bytes(self) -> int:
        """Return the bytes held for the next call."""
        with self._lock:
            return sum(len(block) for block in self._idle)

    def release(self) -> None:
        """Give all idle memory back to the system."""
        with self._lock:
            self._idle.clear()
            self._most_lent_bytes = self._lent_bytes

"""A guard against losses that explode but stay finite: it skips such steps, and says where to go back to.

Few-step objectives learn from their own predictions, so that one bad step can feed the next. Everything the guard knows
is a function of the steps taken and is saved with them: a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WINDOW = 50
"""Steps whose median a loss is compared with; before so many were taken nothing is a spike."""
MAX_RETURNS = 3
"""To one checkpoint; what then still explodes will not stop."""


class SpikeGuard:
    """Compares losses with their running median, and remembers which checkpoint was followed by steps without spikes.

    Args:
        ratio: a loss above this many times the median is a spike.
        patience: spikes in a row after which a run goes back. The device is waited for once in so many steps.
        device: of the losses.
    """

    def __init__(self, ratio: float, patience: int, device: torch.device) -> None:
        self.ratio, self.patience = ratio, patience
        self.window = torch.full((WINDOW,), math.nan, device=device)
        """Losses of the last steps that were taken, the newest last; NaN where there is none yet."""
        self.spikes, self.skipped_in_a_row, self.taken_in_a_row = (torch.zeros((), device=device) for _ in range(3))
        self.loss, self.spike = (torch.zeros((), device=device) for _ in range(2))
        """Of the step that was judged last."""
        self.good: int | None = None
        """Step of the checkpoint to go back to."""
        self.candidate: int | None = None
        """Step of a checkpoint that will be good once enough steps after it were taken."""
        self.returns = 0
        """How often the run went back to `good`."""

    # -- a step --------------------------------------------------------------------------------------------------

    def judge(self, loss: Tensor) -> Tensor:
        """Return 1.0 where a step's loss, 0-d, is finite and a spike, else 0.0, on the device."""
        self.loss = loss.to(self.window)
        above = torch.isfinite(self.loss) & (self.loss > self.ratio * self.window.median())
        self.spike = (above & ~torch.isnan(self.window).any()).to(torch.float32)
        return self.spike

    def follow(self, took_step: Tensor) -> None:
        """Count the step that was judged last; `took_step` is 0.0 where it was skipped, else 1.0, 0-d."""
        moved = torch.cat([self.window[1:], self.loss.reshape(1)])
        self.window = torch.where((took_step > 0) & torch.isfinite(self.loss), moved, self.window)
        self.spikes += self.spike
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * (1 - took_step)
        self.taken_in_a_row = (self.taken_in_a_row + 1) * took_step

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def saved(self, step: int) -> None:
        """Hear of a checkpoint that belongs to the run's rhythm, so that every such run has it."""
        if self.candidate is None:
            self.candidate = step

    @property
    def needed(self) -> set[int]:
        """Steps whose checkpoints must not be deleted."""
        return {step for step in (self.good, self.candidate) if step is not None}

    def must_go_back(self, step: int) -> bool:
        """Tell whether too many steps in a row were skipped; asked after every step, answered once in `patience`."""
        if step % self.patience:
            return False
        if int(self.skipped_in_a_row) >= self.patience:
            return True
        if self.candidate is not None and min(step - self.candidate, int(self.taken_in_a_row)) >= self.patience:
            self.good, self.candidate, self.returns = self.candidate, None, 0
        return False

    def went_back(self) -> None:
        """Count a return to `good`; the checkpoint after it, if there is one, was no good."""
        self.returns += 1
        self.candidate = None
        self.skipped_in_a_row.zero_()
        self.taken_in_a_row.zero_()

    # -- saved state ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that it knows, in plain JSON values."""
        return {
            "window": [None if math.isnan(loss) else loss for loss in self.window.tolist()],
            **{name: int(getattr(self, name)) for name in ("spikes", "skipped_in_a_row", "taken_in_a_row", "returns")},
            "good": self.good,
            "candidate": self.candidate,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        window = [math.nan if loss is None else loss for loss in state["window"]]
        self.window.copy_(torch.tensor(window, dtype=torch.float32))
        for name in ("spikes", "skipped_in_a_row", "taken_in_a_row"):
            getattr(self, name).fill_(state[name])
        self.good, self.candidate, self.returns = state["good"], state["candidate"], state["returns"]

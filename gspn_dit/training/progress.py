"""What a person sees while training: a bar in a terminal, a line per log in a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm


class Progress:
    """Steps done, loss, images/s and time left; silent but for the main process."""

    def __init__(self, step: int, max_steps: int, accelerator: Accelerator) -> None:
        self.active = accelerator.is_main_process
        self.max_steps, self.step, self.first_step = max_steps, step, step
        self.started = time.perf_counter()
        terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        if self.bar is not None:
            self.bar.update()

    def show(self, values: dict[str, Any]) -> None:
        """Show what was logged at this step."""
        text = f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        remaining = self.max_steps - self.step
        seconds_per_step = (time.perf_counter() - self.started) / max(1, self.step - self.first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(remaining * seconds_per_step))
        self.write(f"step {self.step}/{self.max_steps}: {text}, {left} left")

    def write(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.active:
            print(line, flush=True)

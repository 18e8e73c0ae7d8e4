"""Errors that a user can cause, and how a command line reports them: one line, exit code 2."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what was given, what is allowed, what to do.

    Every process of a distributed run sees the same mistake, so only rank 0 prints it.
    """


class LocalUserError(UserError):
    """A `UserError` that one process alone meets (an unreadable image, say) and therefore prints itself."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for what `word` abbreviates, else the closest of `allowed`, or an empty string."""
    allowed = list(allowed)
    longer = [name for name in allowed if word.strip("-") and name.startswith(word)]
    close = difflib.get_close_matches(word, longer or allowed, n=1, cutoff=0.0 if longer else 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviations that raises `UserError` instead of printing its usage."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            word = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {word}{nearest(word, options)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _program_name() -> str:
    """Return how the program was started: the script's name, or the module's under `python -m`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return module.name.removesuffix(".__main__") if module else os.path.basename(sys.argv[0])


def _errors_of_the_scan() -> tuple[type[Exception], ...]:
    """The scan knows nothing of this module, which is loaded before torch is; none if it was not imported."""
    ops = sys.modules.get("gspn_dit.ops")
    return () if ops is None else (ops.BackendUnavailableError,)


def run_cli(main: Callable[[], None]) -> None:
    """Run a command line: a `UserError` becomes one line on standard error and exit code 2.

    So does a scan backend that was named and cannot run here, which the scan itself reports.

    >>> run_cli(lambda: None)
    """
    # Read when torch is loaded, which `main` does: threads that spin while they wait slow whoever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Read at torch's first allocation: large tensors come in huge pages, also where the system leaves them to madvise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        main()
    except Exception as error:
        if not isinstance(error, (UserError, *_errors_of_the_scan())):
            raise
        if isinstance(error, LocalUserError) or os.environ.get("RANK", "0") == "0":
            message = " ".join(str(error).split())
            print(f"{_program_name()}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

"""Errors that a user can cause, and how a command line reports them: one line, exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what was given, what is allowed, what to do.

    Every process of a distributed run sees the same mistake, so only rank 0 prints it.
    """


class LocalUserError(UserError):
    """A `UserError` that one process alone meets (an unreadable image, say) and therefore prints itself."""


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end; `args` holds its number."""


@contextlib.contextmanager
def advise_on_memory(advice: str) -> Iterator[None]:
    """Turn memory that runs out, the host's or a device's, into a `LocalUserError` that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        words = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        raise LocalUserError(f"out of memory: {advice}" + (f" ({reason[:200]})" if reason else "")) from error


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for what `word` abbreviates, else the closest of `allowed`, or an empty string."""
    allowed = list(allowed)
    longer = [name for name in allowed if word.strip("-") and _abbreviates(word, name)]
    close = difflib.get_close_matches(word, longer or allowed, n=1, cutoff=0.0 if longer else 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _abbreviates(word: str, name: str) -> bool:
    """Whether `word` begins `name`, or has its initials: `training.lr` of `training.learning_rate`."""
    section, point, last = name.rpartition(".")
    initials = "".join(part[:1] for part in last.split("_"))
    return name.startswith(word) or (len(initials) > 1 and word in (initials, f"{section}{point}{initials}"))


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviations that raises `UserError` instead of printing its usage."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("prog", command_name())
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        offer_completion(self)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            word = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {word}{nearest(word, options)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def offer_completion(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks, through argcomplete, how the command line may go on; return at once otherwise.

    Install argcomplete and put `eval "$(register-python-argcomplete gspn-sample)"` into ~/.bashrc, a line per command.
    """
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def _program_name() -> str:
    """Return how the program was started: the script's name, or the module's under `python -m`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return module.name.removesuffix(".__main__") if module else os.path.basename(sys.argv[0])


def command_name() -> str:
    """Return what to type to start this program again: `gspn-fid`, `sample.py` or `python -m fid`."""
    started_as_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
    return f"python -m {_program_name()}" if started_as_module else _program_name()


def _errors_of_the_scan() -> tuple[type[Exception], ...]:
    """The scan knows nothing of this module, which is loaded before torch is; none if it was not imported."""
    ops = sys.modules.get("gspn_dit.ops")
    return () if ops is None else (ops.BackendUnavailableError,)


def run_cli(main: Callable[[], None], interrupted: str | None = None) -> None:
    """Run a command line: a `UserError` becomes one line on standard error and exit code 2.

    So does a scan backend that was named and cannot run here, which the scan itself reports, and, with exit code 128 +
    its number, a signal that asks to end, where `interrupted` says what then is left. Output that nobody reads any more
    (`gspn-train --dry-run | head -1`) ends it quietly, with the exit code that a shell's own commands have then.

    >>> run_cli(lambda: None)
    """
    # Read when torch is loaded, which `main` does: threads that spin while they wait slow whoever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Read at torch's first allocation: large tensors come in huge pages, also where the system leaves them to madvise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with _tidy_end(), _end_with_the_reader():
            main()
    except Exception as error:
        if not isinstance(error, (UserError, *_errors_of_the_scan())):
            raise
        if isinstance(error, LocalUserError) or os.environ.get("RANK", "0") == "0":
            _complain(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if isinstance(error, Stopped) else signal.SIGINT)
        if interrupted is not None and os.environ.get("RANK", "0") == "0":
            _complain(f"stopped by {number.name}; {interrupted}")
        sys.exit(128 + number)


def _complain(message: str) -> None:
    line = f"{_program_name()}: {' '.join(message.split())}"
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


@contextlib.contextmanager
def _end_with_the_reader() -> Iterator[None]:
    """Exit where the reader of standard output is gone.

    Not by the signal SIGPIPE, which would kill a training whose connection to a tracker breaks.
    """
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        output = select.poll()
        output.register(1, 0)
        if not any(state & select.POLLERR for _, state in output.poll(0)):
            raise  # another pipe broke
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what is still to be written when Python ends
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Let the first signal that asks to end raise `Stopped`, so that files are tidied up; a second one kills.

    Not in a job of several processes, which may wait for one another where no exception is raised.
    """
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    untouched = (signal.SIG_DFL, signal.default_int_handler)  # not those of nohup, nor those of a program around this
    mine = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in asking if mine}
    taken = {number: handler for number, handler in before.items() if handler in untouched}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    try:
        for number in taken:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)

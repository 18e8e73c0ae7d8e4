"""One job for each output: a file that names the job at work, from its first check to its end.

The file is made with O_EXCL, which every file system that machines share keeps to. A job that was killed leaves it
behind; the next one takes over if that job's process is gone, or, where this cannot be seen from here (another machine,
another container), if the file's time stands still, which a living job moves on every few seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gspn_dit.errors import UserError
from gspn_dit.files import is_npz, is_temporary

NAME = ".gspn-dit.lock"
BEAT_SECONDS = 3.0
"""Between two signs of life."""
WATCH_SECONDS = 15.0
"""How long a job without a sign of life is watched before it counts as dead."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    boot: str
    """Identity of the running kernel, "" where there is none to read."""
    processes: str
    """Identity of the space that process ids are of: containers have their own."""
    pid: int
    started: str
    """When the process began, in the kernel's own time: ids are given again, and clocks are set."""
    since: str
    """When the lock was taken, for a reader."""

    @classmethod
    def this_process(cls) -> Holder:
        boot, processes = _read("/proc/sys/kernel/random/boot_id"), ""
        with contextlib.suppress(OSError):
            processes = os.readlink("/proc/self/ns/pid")
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(socket.gethostname(), boot, processes, os.getpid(), _start_of(os.getpid()) or "", since)

    def is_gone(self) -> bool | None:
        """Tell whether the process has ended; None where that cannot be seen from here."""
        here = Holder.this_process()
        if (self.boot or self.host, self.processes) != (here.boot or here.host, here.processes):
            return None
        return _start_of(self.pid) != self.started


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return when a process began, None if there is none: in ticks since the boot, "" where that cannot be told."""
    if os.path.isdir("/proc/self"):
        state, *fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or ["X"]
        return None if state in "XZ" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def lock_file(output: Path) -> Path:
    """Return where the lock of an output lies: in it, or beside it for a file.

    >>> str(lock_file(Path("sets/a.npz")))
    'sets/.a.npz.lock'
    """
    return output.with_name(f".{output.name}.lock") if is_npz(output) else output / NAME


def is_filled(directory: Path) -> bool:
    """Tell whether a directory exists and holds anything but a lock, and what a job killed at its first file left."""
    return directory.is_dir() and any(
        entry.name != NAME and not is_temporary(entry.name) for entry in directory.iterdir()
    )


def refuse_if_held(output: Path, name: str) -> None:
    """Raise UserError if a job is surely at work on an output, before anything else is said of it."""
    holder = _holder(lock_file(output))
    if holder is not None and holder.is_gone() is False:
        raise _in_use(output, name, holder)


@contextlib.contextmanager
def sole_job(output: Path, name: str) -> Iterator[Lock]:
    """Hold an output for this job, whose processes all call this; the main one holds the lock.

    A directory is made if need be, and unmade if it is still empty at the end. `name` is the option or key that the
    output was given by. Raises UserError in every process if another job has it, or it cannot be written.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    main, lock = PartialState().is_main_process, Lock(output)
    if output.exists() and lock.file.parent == output and not output.is_dir():
        raise UserError(f"{name} {output} is a file; give a directory")
    found: list[str | None] = ["", None]
    if main:
        try:
            found = [lock.take(name), None]
        except UserError as error:
            found = ["", str(error)]
        except OSError as error:
            found = ["", f"{name} {output} cannot be written: {error}"]
    broadcast_object_list(found)
    try:
        if found[1] is not None:
            raise UserError(found[1])
        lock.content = found[0] or ""
        yield lock
    finally:
        if main:
            lock.release()


class Lock:
    """The lock of an output."""

    def __init__(self, output: Path) -> None:
        self.output, self.file, self.content = output, lock_file(output), ""
        self._made: list[Path] = []
        self._ended = threading.Event()

    def take(self, name: str) -> str:
        """Take the lock and show signs of life from now on; return what is in it.

        Raises UserError if another job has it, and OSError if the disk refuses.
        """
        content = json.dumps(dataclasses.asdict(Holder.this_process()))
        self._made = [folder for folder in (self.file.parent, *self.file.parent.parents) if not folder.exists()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.file.parent):
            while not _make(self.file, content):
                holder = _holder(self.file)
                gone = None if holder is None else holder.is_gone()
                if gone is None and (holder is not None or self.file.exists()):
                    gone = self._stands_still(holder)
                if gone is False:
                    raise _in_use(self.output, name, holder)
                self.file.unlink(missing_ok=True)
        self.content = content
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return content

    def check(self) -> None:
        """Raise UserError if another job has taken over, as it may after this one's main process was killed."""
        if _read(str(self.file)) != self.content:
            raise UserError(f"another job has taken over {self.output}, or its lock {self.file} was deleted; stopping")

    def release(self) -> None:
        """Give the lock back, if it is still this job's, and unmake what was made for it and is empty."""
        self._ended.set()
        with contextlib.suppress(OSError), _one_at_a_time(self.file.parent):
            if self.content and _read(str(self.file)) == self.content:
                self.file.unlink()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def keep_directory(self) -> None:
        """Leave the output's directory even if it is empty: the job has begun to write."""
        self._made = []

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a network drive may come back
                os.utime(self.file)

    def _stands_still(self, holder: Holder | None) -> bool:
        who = f"process {holder.pid} on {holder.host}" if holder else "another job"
        print(f"{who} left a lock in {self.output}: watching {WATCH_SECONDS:g} s for a sign of life", flush=True)
        first, end = _time_of(self.file), time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_SECONDS / 10))
            now = _time_of(self.file)
            if now != first:
                return now is None
        return True


def _in_use(output: Path, name: str, holder: Holder | None) -> UserError:
    who = f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "it has just begun"
    return UserError(f"{name} {output} is in use by another job ({who}); wait for it, stop it, or give another {name}")


def _make(file: Path, content: str) -> bool:
    """Make a lock, whole or not at all; return whether there was none."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except FileNotFoundError:  # a job that ended has unmade the directory
        file.parent.mkdir(parents=True, exist_ok=True)
        return False
    try:
        os.write(descriptor, content.encode())
    except OSError:
        file.unlink()
        raise
    finally:
        os.close(descriptor)
    return True


def _holder(file: Path) -> Holder | None:
    """Return who is in a lock; None if there is no lock, or it does not say."""
    try:
        return Holder(**json.loads(_read(str(file))))
    except (ValueError, TypeError):
        return None


def _time_of(file: Path) -> int | None:
    """Return when a file was touched last, asking the server rather than a cache; None if it is gone."""
    try:
        with open(file, "rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Keep jobs of this machine from taking over one lock at the same time, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

"""One job for each output: who is refused, who takes over from the dead, and what is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState

from gspn_dit import locks
from gspn_dit.errors import UserError
from gspn_dit.locks import Holder, Lock, is_filled, lock_file, refuse_if_held, sole_job
from gspn_dit.sample_sets import check_place


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def left_behind(output: Path, **changes: Any) -> Path:
    """Write a lock as another job would leave it."""
    file = lock_file(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    holder = dataclasses.replace(Holder.this_process(), **changes)
    file.write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
    return file


def refusal(output: Path, name: str = "--out") -> str:
    """What a job that wants an output is told."""
    with pytest.raises(UserError) as caught, sole_job(output, name):
        pass
    return str(caught.value)


def test_a_second_job_is_refused_by_a_line_that_names_the_first(tmp_path: Path) -> None:
    with sole_job(tmp_path / "run", "output_dir") as lock:
        holder = Holder(**json.loads(lock.content))
        assert refusal(tmp_path / "run", "output_dir") == (
            f"output_dir {tmp_path / 'run'} is in use by another job (process {os.getpid()} on {holder.host}, since "
            f"{holder.since}); wait for it, stop it, or give another output_dir"
        )
        with pytest.raises(UserError, match="is in use by another job"):
            refuse_if_held(tmp_path / "run", "--out")
        lock.check()
    refuse_if_held(tmp_path / "run", "--out")


def test_nothing_is_left_behind_but_what_was_written(tmp_path: Path) -> None:
    with sole_job(tmp_path / "a" / "b", "--out"):
        assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == [".gspn-dit.lock"]
        assert not is_filled(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), sole_job(tmp_path / "a" / "b", "--out"):
        (tmp_path / "a" / "kept").touch()
        raise ZeroDivisionError
    assert [entry.name for entry in tmp_path.rglob("*")] == ["a", "kept"]
    assert is_filled(tmp_path / "a")


def test_a_file_is_locked_beside_it(tmp_path: Path) -> None:
    with sole_job(tmp_path / "set.npz", "--out"), sole_job(tmp_path / "set", "--out"):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".set.npz.lock", "set"]


def test_links_to_one_directory_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with sole_job(tmp_path / "run", "--out"):
        assert "link is in use by another job" in refusal(tmp_path / "link")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = "import sys; from gspn_dit.locks import *; Lock(Path(sys.argv[1])).take('x'); os.kill(os.getpid(), 9)"
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)  # a zombie is as dead as can be
    assert Holder(**json.loads(lock_file(tmp_path).read_text(encoding="utf-8"))).pid == job.pid
    with sole_job(tmp_path, "--out"):
        assert Holder(**json.loads(lock_file(tmp_path).read_text(encoding="utf-8"))).pid == os.getpid()
    job.wait()


def test_what_a_job_killed_at_its_first_file_left_does_not_fill_a_directory(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from gspn_dit.files import write_atomically
        write_atomically(sys.argv[1], lambda file: os.kill(os.getpid(), signal.SIGKILL))
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "generation.json")], check=False)
    assert len(list(tmp_path.iterdir())) == 1 and not is_filled(tmp_path)
    check_place(tmp_path, resume=True, overwrite=False)
    (tmp_path / "other.tmp").touch()
    assert is_filled(tmp_path)


def test_a_process_id_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    left_behind(tmp_path, started="12")
    with sole_job(tmp_path, "--out"):
        pass
    assert not is_filled(tmp_path) and not lock_file(tmp_path).exists()


@pytest.mark.parametrize("changes", [{"boot": "other", "host": "far"}, {"processes": "pid:[1]"}, {"boot": "other"}])
def test_the_dead_of_other_machines_and_containers_give_no_sign_of_life(
    tmp_path: Path, changes: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = left_behind(tmp_path, **changes)
    refuse_if_held(tmp_path, "--out")  # cannot be told at once
    with sole_job(tmp_path, "--out"):
        assert Holder(**json.loads(file.read_text(encoding="utf-8"))) != changes
    assert "left a lock in" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}', "[]"])
def test_a_lock_that_says_nothing_is_watched_too(tmp_path: Path, content: str) -> None:
    lock_file(tmp_path).write_text(content, encoding="utf-8")
    with sole_job(tmp_path, "--out") as lock:
        lock.check()


def test_the_living_of_other_machines_are_seen_by_their_beat(tmp_path: Path) -> None:
    living = Lock(tmp_path)
    living.take("--out")
    content = json.loads(living.content) | {"host": "far", "boot": "other"}
    living.file.write_text(json.dumps(content), encoding="utf-8")
    assert f"in use by another job (process {os.getpid()} on far, since " in refusal(tmp_path)
    living._ended.set()


def test_a_job_that_was_robbed_is_told_and_leaves_the_robber_alone(tmp_path: Path) -> None:
    with sole_job(tmp_path, "--out") as lock:
        file = left_behind(tmp_path, pid=1)
        with pytest.raises(UserError, match="another job has taken over"):
            lock.check()
    assert file.exists()


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    left_behind(tmp_path / "run", started="12")
    outcomes: list[str] = []
    gate = threading.Barrier(8)

    def compete() -> None:
        gate.wait()
        try:
            Lock(tmp_path / "run").take("--out")
            outcomes.append("won")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["won"]


@pytest.mark.parametrize("flock", [True, False])
def test_it_needs_no_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    if not flock:
        monkeypatch.setattr("fcntl.flock", refuse)
    with sole_job(tmp_path, "--out"):
        assert "in use" in refusal(tmp_path)


@pytest.mark.parametrize(("place", "problem"), [("file/run", "cannot be written: "), ("file", "is a file")])
def test_what_cannot_be_written_is_named(tmp_path: Path, place: str, problem: str) -> None:
    (tmp_path / "file").touch()
    assert f"output_dir {tmp_path / place} {problem}" in refusal(tmp_path / place, "output_dir")

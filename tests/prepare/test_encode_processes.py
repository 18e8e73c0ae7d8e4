"""One process or two, killed at random moments or not: the directories are bit-identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gspn_dit.data.latent_shards import MANIFEST
from tests.data.tiny_vae import SIZE, write_folder, write_vae
from tests.prepare.test_encode import content_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
IMAGES, PER_SHARD, KILLS = 1200, 20, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `vae`, `images`, and their latents `whole` by one process."""
    directory = tmp_path_factory.mktemp("processes")
    write_vae(directory / "vae")
    write_folder(directory / "images", IMAGES)
    job = start(directory, "whole", 1)
    assert job.wait(timeout=300) == 0, job.communicate()
    return directory


def start(place: Path, out: str, processes: int, *options: str) -> subprocess.Popen[str]:
    """Start encoding into `out`, in a process group of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        *(*launcher, "-m", "gspn_dit.prepare.encode", "--source", f"imagefolder:{place / 'images'}"),
        *("--vae", str(place / "vae"), "--image-size", str(SIZE), "--out", str(place / out)),
        *("--shard-images", str(PER_SHARD), "--batch-size", "7", "--workers", "1", *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(job: subprocess.Popen[str]) -> None:
    """Kill a job and what it started: the launcher's processes have groups of their own, and would go on alone."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text(encoding="utf-8").split()
    for process in (job.pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)
    job.communicate(timeout=60)


def wait_for_shards(directory: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(list(directory.glob("shard-*"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_random_kills_change_nothing(place: Path, processes: int) -> None:
    out, chance = f"killed-{processes}", random.Random(processes)
    shards = -(-IMAGES // PER_SHARD)
    for number in range(KILLS):
        job = start(place, out, processes, "--resume")
        wait_for_shards(place / out, (number + 1) * shards // (KILLS + 2))
        time.sleep(chance.uniform(0, 0.1))
        kill(job)
        assert not (place / out / MANIFEST).exists()
    job = start(place, out, processes, "--resume")
    assert job.wait(timeout=300) == 0, job.communicate()
    assert content_of(place / out) == content_of(place / "whole")


def test_two_processes_that_are_left_alone_write_the_same_and_report_once(place: Path) -> None:
    job = start(place, "two", 2)
    told, _ = job.communicate(timeout=300)
    assert job.returncode == 0, told
    assert content_of(place / "two") == content_of(place / "whole")
    assert told.count("1,200 images in 60 shards, 0 left out") == 1


def test_mistake_is_told_once(place: Path) -> None:
    job = start(place, "mistake", 2, "--vae", str(place / "absent"))
    told, _ = job.communicate(timeout=300)
    assert job.returncode != 0
    assert told.count("does not exist; give an AutoencoderKL's directory") == 1
    assert not (place / "mistake").exists()

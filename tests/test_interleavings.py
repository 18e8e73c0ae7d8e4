"""Two jobs and one output at random moments, the first one killed now and then: nothing is lost, nothing is mixed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_vae import SIZE, write_folder, write_vae
from tests.tiny import write_run
from tests.training.conftest import run_training, tiny_config

INTERLEAVINGS = int(os.environ.get("INTERLEAVINGS", "3"))
"""Of each kind."""
PRELOADED = ("gspn_dit.training.loop", "gspn_dit.generate", "gspn_dit.prepare.encoder", "gspn_dit.pipeline")


# -- the jobs; `which` of two is another seed or another autoencoder ---------------------------------------------------


def train(folder: Path, out: Path, which: int, flags: Sequence[str]) -> None:
    config = tiny_config(out, max_steps=20, checkpoint_every=4, log_every=2, keep_last=2)
    resume = "auto" if "--resume" in flags else None
    run_training(dataclasses.replace(config, seed=which), resume, "--overwrite" in flags)


def generate(folder: Path, out: Path, which: int, flags: Sequence[str]) -> None:
    from gspn_dit.generate import parse_arguments, run

    place = ["--checkpoint", str(folder / "run"), "--out", str(out), "--device", "cpu"]
    run(parse_arguments([*place, "--num-samples", "150", "--steps", "2", "--seed", str(which), *flags]))


def encode(folder: Path, out: Path, which: int, flags: Sequence[str]) -> None:
    from gspn_dit.prepare.encode import parse_arguments, run

    source = ["--source", f"imagefolder:{folder / 'images'}", "--vae", str(folder / f"vae-{which}")]
    size = ["--image-size", str(SIZE), "--shard-images", "2", "--batch-size", "1", "--workers", "1"]
    run(parse_arguments([*source, *size, "--out", str(out), *(flag for flag in flags if flag == "--resume")]))


def contents(out: Path) -> dict[str, Any]:
    """Every file of an output by name; without what tells the machine and the moment."""
    names = ("environment", "resumed", "images_per_second", "model_flops_per_second", "peak_memory_bytes", "complete")
    files: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or name in ("environment.json", "index.html"):
            continue
        files[name] = path.read_text(encoding="utf-8") if path.suffix == ".yaml" else path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = [path.read_text(encoding="utf-8")] if path.suffix == ".json" else files[name].decode().splitlines()
            files[name] = [{k: v for k, v in json.loads(line).items() if k not in names} for line in lines]
    return json.loads(json.dumps(files, default=bytes.hex).replace(json.dumps(str(out))[1:-1], "OUT"))


@dataclass
class Kind:
    """What two jobs do: the function, and the flags of the first and of the second one."""

    job: Callable[[Path, Path, int, Sequence[str]], None]
    flags: list[tuple[str, ...]]
    same: bool = False
    """Whether both jobs want the same thing."""


KINDS = {
    "train/train": Kind(train, [(), ("--overwrite",)]),
    "train/resume": Kind(train, [("--resume",)], same=True),
    "generate/generate": Kind(generate, [(), ("--overwrite",)]),
    "generate/resume": Kind(generate, [("--resume",)], same=True),
    "encode/encode": Kind(encode, [()]),
    "encode/resume": Kind(encode, [("--resume",)], same=True),
}


# -- two at a time -----------------------------------------------------------------------------------------------------


def child(kind: str, folder: Path, out: Path, which: int, flags: Sequence[str], log: Path) -> None:
    import torch

    from gspn_dit.errors import run_cli

    torch.set_num_threads(1)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    run_cli(lambda: KINDS[kind].job(folder, out, which, flags))


class Jobs:
    """Starts jobs in processes that have loaded everything already, and knows what each makes alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_run(folder / "run")
        write_folder(folder / "images", 16)
        for which in (1, 2):
            write_vae(folder / f"vae-{which}", seed=which)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        self.alone: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}

    def start(self, kind: str, out: Path, which: int, flags: Sequence[str], name: str) -> Any:
        log = out.with_name(f"{out.name}-{name}.log")
        log.touch()  # a job can be killed before it opens its own
        process = self.context.Process(target=child, args=(kind, self.folder, out, which, flags, log))
        process.log = log
        process.start()
        return process

    def reference(self, kind: str, which: int) -> tuple[dict[str, Any], float]:
        """What a job makes alone, and the seconds that it takes."""
        task = KINDS[kind].job.__name__
        if (task, which) not in self.alone:
            out, began = self.folder / f"{task}-{which}", time.monotonic()
            job = self.start(kind, out, which, (), "alone")
            job.join(120)
            assert job.exitcode == 0, job.log.read_text(encoding="utf-8")
            self.alone[task, which] = contents(out), time.monotonic() - began
        return self.alone[task, which]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", range(INTERLEAVINGS))
@pytest.mark.parametrize("kind", KINDS)
def test_interleaving(jobs: Jobs, kind: str, number: int) -> None:
    chance, rules, out = (
        random.Random(f"{kind} {number}"),
        KINDS[kind],
        jobs.folder / f"{kind.replace('/', '-')}-{number}",
    )
    choices = (1, 1) if rules.same else (1, 2)
    references = {which: jobs.reference(kind, which) for which in set(choices)}
    duration = references[1][1]
    first = jobs.start(kind, out, choices[0], rules.flags[0], "first")
    time.sleep(chance.uniform(0, 1.2 * duration))
    killed = chance.random() < 0.4
    if killed:
        first.kill()
        time.sleep(chance.choice([0, 0.2]))
    second = jobs.start(kind, out, choices[1], rules.flags[-1], "second")
    ended = {}
    for name, job in (("first", first), ("second", second)):
        job.join(120)
        ended[name] = job.exitcode
    told = {job.log.stem[-6:]: job.log.read_text(encoding="utf-8") for job in (first, second)}
    assert ended["first"] in ((0, 2, -signal.SIGKILL) if killed else (0, 2)) and ended["second"] in (0, 2), told
    for name, code in ended.items():
        errors = [line for line in told[name.rjust(6, "-")].splitlines() if ": error: " in line]
        assert "Traceback" not in told[name.rjust(6, "-")] and len(errors) == (code == 2), told
    if 0 in ended.values():
        winner = choices[1] if ended["second"] == 0 else choices[0]
        assert contents(out) == references[winner][0], (ended, told)
    else:  # a killed job whose place the second one, which was not told to go on, respected
        assert killed and ended["second"] == 2, (ended, told)
        job = jobs.start(kind, out, choices[0], ("--resume",), "third")
        job.join(120)
        assert job.exitcode == 0, job.log.read_text(encoding="utf-8")
        assert contents(out) == references[choices[0]][0]

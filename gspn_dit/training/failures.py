"""What ends a training early, told so that the one who started it knows what to do, or so that a launcher finds it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from gspn_dit.config import Config
from gspn_dit.errors import LocalUserError, UserError, advise_on_memory

GRACE_SECONDS = 5
"""How long a process that lost another one waits before it fails, so that the launcher finds the dead one first."""
REFUSALS_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT),
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV),  # network drives
)


def explain_failures(config: Config, run: Callable[[], None]) -> None:
    """Run a training; what a person can mend raises `UserError`, and the launcher gets the traceback of all else."""
    mistakes: list[UserError] = []

    @record  # hands the launcher the traceback; a user's mistake needs none
    def recorded() -> None:
        try:
            with advise_on_memory(_what_to_lower(config)):
                run()
        except UserError as error:
            mistakes.append(error)
        except OSError as error:
            if error.errno not in REFUSALS_OF_THE_DISK:
                raise
            mistakes.append(_refused_by_the_disk(error, config.output_dir))
        except RuntimeError as error:
            if _lost_a_process(error):
                time.sleep(GRACE_SECONDS)
            raise

    recorded()
    if mistakes:
        raise mistakes[0]


def _refused_by_the_disk(error: OSError, output_dir: str) -> UserError:
    file = error.filename if isinstance(error.filename, str) else output_dir
    mine = Path(output_dir).absolute() in (Path(file).absolute(), *Path(file).absolute().parents)
    place = f"output_dir {output_dir} cannot be written" if mine else f"{file} cannot be used"
    return LocalUserError(f"{place}: {error}; checkpoints stay as they are, resume with --resume auto")


def _what_to_lower(config: Config) -> str:
    settings, processes = config.training, int(os.environ.get("WORLD_SIZE", "1"))
    images = max(1, settings.batch_size // settings.gradient_accumulation_steps // processes)
    return (
        f"training.batch_size is {settings.batch_size}, of which each process takes {images} images at a time; lower "
        "it, raise training.gradient_accumulation_steps, or set training.activation_checkpointing true, in a new "
        "output_dir; --resume auto resumes from the last checkpoint with more memory or more processes"
    )


def _lost_a_process(error: RuntimeError) -> bool:
    """Tell whether a collective failed, which is seldom this process's own fault; gloo raises bare RuntimeErrors."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)

"""Repositories of the Hugging Face Hub, read into the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from gspn_dit.errors import UserError

CARD = "README.md"
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def download(
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the local copy of a repository: its JSON and safetensors, nothing that would be unpickled.

    Raises UserError if the name is no repository's, or the repository cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if not _REPOSITORY.fullmatch(name):
        raise UserError(f"{name} does not exist; give a directory or the id of a repository on the Hugging Face Hub")
    try:
        local = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", CARD],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"'{name}' is neither a directory nor a repository of the Hugging Face Hub that can be read: {reason}"
        ) from None
    return Path(local)

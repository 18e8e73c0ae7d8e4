"""Scores of studies keep features of real images, which is not to happen in the user's own cache."""

from tests.fid.conftest import no_shared_cache

__all__ = ["no_shared_cache"]

"""The browser that tests open pages in."""

from __future__ import annotations

import os
import shutil

import pytest


def chromium() -> str:
    """The browser; a test that needs it is skipped without it, but fails in CI, where it is installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        message = "chromium is not installed (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found

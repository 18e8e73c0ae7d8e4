"""What holds for every test: no network, one thread per process, reproducible examples."""

from __future__ import annotations

import os

# Read when the libraries are imported, so they are set before that.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.pop("GSPN_SCAN_BACKEND", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; two pools of two threads each are slower than one thread each by far.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import hypothesis
import setuptools  # noqa: F401  # before anything imports the distutils that it replaces, which inductor insists on
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "quick",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("quick"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

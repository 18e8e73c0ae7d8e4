"""An sdist, and the wheel built from it, installed in a fresh environment, work away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [
    path
    for name in ("builtin", "training/references")
    for path in (ROOT / "gspn_dit" / name).rglob("*")
    if path.is_file()
]
"""What the package holds beside modules: a checkpoint, and reference curves."""
NOT_SOURCES = (".*", "*.egg-info", "*.so", "__pycache__", "build", "dist", "runs")

pytestmark = pytest.mark.slow

USE = """
import fid, gspn_dit, torch
from pathlib import Path
for package in (fid, gspn_dit):
    assert Path(package.__file__).is_relative_to(PREFIX), package.__file__
x = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1).requires_grad_()
ones = torch.ones(1, 1, 3, 1, 1)
y = gspn_dit.gspn_scan(x, torch.zeros(1, 1, 3, 1, 3, 1), ones, ones, directions=("right",), backend="cpu")
y.sum().backward()
assert y.flatten().tolist() == [1.0, 3.0, 7.0], y
assert x.grad.flatten().tolist() == [3.0, 2.0, 1.0], x.grad
"""

DRAW = """
from gspn_dit import GSPNPipeline
images = GSPNPipeline.from_pretrained("builtin:digits")(["3", "8"], num_inference_steps=5, output_type="np").images
assert images.shape == (2, 8, 8, 1) and images.std() > 50, images
"""


@dataclass
class Installation:
    """An environment with the wheel, which takes everything else from the one that runs the tests."""

    sdist: Path
    wheel: Path
    prefix: Path
    elsewhere: Path

    def python(self, *arguments: str) -> str:
        """Run the environment's Python outside of the checkout and return what it prints."""
        return run(str(self.prefix / "bin" / "python"), *arguments, cwd=self.elsewhere)

    def doctor(self) -> dict[str, dict[str, object]]:
        """Return the doctor's reports by backend."""
        diagnosis = json.loads(self.python("-m", "gspn_dit.doctor", "--json"))
        assert diagnosis["ok"]
        return {report["name"]: report for report in diagnosis["backends"]}


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command without the settings of this process; on failure show what it wrote."""
    inherited = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TMPDIR") if name in os.environ}
    quiet = {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    finished = subprocess.run(
        command, cwd=cwd, env={**inherited, **quiet, **environment}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def build_and_install(directory: Path, **environment: str) -> Installation:
    """Build an sdist from a copy of the sources, a wheel from the sdist, and install it in a new environment."""
    pytest.importorskip("pip", reason="building a wheel needs pip")
    # A copy, so that nothing of an earlier build is picked up and nothing is left behind.
    sources, prefix, elsewhere = directory / "sources", directory / "environment", directory / "elsewhere"
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    elsewhere.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(directory)!r})"
    run(sys.executable, "-c", code, cwd=sources)
    (sdist,) = directory.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--quiet")
    options = ("--no-deps", "--no-index")
    run(*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", str(directory), str(sdist), cwd=elsewhere,
        **environment)  # fmt: skip
    (wheel,) = directory.glob("*.whl")
    shutil.rmtree(sources)
    venv.create(prefix, symlinks=True)
    python = str(prefix / "bin" / "python")
    run(*pip, "--python", python, "install", *options, str(wheel), cwd=elsewhere)
    # Added as a plain path: .pth files over there, an editable install of this project among them, are not read.
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=elsewhere).strip()
    )
    others = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site_packages / "outer.pth").write_text("\n".join(others) + "\n")
    return Installation(sdist, wheel, prefix, elsewhere)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return build_and_install(tmp_path_factory.mktemp("wheel"))


def test_contents(installation: Installation) -> None:
    """Weights, kernels' sources and type marker travel inside the packages, and nothing lies beside them."""
    with zipfile.ZipFile(installation.wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"gspn_dit", "fid"}
    weights = sorted(path.name for path in (ROOT / "fid" / "weights").glob("*.safetensors"))
    assert weights
    assert {f"fid/weights/{name}" for name in weights} <= set(names)
    assert {path.relative_to(ROOT).as_posix() for path in SHIPPED} <= set(names)
    assert "gspn_dit/py.typed" in names
    modules = [
        path.relative_to(ROOT).as_posix() for package in ("gspn_dit", "fid") for path in (ROOT / package).rglob("*.py")
    ]
    assert set(modules) <= set(names)
    inside = {name.rsplit("/", 1)[1] for name in names if name.startswith("gspn_dit/")}
    assert {path.name for path in (ROOT / "cuda").glob("*.cu*")} <= inside


def test_the_checkpoint_in_the_package_draws(installation: Installation) -> None:
    installation.python("-c", DRAW)


def test_the_sdist_holds_the_sources_and_nothing_else(installation: Installation) -> None:
    with tarfile.open(installation.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tops = {name.partition("/")[0] for name in names} - {"", "PKG-INFO", "gspn_dit.egg-info"}
    files = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
    assert tops - {"tests"} == {"cuda", "fid", "gspn_dit", *files}
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "gspn_dit/ops/csrc").iterdir()]
    shipped = {path.relative_to(ROOT).as_posix() for path in SHIPPED}
    assert shipped and {*sources, *shipped, "cuda/common.cuh", "cuda/long_lines.cu"} <= names


def test_the_commands_are_installed(installation: Installation) -> None:
    for command in ("gspn-train", "gspn-sample", "gspn-fid"):
        assert f"usage: {command}" in run(
            str(installation.prefix / "bin" / command), "--help", cwd=installation.elsewhere
        )


def test_a_scan_away_from_the_checkout(installation: Installation) -> None:
    installation.python("-c", USE.replace("PREFIX", repr(str(installation.prefix))))


def test_the_doctor_finds_the_kernels(installation: Installation) -> None:
    of_cpu = installation.doctor()["cpu"]
    assert of_cpu["works"] is True
    if shutil.which("g++"):
        assert str(of_cpu["detail"]).startswith("compiled kernels")


def test_evaluation_has_a_command_line(installation: Installation) -> None:
    assert "--samples" in installation.python("-m", "fid", "--help")


def test_without_a_compiler_the_wheel_still_works(tmp_path: Path) -> None:
    installation = build_and_install(tmp_path, CC="/bin/false", CXX="/bin/false")
    installation.python("-c", USE.replace("PREFIX", repr(str(installation.prefix))))
    of_cpu = installation.doctor()["cpu"]
    assert of_cpu["works"] is True
    assert "install a C++ compiler" in str(of_cpu["detail"])

"""Who may import whom, what `import gspn_dit` costs, and that cuda/ does not hide NVIDIA's package of that name."""

from __future__ import annotations

import ast
import importlib.machinery
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gspn_dit

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "gspn_dit"
HEAVY = {"accelerate", "cupy", "datasets", "diffusers", "matplotlib", "sklearn", "torchvision", "torch_fidelity"}

FLOORS = (
    {"files", "ops", "rng"},
    {"errors"},
    {"checkpoint", "chosen", "class_names", "environment", "grid", "locks", "paths", "protocols"},
    {"hub", "sample_sets", "sampling_options", "text"},
    {"config", "processes"},
    {"data", "diffusion", "models"},
    {"importers", "model_card", "prepare", "tasks"},
    {"saved_pipeline", "timm", "training"},
    {"classifier", "highres", "pipeline", "text_sampler"},
    {"evaluate", "golden", "sample", "train"},
    {"doctor", "generate", "playground"},
    {"sweep"},
)
"""The rooms of gspn_dit, from the ground up: each imports rooms of lower floors alone, even lazily or for types. The
package itself only names the homes of what it makes public."""
OF_OPS = {*sys.stdlib_module_names, "torch", "numpy", "cupy", "gspn_dit"}
OF_FID = {"data", "environment", "errors", "files", "grid", "paths", "protocols"}  # files and images, never models
OF_TRAINED_EXTRACTOR = {"classifier"}
"""Of fid/trained.py alone, which opens a run of task classification as a feature extractor."""


OUR_MODULE = re.compile(r"(gspn_dit|fid|benchmarks|tests)(\.\w+)+")
"""A text that is nothing but this names a module, to import it or to start it: that counts as an import of it."""


def imported_names(path: Path, package: str, tree: ast.AST | None = None) -> Iterator[str]:
    """Yield the absolute name of everything a file imports; `from a import b` is yielded as a.b."""
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OUR_MODULE.fullmatch(node.value):
            yield node.value
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def parts_imported(path: Path, package: str) -> set[str]:
    """Return the parts of gspn_dit (its modules and subpackages) that a file imports, lazily or for types included."""
    parts = set()
    for name in imported_names(path, package):
        top, *rest = name.split(".")
        if top == "gspn_dit" and rest:
            # A public name of the package is an import of its home.
            parts.add(gspn_dit._HOMES.get(rest[0], f"gspn_dit.{rest[0]}").split(".")[1])
    return parts - {"__version__"}


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


def part_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def source_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize(
    "statement",
    [
        "import gspn_dit.models",
        "import gspn_dit.models.gspn as net",
        "from gspn_dit import models",
        "from gspn_dit import create_model",
        "from gspn_dit.models.gspn import GSPN",
        "from .. import models",
        "from ..models import gspn",
        "def later():\n    from gspn_dit import models",
        "if TYPE_CHECKING:\n    from gspn_dit.models import GSPN",
        "importlib.import_module('gspn_dit.models.gspn')",
        "HOMES = {'GSPN': 'gspn_dit.models.gspn'}",
    ],
)
def test_every_form_of_import_is_seen(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "scan.py"
    path.write_text(f"import os\n{statement}\n")
    assert parts_imported(path, "gspn_dit.ops") == {"models"}


def test_lazy_imports_are_told_from_others(tmp_path: Path) -> None:
    path = tmp_path / "scan.py"
    path.write_text(
        "try:\n    import cupy.cuda\nexcept ImportError:\n    pass\n"
        "def later():\n    import datasets\n"
        "if TYPE_CHECKING:\n    import torch\n"
    )
    assert imported_when_loaded(path, "gspn_dit.ops") == {"cupy"}


def test_every_import_goes_down_a_floor() -> None:
    floors = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for path in source_files(LIBRARY):
        room = part_of(path)
        if room == "__init__":
            continue
        assert room in floors, f"say in FLOORS on which floor {room} is"
        for imported in parts_imported(path, package_of(path)) - {room}:
            if floors.get(imported, len(FLOORS)) >= floors[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong


def import_graph() -> dict[str, set[str]]:
    """Return which of our modules each of them imports, lazily or by a text, too."""
    files = {module_name(path): path for top in ("gspn_dit", "fid", "benchmarks") for path in source_files(ROOT / top)}

    def known(name: str) -> str | None:
        """The module that has the imported name, or is it."""
        return name if name in files else name.rpartition(".")[0] if name.rpartition(".")[0] in files else None

    names = {module: imported_names(path, package_of(path)) for module, path in files.items()}
    return {module: {found for name in of_it if (found := known(name))} - {module} for module, of_it in names.items()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return what lies on a circle: what is left when modules that import nothing that is left are taken away."""
    left = {module: set(imported) for module, imported in graph.items()}
    while done := {module for module, imported in left.items() if not imported & left.keys()}:
        left = {module: imported for module, imported in left.items() if module not in done}
    while done := left.keys() - set().union(*left.values()):  # these lead to a circle, but are on none
        left = {module: imported for module, imported in left.items() if module not in done}
    return sorted(left)


def test_nothing_imports_itself_round_a_circle() -> None:
    graph = import_graph()
    assert {"gspn_dit.training.loop", "fid.evaluation", "benchmarks.scan"} <= graph.keys()
    assert "gspn_dit.training.state" in graph["gspn_dit.training.loop"]
    assert "gspn_dit.pipeline" in graph["gspn_dit"]  # named by a text
    assert circles(graph) == []


def test_circles_are_found() -> None:
    graph = {"top": {"a"}, "a": {"b", "leaf"}, "b": {"c"}, "c": {"a"}, "leaf": set(), "other": {"leaf"}}
    assert circles(graph) == ["a", "b", "c"]
    assert circles({**graph, "c": {"leaf"}}) == []


def test_evaluation_never_imports_models() -> None:
    allowed = {"trained.py": OF_TRAINED_EXTRACTOR}
    wrong = [
        f"{path.relative_to(ROOT)} imports {', '.join(sorted(bad))}"
        for path in source_files(ROOT / "fid")
        if (bad := parts_imported(path, package_of(path)) - OF_FID - allowed.get(path.name, set()))
    ]
    assert not wrong


def test_the_library_imports_neither_evaluation_nor_scripts() -> None:
    """But for the command line of training, which hands the trainer the distance that it watches."""
    outside = {"fid", "train", "sample", "benchmarks", "tests"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in source_files(LIBRARY)
        if part_of(path) != "sweep"  # the top floor, which draws and scores
        for name in imported_names(path, package_of(path))
        if name.split(".")[0] in outside and path != LIBRARY / "train.py"
    ]
    assert not wrong


def test_ops_imports_torch_and_numpy_alone() -> None:
    imported = {
        name.split(".")[0] for path in source_files(LIBRARY / "ops") for name in imported_names(path, package_of(path))
    }
    assert imported <= OF_OPS


def imported_when_loaded(path: Path, package: str) -> set[str]:
    """Return the top-level packages that loading a file imports: imports in functions and for types do not count."""

    class Lazy(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST:
            return ast.Pass() if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    tree = Lazy().visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name.split(".")[0] for name in imported_names(path, package, tree)}


def test_cupy_is_imported_lazily() -> None:
    assert not [str(path) for path in source_files(LIBRARY) if "cupy" in imported_when_loaded(path, package_of(path))]


def test_the_command_lines_import_lazily() -> None:
    """Bad arguments and --help are answered before torch and the rest are loaded."""
    names = ("train.py", "sample.py", "fid/cli.py", "gspn_dit/generate.py", "gspn_dit/sample.py", "gspn_dit/train.py")
    scripts = [ROOT / name for name in names]
    for path in scripts:
        assert not imported_when_loaded(path, package_of(path)) & {*HEAVY, "torch"}, path


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_importing_the_package_costs_next_to_nothing() -> None:
    """0.3 s of processor time at most (a busy machine's wall clock says nothing), and nothing heavy comes along."""
    code = """
import json, sys, time
start = time.process_time()
import gspn_dit
seconds = time.process_time() - start
print(json.dumps([seconds, gspn_dit.__file__, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    runs = [json.loads(run_python(code)) for _ in range(3)]
    assert statistics.median(seconds for seconds, _, _ in runs) <= 0.3
    for _, file, modules in runs:
        assert Path(file) == LIBRARY / "__init__.py"
        assert not set(modules) & {*HEAVY, "torch"}


def test_importing_the_scan_brings_torch_alone() -> None:
    code = """
import json, sys
import gspn_dit
gspn_dit.gspn_scan
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    modules = json.loads(run_python(code))
    assert "torch" in modules
    assert not set(modules) & HEAVY


def test_an_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'gspn_dit' has no attribute 'gspn_scam'"):
        gspn_dit.gspn_scam  # noqa: B018


@pytest.mark.parametrize("name", ["cuda", "cupy"])
def test_the_checkout_hides_no_package_of_nvidia_or_cupy(name: str) -> None:
    """With the checkout first on the path, `cuda` stays a namespace that NVIDIA's parts join, and cupy the real one."""
    assert not (ROOT / "cuda" / "__init__.py").exists()
    spec = importlib.machinery.PathFinder.find_spec(name, [str(ROOT), *sys.path])
    alone = importlib.machinery.PathFinder.find_spec(name, [p for p in sys.path if p and Path(p).resolve() != ROOT])
    if alone is None:
        assert spec is None or spec.origin is None
        return
    assert spec is not None
    assert spec.origin == alone.origin
    assert set(alone.submodule_search_locations or ()) <= set(spec.submodule_search_locations or ())

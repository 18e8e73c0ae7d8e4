"""Build steps that pyproject.toml cannot express; all metadata lives there.

The CPU kernels are a plain shared library, built where a C++ compiler is found and left out where none is. The CUDA
sources travel in a wheel as `gspn_dit/ops/cuda_src`.
"""

import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SOURCES = Path("gspn_dit/ops/csrc")
# Contraction is off: a compiler that fuses products and sums as it likes rounds one line of code in two ways, and
# results would depend on where blocks of channels end. The kernels fuse by `multiply_add`.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "amx": AMX}
SETS = list(ISA_FLAGS) if X86 else ["baseline"]
KERNELS = [
    *("tasks", "scan", "projected"),
    *(f"projected_{name}" for name in SETS),
    *(f"kernels_{name}" for name in SETS if name != "amx"),  # matrix products are in the projected scan alone
]


class BuildKernels(build_ext):
    """Compile each instruction set with its own flags, side by side."""

    def build_extension(self, ext):
        macros, sources = [("GSPN_X86", None)] if X86 else [], list(ext.sources)
        if X86 and self.takes(AMX):
            macros.append(("GSPN_AMX", None))
        else:
            sources = [source for source in sources if not source.endswith("_amx.cpp")]

        def compile_one(source):
            flags = FLAGS + ISA_FLAGS.get(Path(source).stem.rpartition("_")[2], [])
            return self.compiler.compile(
                [source], output_dir=self.build_temp, macros=macros, extra_postargs=flags, depends=ext.depends
            )

        with ThreadPoolExecutor() as pool:
            objects = [path for paths in pool.map(compile_one, sources) for path in paths]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=ext.libraries, target_lang="c++"
        )

    def takes(self, flags):
        """Say whether the compiler knows flags that are newer than some compilers in use."""
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        try:
            self.compiler.compile([str(probe)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            return False
        return True


class BuildPy(build_py):
    """Copy the CUDA sources into the package that is built; a source checkout reads them where they are."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        target = Path(self.build_lib) / "gspn_dit" / "ops" / "cuda_src"
        for source in sorted(path for path in Path("cuda").glob("*") if path.suffix in (".cu", ".cuh", ".h")):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / source.name)


setup(
    ext_modules=[
        Extension(
            "gspn_dit.ops._cpu_scan",
            sources=[str(SOURCES / f"{name}.cpp") for name in KERNELS],
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            libraries=["pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPy},
)

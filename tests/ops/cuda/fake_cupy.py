"""CuPy without a GPU, made from the CuPy that is installed: its names and signatures, with values that tests give.

Code that asks for what CuPy does not have fails as it would on a machine with a GPU: an unknown attribute is an
AttributeError, an unknown key of `Device.attributes` a KeyError, a wrong argument a TypeError.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

ATTRIBUTES = {
    "cudaDevAttrMaxSharedMemoryPerBlockOptin": 232_448,
    "cudaDevAttrMaxSharedMemoryPerMultiprocessor": 233_472,
    "cudaDevAttrMaxBlocksPerMultiprocessor": 32,
    "cudaDevAttrMaxRegistersPerMultiprocessor": 65_536,
    "cudaDevAttrMultiProcessorCount": 132,
    "cudaDevAttrMemoryClockRate": 2_619_000,
    "cudaDevAttrGlobalMemoryBusWidth": 5120,
    "cudaDevAttrClockRate": 1_980_000,
}
"""Of an H100 SXM, clocks in kHz; every other attribute that CuPy names is 0."""


def signature_of(real: Any) -> inspect.Signature | None:
    """Return the signature of a function, method or class of CuPy, which compiled ones state in their docstring.

    Where a docstring states two, the second is the narrower one. None where neither Python nor the docstring says.
    """
    try:
        return inspect.signature(real)
    except (TypeError, ValueError):
        pass
    name = getattr(real, "__name__", "")
    stated = re.findall(rf"^(?:\w+\.)?{name}\((.*)\)", (real.__doc__ or "").replace("\\", ""), re.MULTILINE)
    if not stated:
        return None
    arguments = [argument.strip() for argument in stated[-1].split(",")]
    # "str code=None" is how Cython states a typed argument; some are annotated, too.
    untyped = (re.sub(r"^\w+ (?=\w)|:[^=]*", "", argument) for argument in arguments if argument not in ("self", ""))
    plain = ", ".join(untyped)
    return inspect.signature(eval(f"lambda {plain}: None"))


class Strict:
    """Stands in for an object of CuPy: has the names that it has and no others, and takes the arguments it takes."""

    def __init__(self, real: Any, call: Callable[..., Any] | None = None, /, **values: Any) -> None:
        """`call` is what calling it does, `values` are its attributes; a name that CuPy does not have is refused."""
        vars(self).update(_real=real, _call=call, _values={})
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)  # AttributeError where CuPy has no such name
        if name in self._values:
            return self._values[name]
        if isinstance(real, (int, str)) or name.startswith("__"):
            return real
        raise AssertionError(f"CuPy has {name!r}, but this fake does not: add it")

    def __setattr__(self, name: str, value: Any) -> None:
        real = getattr(self._real, name)
        is_function = inspect.isfunction(value) or inspect.ismethod(value)
        self._values[name] = Strict(real, value) if is_function else value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        assert self._call is not None, f"this fake of {self._real} cannot be called"
        signature = signature_of(self._real)
        assert signature is not None, f"nothing says how {self._real} is called"
        signature.bind(*arguments, **keywords)
        return self._call(*arguments, **keywords)

    def __enter__(self) -> Strict:
        assert hasattr(self._real, "__enter__"), self._real
        return self

    def __exit__(self, *error: object) -> None: ...


class FakeKernel(Strict):
    """A `cupy.RawKernel` that notes its launches."""

    def __init__(self, real_cupy: Any, name: str, launches: list[tuple[str, Any, Any, np.ndarray, int]]) -> None:
        def launch(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            (argument,) = args
            launches.append((name, grid, block, argument, shared_mem))

        function = Strict(real_cupy.cuda.function.Function, None, ptr=hash(name))
        sizes = {"shared_size_bytes": 1024, "max_dynamic_shared_size_bytes": 0}
        super().__init__(real_cupy.RawKernel, None, kernel=function, **sizes)
        vars(self)["_launch"] = Strict(real_cupy.RawKernel.__call__, launch)

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        self._launch(*arguments, **keywords)


class FakeCupy(Strict):
    """The module `cupy` as far as the binding uses it; `launches` lists what was launched."""

    def __init__(self, real: Any, runtime: int = 13000, nvrtc_problem: str | None = None) -> None:
        vars(self)["launches"] = []
        real_runtime = real.cuda.runtime

        def get_version() -> tuple[int, int]:
            if nvrtc_problem is not None:
                raise RuntimeError(nvrtc_problem)
            return 13, 0

        def device_attribute(attrib: int, device_id: int) -> int:
            return {getattr(real_runtime, name): value for name, value in ATTRIBUTES.items()}[attrib]

        def device(device: int | None = None) -> Strict:
            names = (name for name in dir(real_runtime) if name.startswith("cudaDevAttr"))
            attributes = {name.removeprefix("cudaDevAttr"): ATTRIBUTES.get(name, 0) for name in names}
            return Strict(real.cuda.Device, None, attributes=attributes)

        def external_stream(ptr: int, device_id: int = -1) -> Strict:
            return Strict(real.cuda.ExternalStream)

        def module(code: str | None = None, *, options: tuple[str, ...] = (), backend: str = "nvrtc") -> Strict:
            assert isinstance(code, str) and isinstance(options, tuple)
            return Strict(
                real.RawModule, None, get_function=lambda name: FakeKernel(real, name, vars(self)["launches"])
            )

        super().__init__(
            real,
            None,
            RawModule=Strict(real.RawModule, module),
            cuda=Strict(
                real.cuda,
                None,
                runtime=Strict(
                    real_runtime, None, runtimeGetVersion=lambda: runtime, deviceGetAttribute=device_attribute
                ),
                nvrtc=Strict(real.cuda.nvrtc, None, getVersion=get_version),
                Device=Strict(real.cuda.Device, device),
                ExternalStream=Strict(real.cuda.ExternalStream, external_stream),
                Stream=Strict(real.cuda.Stream, None, from_external=lambda obj: external_stream(7)),
            ),
        )


class FakeDriver(Strict):
    """NVIDIA's bindings of the driver as far as clusters need them; `asked` lists what it was asked about."""

    def __init__(self, real: Any, clusters: int, error: str = "CUDA_SUCCESS") -> None:
        vars(self)["asked"] = []
        result = real.CUresult

        def occupancy(func: Any, config: Strict) -> tuple[Any, int]:
            vars(self)["asked"].append((func, config))
            return getattr(result, error), clusters

        super().__init__(
            real,
            None,
            CUresult=result,
            CUfunction=int,
            CUlaunchConfig=partial(Strict, real.CUlaunchConfig()),
            cuOccupancyMaxActiveClusters=occupancy,
        )

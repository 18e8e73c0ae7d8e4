"""PTX to C++: a function per kernel, a statement per instruction, for the runtime in gspn_dit/ops/cuda/host."""

from __future__ import annotations

from gspn_dit.ops.cuda.host.ptx import arithmetic, memory
from gspn_dit.ops.cuda.host.ptx.grammar import Instruction, Kernel, Label, Module, Variable
from gspn_dit.ops.cuda.host.ptx.op import Emitter, Op, cpp_type, label_name

FIRST_SHARED_BYTE = 1024  # FIRST in memory.h
EMITTERS: dict[str, Emitter] = {**arithmetic.EMITTERS, **memory.EMITTERS}
"""How each instruction is written, by the first word of its opcode."""


def _statement(instruction: Instruction, symbols: dict[str, str]) -> str:
    op = Op(instruction, symbols)
    if op.name not in EMITTERS:
        raise op.refuse("an instruction that is not known")
    text = EMITTERS[op.name](op)
    if op.left:
        raise op.refuse(f"modifiers that are not known ({', '.join(op.left)})")
    if instruction.guard is not None:
        text = f"if ({op.value(instruction.guard, 'pred')}) {{ {text} }}"
    return text


def place_shared(variables: list[Variable]) -> tuple[dict[str, int], int]:
    """Offsets in the shared window, static variables first, and the bytes that those take."""
    places, end = {}, FIRST_SHARED_BYTE
    for variable in sorted(variables, key=lambda variable: variable.size == 0):
        end = -(-end // variable.align) * variable.align
        places[variable.name] = end
        end += variable.size
    return places, end - FIRST_SHARED_BYTE


def place_parameters(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Offsets of a kernel's parameters in the memory that a launch passes, and its length."""
    places, end = {}, 0
    for parameter in kernel.parameters:
        end = -(-end // parameter.align) * parameter.align
        places[parameter.name] = end
        end += parameter.size
    return places, end


def _constant(variable: Variable) -> str:
    item = f"uint{8 * variable.item}_t"
    values = ", ".join(f"static_cast<{item}>({value}ll)" for value in variable.values)
    return f"alignas({max(variable.align, 8)}) {item} {variable.name}[{variable.size // variable.item}] = {{{values}}};"


def _kernel(kernel: Kernel, module: Module) -> str:
    shared = [v for v in (*module.variables, *kernel.variables) if v.space == "shared"]
    shared_places, _ = place_shared(shared)
    parameter_places, _ = place_parameters(kernel)
    symbols = {name: f"{place}u" for name, place in shared_places.items()}
    symbols |= {n: f"reinterpret_cast<uint64_t>(ptx::parameters) + {at}" for n, at in parameter_places.items()}
    memory = [v for v in (*module.variables, *kernel.variables) if v.space != "shared"]
    symbols |= {v.name: f"reinterpret_cast<uint64_t>({v.name})" for v in memory}
    lines = [f"void {kernel.name}(const void*) {{"]
    for register in kernel.registers:
        type_ = cpp_type(register.type)
        lines.append(f"{type_} {register.name} = ptx::undefined<{type_}>();")
    lines += [f"alignas({v.align}) unsigned char {v.name}[{v.size}];" for v in kernel.variables if v.space == "local"]
    for statement in kernel.statements:
        if isinstance(statement, Label):
            lines.append(f"{label_name(statement.name)}:;")
        else:
            lines.append(_statement(statement, symbols))
    return "\n".join([*lines, "}"])


def _launcher(module: Module) -> str:
    """What the harness calls, as in kernels.cpp."""
    cases = []
    for kernel in module.kernels:
        _, static = place_shared([v for v in (*module.variables, *kernel.variables) if v.space == "shared"])
        _, parameters = place_parameters(kernel)
        cases.append(
            f'if (std::strcmp(name, "{kernel.name}") == 0) '
            f"return ptx::launch({{{kernel.name}, {kernel.cluster}, {kernel.threads}, {static}, {parameters}}}, "
            "grid, block, shared_bytes, problem);"
        )
    head = 'extern "C" int host_cuda_launch(const char* name, const unsigned* grid, const unsigned* block, '
    return "\n".join([head + "size_t shared_bytes, const void* problem) {", *cases, "return 1;", "}"])


def translate(module: Module) -> str:
    """Write a module as C++; raises PtxError for what is not known."""
    variables = [_constant(v) for v in module.variables if v.space in ("global", "const")]
    kernels = [_kernel(kernel, module) for kernel in module.kernels]
    text = ['#include "launch.h"', "namespace {", *variables, *kernels, "}", _launcher(module)]
    return "\n".join(text) + "\n"

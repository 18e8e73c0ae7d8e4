"""An instruction of PTX while it is translated to C++: its modifiers, operands and results."""

from __future__ import annotations

from collections.abc import Callable

from gspn_dit.ops.cuda.host.ptx.grammar import (
    BYTES,
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    PtxError,
    Register,
    Special,
    Symbol,
    Vector,
)

_SPECIAL = {
    **{f"%tid.{axis}": f"host_cuda::current->thread.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"host_cuda::current->block.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"host_cuda::block_size.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"host_cuda::grid_size.{axis}" for axis in "xyz"},
    "%laneid": "(host_cuda::current->linear % 32)",
    "%warpid": "(host_cuda::current->linear / 32)",
    "%cluster_ctarank": "host_cuda::current->rank",
    "%cluster_ctaid.x": "host_cuda::current->rank",
    "%cluster_nctarank": "host_cuda::blocks_of_cluster()",
    "%cluster_nctaid.x": "host_cuda::blocks_of_cluster()",
    "%clusterid.x": "(host_cuda::current->block.x / host_cuda::blocks_of_cluster())",
    "%nclusterid.x": "(host_cuda::grid_size.x / host_cuda::blocks_of_cluster())",
}
HALVES = {"f16": "ptx::Half", "bf16": "ptx::Brain", "f16x2": "ptx::Half", "bf16x2": "ptx::Brain"}


def is_float(type_: str) -> bool:
    """Whether values of the type are floats in C++; those of 16 bits are words there."""
    return type_ in ("f32", "f64")


def cpp_type(type_: str) -> str:
    """The type of C++ for one of PTX."""
    if type_ == "pred":
        return "bool"
    if is_float(type_):
        return "float" if type_ == "f32" else "double"
    return f"{'' if type_[0] == 's' else 'u'}int{8 * BYTES[type_]}_t"


class Op:
    """One instruction while it is translated: hands out its modifiers and operands."""

    def __init__(self, instruction: Instruction, symbols: dict[str, str]) -> None:
        self.instruction, self.symbols = instruction, symbols
        self.name, *self.left = instruction.opcode.split(".")
        self.operands = instruction.operands

    @property
    def line(self) -> int:
        """The instruction's line, which the runtime names where it fails."""
        return self.instruction.line

    def refuse(self, why: str) -> PtxError:
        """An error about this instruction."""
        return self.instruction.refuse(why)

    def modifier(self, *options: str) -> str:
        """Take the first modifier that is one of the options; "" if none is."""
        found = next((word for word in self.left if word in options), "")
        if found:
            self.left.remove(found)
        return found

    def drop(self, *meaningless: str) -> None:
        """Take modifiers that change nothing here."""
        self.left = [word for word in self.left if word not in meaningless]

    def type(self) -> str:
        """Take the last modifier that is a type."""
        for word in reversed(self.left):
            if word in BYTES:
                self.left.reverse()
                self.left.remove(word)
                self.left.reverse()
                return word
        raise self.refuse("no type is known")

    def count(self, *numbers: int) -> None:
        """Refuse another number of operands."""
        if len(self.operands) not in numbers:
            raise self.refuse(f"{len(self.operands)} operands")

    def value(self, operand: Operand | int, type_: str) -> str:
        """An expression of the type's C++ type for an operand, or for the operand of that number."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        wanted = cpp_type(type_)
        if isinstance(operand, Register):
            return self._register_value(operand, type_)
        if isinstance(operand, Negated) and type_ == "pred":
            return f"(!{operand.register.name})"
        if isinstance(operand, Immediate):
            return self._immediate_value(operand.text, type_)
        if isinstance(operand, Special) and operand.name in _SPECIAL:
            return f"static_cast<{wanted}>({_SPECIAL[operand.name]})"
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return f"static_cast<{wanted}>({self.symbols[operand.name]})"
        raise self.refuse(f"an operand that is not known ({operand})")

    def _register_value(self, register: Register, type_: str) -> str:
        if type_ == "pred" or register.type == "pred":
            if type_ != register.type:
                raise self.refuse(f"{register.name} is {register.type}, not {type_}")
            return register.name
        has, wanted = BYTES[register.type], BYTES[type_]
        if has < wanted or (has != wanted and (is_float(type_) or is_float(register.type))):
            raise self.refuse(f"{register.name} is {register.type}, not {type_}")
        if is_float(type_) != is_float(register.type):
            return f"ptx::bits<{cpp_type(type_)}>({register.name})"
        return f"static_cast<{cpp_type(type_)}>({register.name})"

    def _immediate_value(self, text: str, type_: str) -> str:
        sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
        wanted = cpp_type(type_)
        if digits[:2].lower() in ("0f", "0d") and len(digits) > 2:
            kind = "float" if digits[1] in "fF" else "double"
            word = f"0x{digits[2:]}" + ("u" if kind == "float" else "ull")
            value = f"{sign}ptx::bits<{kind}>({word})"
            if is_float(type_):
                return f"static_cast<{wanted}>({value})"
            return f"ptx::bits<{wanted}>({value})"
        if type_ == "pred":
            return "true" if int(digits, 0) else "false"
        return f"static_cast<{wanted}>({sign}{digits.rstrip('U')}{'' if '.' in digits else 'ull'})"

    def set(self, operand: Operand | int, value: str, type_: str) -> str:
        """A statement that puts a value of the type's C++ type into a register, or drops it for "_"."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if operand == Symbol("_"):
            return f"(void)({value});"
        if not isinstance(operand, Register):
            raise self.refuse("the result is no register")
        has, wanted = BYTES[operand.type], BYTES[type_]
        if (operand.type == "pred") != (type_ == "pred") or has < wanted:
            raise self.refuse(f"{operand.name} is {operand.type}, not {type_}")
        if is_float(type_) == is_float(operand.type):
            return f"{operand.name} = static_cast<{cpp_type(operand.type)}>({value});"
        if has != wanted:
            raise self.refuse(f"{operand.name} is {operand.type}, not {type_}")
        return f"{operand.name} = ptx::bits<{cpp_type(operand.type)}>({value});"

    def items(self, operand: Operand | int) -> tuple[Operand, ...]:
        """The parts of a vector, or the operand alone."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        return operand.items if isinstance(operand, Vector) else (operand,)

    def pair(self, operand: Operand | int) -> tuple[Operand, Operand | None]:
        """Both results of a|b, or one and None."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    def address(self, operand: Operand | int, in_window: bool) -> str:
        """The address that [base + offset] names; those of the shared window have 32 bits."""
        operand = self.operands[operand] if isinstance(operand, int) else operand
        if not isinstance(operand, Address):
            raise self.refuse("no address")
        base, type_ = operand.base, "u64"
        if isinstance(base, Register):
            type_ = "u32" if BYTES[base.type] == 4 else "u64"
        value = f"{self.value(base, type_)} + {operand.offset}"
        return f"static_cast<uint32_t>({value})" if in_window else f"static_cast<uint64_t>({value})"


Emitter = Callable[[Op], str]


class Emitters(dict[str, Emitter]):
    """How instructions are written, by the first word of their opcodes."""

    def enter(self, *names: str) -> Callable[[Emitter], Emitter]:
        """Return a decorator that enters a function under these names."""

        def decorate(function: Emitter) -> Emitter:
            self.update(dict.fromkeys(names, function))
            return function

        return decorate


def label_name(name: str) -> str:
    """A label of C++."""
    return name.replace("$", "label_")

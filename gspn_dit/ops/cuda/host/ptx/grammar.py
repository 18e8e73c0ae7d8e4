"""The grammar of PTX: text to modules of kernels, kernels of labels and instructions (PTX ISA 8 and 9, chapter 4).

Names are resolved here: a register declared in an inner scope gets a name of its own, so that a kernel is one flat list
of statements. What the grammar does not know is an error that shows the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


class PtxError(ValueError):
    """PTX that is not understood; the message has the line's number and text."""


@dataclass(frozen=True)
class Register:
    """A register: its unique name, and its type such as "b32" or "pred"."""

    name: str
    type: str


@dataclass(frozen=True)
class Special:
    """A special register, such as "%tid.x"."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number as it is written."""

    text: str


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter or label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], in bytes."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, …}."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """a|b: two results of one instruction."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """!p."""

    register: Register


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair | Negated


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` says whether it runs."""

    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | Negated | None = None

    def refuse(self, why: str) -> PtxError:
        """An error about this instruction."""
        return PtxError(f"line {self.line}: {why}: {self.text}")


@dataclass(frozen=True)
class Label:
    """A place that branches name."""

    name: str


@dataclass(frozen=True)
class Variable:
    """A variable of a state space or a kernel's parameter; 0 bytes for one whose size a launch decides."""

    name: str
    space: str
    align: int
    size: int
    values: tuple[int, ...] = ()
    item: int = 1
    """Bytes of each of `values`."""


@dataclass
class Kernel:
    """One entry function."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    statements: list[Label | Instruction] = field(default_factory=list)
    cluster: int = 1
    """Blocks of a cluster."""
    threads: int = 1024
    """Most threads of a block."""


@dataclass
class Module:
    """One translation unit."""

    lines: list[str]
    kernels: list[Kernel] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)


_TOKENS = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<number>-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d+|\d+U?))
    |(?P<name>[.%$A-Za-z_](?:[\w$.]|::)*)
    |(?P<string>"[^"]*")
    |(?P<mark>[][(){}<>,;:|+=@!*-])""",
    re.VERBOSE | re.DOTALL,
)
BYTES = {"pred": 1, **{kind + str(bits): bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}, "f32": 4, "f64": 8}
BYTES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4}
_IGNORED_PRAGMAS = {".pragma", ".file", ".loc", ".section"}


@dataclass(frozen=True)
class _Token:
    text: str
    line: int
    is_name: bool


def _tokens(text: str) -> list[_Token]:
    tokens, at, line = [], 0, 1
    while at < len(text):
        match = _TOKENS.match(text, at)
        if match is None:
            raise PtxError(f"line {line}: not PTX: {text[at : at + 20]!r}")
        if match.lastgroup != "space":
            tokens.append(_Token(match[0], line, match.lastgroup == "name"))
        line += match[0].count("\n")
        at = match.end()
    return tokens


def parse(text: str) -> Module:
    """Parse a module as NVRTC writes it; raises PtxError with line and text for what the grammar does not know."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        self.result = Module(text.splitlines())
        self.tokens = _tokens(text)
        self.at = 0
        self.scopes: list[dict[str, Operand]] = [{}]
        self.families: list[tuple[str, str, int]] = []  # prefix, type and number of %r<N>
        self.kernel = Kernel("")

    # Tokens.

    @property
    def next(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def refuse(self, why: str) -> PtxError:
        line = self.tokens[min(self.at, len(self.tokens) - 1)].line
        return PtxError(f"line {line}: {why}: {self.result.lines[line - 1].strip()}")

    def take(self, wanted: str | None = None) -> str:
        if self.at == len(self.tokens) or (wanted is not None and self.next != wanted):
            raise self.refuse(f"expected {wanted or 'more'}")
        self.at += 1
        return self.tokens[self.at - 1].text

    def accept(self, wanted: str) -> bool:
        if self.next != wanted:
            return False
        self.at += 1
        return True

    def skip_past(self, end: str) -> None:
        while self.take() != end:
            pass

    def number(self) -> int:
        negative = self.accept("-")
        text = self.take()
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            self.at -= 1
            raise self.refuse("expected a number") from None
        return -value if negative else value

    # Modules.

    def module(self) -> Module:
        while self.next:
            word = self.take()
            if word in (".version", ".target", ".address_size"):
                line = self.tokens[self.at - 1].line
                while self.next and self.tokens[self.at].line == line:
                    self.take()
            elif word in (".visible", ".weak", ".extern"):
                pass
            elif word == ".entry":
                self.entry()
            elif word in (".global", ".const", ".shared"):
                self.variable(word[1:], self.result.variables)
            elif word in _IGNORED_PRAGMAS:
                self.skip_directive(word)
            else:
                self.at -= 1
                raise self.refuse("not known in a module")
        return self.result

    def skip_directive(self, word: str) -> None:
        if word == ".pragma":
            self.skip_past(";")
        else:
            line = self.tokens[self.at - 1].line
            while self.next and self.tokens[self.at].line == line:
                self.take()

    def variable(self, space: str, variables: list[Variable]) -> None:
        """What follows the state space: [.align n] .type name[size] [= values];."""
        align, type_ = 0, ""
        while self.next.startswith("."):
            word = self.take()[1:]
            if word == "align":
                align = self.number()
            elif word in BYTES:
                type_ = word
            elif word not in ("ptr", "global", "shared"):
                self.at -= 1
                raise self.refuse("not known of a variable")
        if not type_:
            raise self.refuse("a variable without a type")
        name, item, count = self.take(), BYTES[type_], 1
        if self.accept("["):
            count = 0 if self.next == "]" else self.number()
            self.take("]")
        values: tuple[int, ...] = ()
        if self.accept("="):
            values = self.values()
        variables.append(Variable(name, space, align or item, count * item, values, item))
        self.scopes[-1][name] = Symbol(name)
        if space != "param":
            self.take(";")

    def values(self) -> tuple[int, ...]:
        if not self.accept("{"):
            return (self.number(),)
        values = [self.number()]
        while self.accept(","):
            values.append(self.number())
        self.take("}")
        return tuple(values)

    def entry(self) -> None:
        self.kernel = Kernel(self.take())
        self.families = []
        self.scopes.append({})
        if self.accept("("):
            while not self.accept(")"):
                self.take(".param")
                self.variable("param", self.kernel.parameters)
                self.accept(",")
        while not self.accept("{"):
            self.performance_directive()
        self.body()
        self.scopes.pop()
        self.result.kernels.append(self.kernel)

    def performance_directive(self) -> None:
        word = self.take()
        known = (".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".explicitcluster", ".reqnctapercluster")
        if word not in known:
            self.at -= 1
            raise self.refuse("not known of a kernel")
        product = 1
        while self.next[:1].isdigit():
            product *= self.number()
            self.accept(",")
        if word == ".reqnctapercluster":
            self.kernel.cluster = product
        elif word in (".maxntid", ".reqntid"):
            self.kernel.threads = product

    # Bodies.

    def body(self) -> None:
        """Statements up to the brace that closes the scope."""
        while not self.accept("}"):
            word = self.next
            if self.accept("{"):
                self.scopes.append({})
                self.body()
                self.scopes.pop()
            elif self.accept(".reg"):
                self.declare_registers()
            elif word in (".shared", ".local"):
                self.take()
                self.variable(word[1:], self.kernel.variables)
            elif word in _IGNORED_PRAGMAS:
                self.skip_directive(self.take())
            elif self.at + 1 < len(self.tokens) and self.tokens[self.at + 1].text == ":":
                self.kernel.statements.append(Label(self.take()))
                self.take(":")
            else:
                self.instruction()

    def declare_registers(self) -> None:
        type_ = self.take()[1:]
        if type_ not in BYTES:
            raise self.refuse("registers of an unknown type")
        while True:
            name = self.take()
            if self.accept("<"):
                self.families.append((name, type_, self.number()))
                self.take(">")
            else:
                self.scopes[-1][name] = self.new_register(name, type_)
            if self.accept(";"):
                return
            self.take(",")

    def new_register(self, name: str, type_: str) -> Register:
        """A register whose name is unique in the kernel and one of C++."""
        unique = re.sub(r"\W", "_", name.lstrip("%"))
        register = Register(f"{unique}_{len(self.kernel.registers)}", type_)
        self.kernel.registers.append(register)
        return register

    def instruction(self) -> None:
        begin = self.at
        guard: Operand | None = None
        if self.accept("@"):
            guard = self.operand()
        if not isinstance(guard, Register | Negated | None):
            raise self.refuse("a guard is a predicate")
        if not self.tokens[self.at].is_name or self.next.startswith((".", "%", "$")):
            raise self.refuse("not an instruction")
        opcode = self.take()
        operands: list[Operand] = []
        while not self.accept(";"):
            if operands:
                self.take(",")
            operands.append(self.operand())
        first = self.tokens[begin]
        text = " ".join(token.text for token in self.tokens[begin : self.at])
        self.kernel.statements.append(Instruction(first.line, text, opcode, tuple(operands), guard))

    def operand(self) -> Operand:
        found = self.simple_operand()
        return Pair(found, self.simple_operand()) if self.accept("|") else found

    def simple_operand(self) -> Operand:
        compound: dict[str, Callable[[], Operand]] = {"[": self.address, "{": self.vector, "!": self.negated}
        if self.next in compound:
            return compound[self.take()]()
        is_name, word = self.tokens[self.at].is_name, self.next
        if not is_name:
            if not re.match(r"-|\d", word):
                raise self.refuse("expected an operand")
            return Immediate(("-" if self.accept("-") else "") + self.take())
        return self.named(self.take())

    def named(self, name: str) -> Operand:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        for prefix, type_, count in self.families:
            number = name.removeprefix(prefix)
            if name.startswith(prefix) and number.isdigit() and int(number) < count:
                self.scopes[1][name] = self.new_register(name, type_)
                return self.scopes[1][name]
        if name.startswith("%"):
            return Special(name)
        return Symbol(name)

    def address(self) -> Operand:
        base, offset = self.simple_operand(), 0
        if self.accept("+") or self.next.startswith("-"):
            offset = self.number()
        self.take("]")
        return Address(base, offset)

    def vector(self) -> Operand:
        items = [self.simple_operand()]
        while self.accept(","):
            items.append(self.simple_operand())
        self.take("}")
        return Vector(tuple(items))

    def negated(self) -> Operand:
        register = self.simple_operand()
        if not isinstance(register, Register):
            raise self.refuse("only a predicate is negated")
        return Negated(register)

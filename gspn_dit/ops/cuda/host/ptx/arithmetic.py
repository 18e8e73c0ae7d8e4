"""Instructions that compute: arithmetic, logic, comparisons, conversions (PTX ISA, chapters 9.7.1 to 9.7.8)."""

from __future__ import annotations

from gspn_dit.ops.cuda.host.ptx.grammar import BYTES, Vector
from gspn_dit.ops.cuda.host.ptx.op import HALVES, Emitters, Op, cpp_type, is_float

EMITTERS = Emitters()
_DIRECTED = {"rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}
_TO_INTEGER = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
_FLOATS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "fma": "std::fma({0}, {1}, {2})",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "min": "ptx::smaller({0}, {1})",
    "max": "ptx::larger({0}, {1})",
    "rcp": "1 / {0}",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1 / std::sqrt({0})",
    "ex2": "std::exp2({0})",
    "lg2": "std::log2({0})",
}
_INTEGERS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "neg": "-{0}",
    "abs": "std::abs({0})",
    "min": "std::min({0}, {1})",
    "max": "std::max({0}, {1})",
    "div": "ptx::divide({0}, {1})",
    "rem": "ptx::remainder({0}, {1})",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _directed(mode: str, expression: str) -> str:
    """An expression under a rounding mode; to nearest is the host's own."""
    return f"ptx::rounded<{_DIRECTED[mode]}>([&] {{ return {expression}; }})" if mode in _DIRECTED else expression


def _float_arithmetic(op: Op, type_: str) -> str:
    flushes = bool(op.modifier("ftz"))
    mode, saturates = op.modifier("rn", *_DIRECTED), bool(op.modifier("sat"))
    approximately = op.modifier("approx", "full")
    nans = bool(op.modifier("NaN")) and op.name in ("min", "max")
    op.count(1 + _FLOATS[op.name].count("{"))
    values = [op.value(i, type_) for i in range(1, len(op.operands))]
    values = [f"ptx::flush({value})" for value in values] if flushes else values
    expression = _FLOATS[op.name].format(*values)
    if op.name == "div" and approximately:
        expression = f"ptx::divide_approximately({', '.join(values)})"
    expression = _directed(mode, expression)
    if nans:
        expression = f"ptx::ordered({', '.join(values)}) ? {expression} : NAN"
    if flushes:
        expression = f"ptx::flush({expression})"
    return op.set(0, f"ptx::saturate({expression})" if saturates else expression, type_)


def _half_arithmetic(op: Op, type_: str) -> str:
    op.drop("rn")
    values = [op.value(i, type_) for i in range(1, len(op.operands))]
    names = "abc"[: len(values)]
    expression = _FLOATS[op.name].format(*names)
    parameters = ", ".join(f"double {name}" for name in names)
    function = f"[]({parameters}) {{ return {expression}; }}"
    word = cpp_type(type_)
    return op.set(0, f"ptx::by_halves<{HALVES[type_]}, {word}>({function}, {', '.join(values)})", type_)


@EMITTERS.enter(*_FLOATS, "rem")
def _arithmetic(op: Op) -> str:
    if op.name == "mul" and any(word in op.left for word in ("lo", "hi", "wide")):
        return _integer_product(op)
    type_ = op.type()
    if is_float(type_):
        return _float_arithmetic(op, type_)
    if type_ in HALVES:
        return _half_arithmetic(op, type_)
    if op.name not in _INTEGERS:
        raise op.refuse("not an instruction for integers")
    op.count(1 + _INTEGERS[op.name].count("{"))
    values = [op.value(i, type_) for i in range(1, len(op.operands))]
    wide = cpp_type(type_)
    return op.set(0, f"static_cast<{wide}>({_INTEGERS[op.name].format(*values)})", type_)


@EMITTERS.enter("mad")
def _integer_product(op: Op) -> str:
    """mul and mad, of which the low half, the high half, or all is kept."""
    part, type_ = op.modifier("lo", "hi", "wide"), op.type()
    op.count(4 if op.name == "mad" else 3)
    values = [op.value(i, type_) for i in (1, 2)]
    result = type_[0] + str(16 * BYTES[type_]) if part == "wide" else type_
    kind = cpp_type(result)
    product = f"static_cast<{kind}>({values[0]}) * static_cast<{kind}>({values[1]})"
    if part == "hi":
        product = f"ptx::multiply_high({', '.join(values)})"
    if op.name == "mad":
        product += f" + {op.value(3, result)}"
    return op.set(0, f"static_cast<{kind}>({product})", result)


@EMITTERS.enter("and", "or", "xor")
def _bitwise(op: Op) -> str:
    type_, sign = op.type(), {"and": "&", "or": "|", "xor": "^"}[op.name]
    op.count(3)
    return op.set(0, f"static_cast<{cpp_type(type_)}>({op.value(1, type_)} {sign} {op.value(2, type_)})", type_)


@EMITTERS.enter("not")
def _not(op: Op) -> str:
    type_ = op.type()
    return op.set(0, f"static_cast<{cpp_type(type_)}>({'!' if type_ == 'pred' else '~'}{op.value(1, type_)})", type_)


@EMITTERS.enter("shl", "shr")
def _shift(op: Op) -> str:
    type_ = op.type()
    function = "shift_left" if op.name == "shl" else "shift_right"
    return op.set(0, f"ptx::{function}<{cpp_type(type_)}>({op.value(1, type_)}, {op.value(2, 'u32')})", type_)


@EMITTERS.enter("shf")
def _funnel_shift(op: Op) -> str:
    left, clamps = op.modifier("l", "r") == "l", op.modifier("clamp", "wrap") == "clamp"
    type_ = op.type()
    values = ", ".join(op.value(i, "u32") for i in (1, 2, 3))
    return op.set(0, f"ptx::funnel({values}, {str(left).lower()}, {str(clamps).lower()})", type_)


_OF_BITS = {
    # The function, and the types of its values; "" is the instruction's own.
    "lop3": ("logic", ("u32", "u32", "u32", "u32")),
    "prmt": ("permute", ("u32", "u32", "u32")),
    "bfe": ("extract", ("", "u32", "u32")),
    "bfi": ("insert", ("", "", "u32", "u32")),
}


@EMITTERS.enter(*_OF_BITS)
def _pick_bits(op: Op) -> str:
    type_ = op.type()
    function, types = _OF_BITS[op.name]
    values = ", ".join(op.value(i, given or type_) for i, given in enumerate(types, 1))
    return op.set(0, f"ptx::{function}({values})", type_)


@EMITTERS.enter("popc", "clz", "brev")
def _count_bits(op: Op) -> str:
    type_ = op.type()
    function = {"popc": "std::popcount", "clz": "std::countl_zero", "brev": "ptx::reverse"}[op.name]
    return op.set(0, f"{function}({op.value(1, type_)})", type_ if op.name == "brev" else "b32")


def _comparison(name: str, a: str, b: str, type_: str) -> str:
    if not is_float(type_):
        name = _UNSIGNED_NAMES.get(name, name)
        return f"{a} {_COMPARISONS[name]} {b}"
    ordered = f"ptx::ordered({a}, {b})"
    if name in ("num", "nan"):
        return ordered if name == "num" else f"!{ordered}"
    if name[-1] == "u" and name[:-1] in _COMPARISONS:
        return f"!{ordered} || {a} {_COMPARISONS[name[:-1]]} {b}"
    return f"{ordered} && {a} {_COMPARISONS[name]} {b}"


@EMITTERS.enter("setp")
def _set_predicate(op: Op) -> str:
    names = (*_COMPARISONS, *_UNSIGNED_NAMES, *(f"{name}u" for name in _COMPARISONS), "num", "nan")
    name, joined = op.modifier(*names), op.modifier("and", "or", "xor")
    flushes, type_ = bool(op.modifier("ftz")), op.type()
    op.count(4 if joined else 3)
    if type_ in HALVES:
        raise op.refuse("comparisons of 16 bits are not known")
    a, b = (op.value(i, type_) for i in (1, 2))
    if flushes:
        a, b = f"ptx::flush({a})", f"ptx::flush({b})"
    sign = {"and": "&&", "or": "||", "xor": "!=", "": ""}[joined]
    third = f" {sign} {op.value(3, 'pred')}" if joined else ""
    true, false = op.pair(0)
    text = f"{{ const bool holds = {_comparison(name, a, b, type_)}; "
    text += op.set(true, f"holds{third}", "pred")
    if false is not None:
        text += f" {op.set(false, f'!holds{third}', 'pred')}"
    return text + " }"


@EMITTERS.enter("selp")
def _select(op: Op) -> str:
    type_ = op.type()
    return op.set(0, f"{op.value(3, 'pred')} ? {op.value(1, type_)} : {op.value(2, type_)}", type_)


@EMITTERS.enter("mov")
def _move(op: Op) -> str:
    type_ = op.type()
    op.count(2)
    to, source = op.operands
    if not isinstance(to, Vector) and not isinstance(source, Vector):
        return op.set(0, op.value(1, type_), type_)
    word = f"uint{8 * BYTES[type_]}_t"
    parts = op.items(to if isinstance(to, Vector) else source)
    width = 8 * BYTES[type_] // len(parts)
    part = f"b{width}"
    if isinstance(to, Vector):
        steps = [op.set(item, f"static_cast<uint{width}_t>(word >> {i * width})", part) for i, item in enumerate(parts)]
        return f"{{ const {word} word = {op.value(1, f'b{8 * BYTES[type_]}')}; {' '.join(steps)} }}"
    whole = " | ".join(f"static_cast<{word}>({op.value(item, part)}) << {i * width}" for i, item in enumerate(parts))
    return op.set(0, f"static_cast<{word}>({whole})", f"b{8 * BYTES[type_]}")


@EMITTERS.enter("cvt")
def _convert(op: Op) -> str:
    mode = op.modifier("rn", *_DIRECTED)
    integral, flushes, saturates = op.modifier(*_TO_INTEGER), op.modifier("ftz"), op.modifier("sat")
    source, to = op.type(), op.type()
    if to in HALVES and BYTES[to] == 4:  # two floats into one word, the first above
        op.count(3)
        high, low = (f"{HALVES[to]}::narrow({op.value(i, source)})" for i in (1, 2))
        return op.set(0, f"static_cast<uint32_t>({high}) << 16 | {low}", to)
    op.count(2)
    value = op.value(1, source)
    if source in HALVES:
        value, source = f"{HALVES[source]}::widen({value})", "f32"
    if flushes and source == "f32":
        value = f"ptx::flush({value})"
    kind = cpp_type(to)
    if to in HALVES:
        if mode in _DIRECTED or not is_float(source):
            raise op.refuse("this rounding is not known")
        return op.set(0, f"{HALVES[to]}::narrow({value})", to)
    if is_float(source) and is_float(to):
        value = f"{_TO_INTEGER[integral]}({value})" if integral else value
        value = _directed(mode, f"static_cast<{kind}>({value})")
        value = f"ptx::flush({value})" if flushes and to == "f32" else value
        return op.set(0, f"ptx::saturate({value})" if saturates else value, to)
    if is_float(source):
        return op.set(0, f"ptx::to_integer<{kind}>({_TO_INTEGER[integral or 'rzi']}({value}))", to)
    if is_float(to):
        return op.set(0, _directed(mode, f"static_cast<{kind}>({value})"), to)
    return op.set(0, f"ptx::clamp_integer<{kind}>({value})" if saturates else f"static_cast<{kind}>({value})", to)

"""Instructions that move data or wait: loads, stores, copies, barriers, warps (PTX ISA, chapters 9.7.9 to 9.7.15)."""

from __future__ import annotations

from gspn_dit.ops.cuda.host.ptx.grammar import Register
from gspn_dit.ops.cuda.host.ptx.op import HALVES, Emitters, Op, cpp_type, label_name

EMITTERS = Emitters()
_SPACES = {
    "": "generic",
    "global": "global",
    "const": "constant",
    "param": "parameter",
    "local": "local",
    "shared": "shared",
    "shared::cta": "shared",
    "shared::cluster": "cluster",
}
_ORDERS = ("weak", "relaxed", "acquire", "release", "volatile", "cta", "cluster", "gpu", "sys")
_CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::no_allocate", "L1::evict_last", "L2::128B", "L2::256B")


def _space(op: Op) -> tuple[str, bool]:
    """The state space as C++ names it, and whether its addresses are those of the shared window."""
    name = _SPACES[op.modifier(*filter(None, _SPACES))]
    return f"ptx::Space::{name}", name in ("shared", "cluster")


def _here(op: Op) -> str:
    """What the runtime names where this thread waits for ever."""
    return f"host_cuda::current->line = {op.line};"


@EMITTERS.enter("ld", "st")
def _load_or_store(op: Op) -> str:
    if op.modifier("async"):
        return _store_async(op)
    op.drop(*_ORDERS, *_CACHES)
    space, in_window = _space(op)
    lanes, type_ = int((op.modifier("v2", "v4") or "v1")[1:]), op.type()
    op.count(2)
    loads = op.name == "ld"
    items = op.items(0 if loads else 1)
    if len(items) != lanes:
        raise op.refuse(f"{len(items)} registers for {lanes} items")
    kind, address = cpp_type(type_), op.address(1 if loads else 0, in_window)
    access = f"{'read' if loads else 'write'}<{kind}, {lanes}>({space}, {address}, {op.line})"
    if loads:  # all items are there before a register changes that the address is made of
        values = ", ".join(f"from[{i}]" for i in range(lanes))
        steps = " ".join(op.set(item, f"items[{i}]", type_) for i, item in enumerate(items))
        return f"{{ const {kind}* from = ptx::{access}; const {kind} items[] = {{{values}}}; {steps} }}"
    steps = " ".join(f"to[{i}] = {op.value(item, type_)};" for i, item in enumerate(items))
    return f"{{ {kind}* to = ptx::{access}; {steps} }}"


def _store_async(op: Op) -> str:
    op.drop("weak", "shared::cluster", "mbarrier::complete_tx::bytes")
    op.modifier("v2", "v4")
    type_ = op.type()
    op.count(3)
    kind = cpp_type(type_)
    items = ", ".join(op.value(item, type_) for item in op.items(1))
    places = f"{op.address(0, True)}, items, sizeof(items), {op.address(2, True)}, {op.line}"
    return f"{{ const {kind} items[] = {{{items}}}; ptx::store_async({places}); }}"


@EMITTERS.enter("cvta")
def _convert_address(op: Op) -> str:
    inwards = bool(op.modifier("to"))
    _, in_window = _space(op)
    type_ = op.type()
    value = op.value(1, type_)
    if in_window:
        value = f"ptx::{'generic_to_shared' if inwards else 'shared_to_generic'}({value}, {op.line})"
    return op.set(0, value, type_)


@EMITTERS.enter("mapa")
def _map_address(op: Op) -> str:
    _, in_window = _space(op)
    type_ = op.type()
    place = f"{op.value(1, type_)}, {op.value(2, 'u32')}, {str(not in_window).lower()}, {op.line}"
    return op.set(0, f"ptx::in_block_of({place})", type_)


@EMITTERS.enter("bar", "barrier")
def _barrier(op: Op) -> str:
    if op.modifier("cluster"):
        op.drop("aligned", "acquire", "release", "relaxed")
        return f"{_here(op)} host_cuda::cluster_{op.modifier('arrive', 'wait')}();"
    op.drop("aligned", "cta")
    if op.modifier("warp"):
        op.modifier("sync")
        return f"{_here(op)} {{ const char none = 0; host_cuda::exchange(&none, 1, {op.value(0, 'u32')}); }}"
    arguments = ", ".join(op.value(i, "u32") for i in range(len(op.operands)))
    function = "barrier" if op.modifier("sync", "arrive") == "sync" else "arrive_at_barrier"
    return f"{_here(op)} host_cuda::{function}({arguments});"


@EMITTERS.enter("fence", "membar")
def _fence(op: Op) -> str:
    op.left.clear()  # threads take turns: what one has written, all see
    return ";"


@EMITTERS.enter("mbarrier")
def _mbarrier(op: Op) -> str:
    action = op.modifier("init", "inval", "arrive", "try_wait", "test_wait")
    expects = bool(op.modifier("expect_tx"))
    by_parity = bool(op.modifier("parity"))
    op.drop("acquire", "release", "relaxed", "cta", "cluster", "b64")
    space, in_window = _space(op)
    if action in ("init", "inval"):
        count = op.value(1, "u32") if action == "init" else "0"
        return f"ptx::start_mbarrier({space}, {op.address(0, in_window)}, {count}, {op.line});"
    address = op.address(1, in_window)
    if action == "arrive":
        number = op.value(2, "u32") if len(op.operands) > 2 else "1"
        counts = f"1, {number}" if expects else f"{number}, 0"
        return op.set(0, f"ptx::arrive({space}, {address}, {counts}, {op.line})", "b64")
    if not by_parity or not action:
        raise op.refuse("only waits by parity are known")
    function = "await_phase" if action == "try_wait" else "is_complete"
    return op.set(0, f"ptx::{function}({space}, {address}, {op.value(2, 'u32')}, {op.line})", "pred")


@EMITTERS.enter("cp")
def _copy(op: Op) -> str:
    op.modifier("async")
    if op.modifier("commit_group"):
        return "ptx::commit_copies();"
    if op.modifier("wait_all"):
        return "ptx::commit_copies(); ptx::await_copies(0);"
    if op.modifier("wait_group"):
        return f"ptx::await_copies({op.value(0, 'u32')});"
    op.drop(*_CACHES)
    if op.modifier("bulk"):
        op.drop("shared::cluster", "global", "mbarrier::complete_tx::bytes")
        op.count(4)
        places = f"{op.address(0, True)}, {op.address(1, False)}, {op.value(2, 'u32')}, {op.address(3, True)}"
        return f"ptx::copy_bulk({places}, {op.line});"
    op.drop("shared", "shared::cta", "global")
    bytes_ = op.value(2, "u32")
    taken = op.value(3, "u32") if len(op.operands) > 3 else bytes_
    places = f"{op.address(0, True)}, ptx::Space::global, {op.address(1, False)}"
    return f"ptx::copy_async({places}, {bytes_}, {taken}, {op.line});"


@EMITTERS.enter("shfl")
def _shuffle(op: Op) -> str:
    op.drop("sync")
    modes = {"up": "up", "down": "down", "bfly": "butterfly", "idx": "index"}
    mode, type_ = modes[op.modifier(*modes)], op.type()
    op.count(5)
    value, inside = op.pair(0)
    arguments = ", ".join(op.value(i, "u32") for i in (1, 2, 3, 4))
    text = f"{{ const auto found = ptx::shuffle(ptx::Shuffle::{mode}, {arguments}, {op.line}); "
    text += op.set(value, "found.value", type_)
    return text + (f" {op.set(inside, 'found.is_inside', 'pred')} }}" if inside is not None else " }")


@EMITTERS.enter("vote")
def _vote(op: Op) -> str:
    op.drop("sync")
    mode, type_ = op.modifier("ballot", "any", "all"), op.type()
    mask = op.value(2, "u32")
    ballot = f"ptx::ballot({op.value(1, 'pred')}, {mask}, {op.line})"
    if mode == "ballot":
        return op.set(0, ballot, type_)
    return op.set(0, f"{ballot} {'!= 0' if mode == 'any' else f'== {mask}'}", type_)


@EMITTERS.enter("mma")
def _multiply_matrices(op: Op) -> str:
    op.drop("sync", "aligned", "row", "col")
    shape, formats = op.modifier("m16n8k8", "m16n8k16"), (op.type(), op.type(), op.type(), op.type())
    if formats[0] != "f32" or formats[3] != "f32" or formats[1] != formats[2] or formats[1] not in HALVES:
        raise op.refuse("these types of matrices are not known")
    d, a, b, c = (op.items(i) for i in range(4))
    words = 4 if shape == "m16n8k16" else 2
    if not shape or (len(d), len(a), len(b), len(c)) != (4, words, words // 2, 4):
        raise op.refuse("this shape of matrices is not known")
    a_text, b_text = (", ".join(op.value(item, "b32") for item in items) for items in (a, b))
    c_text = ", ".join(op.value(item, "f32") for item in c)
    steps = " ".join(op.set(item, f"d[{i}]", "f32") for i, item in enumerate(d))
    return (
        f"{{ const uint32_t a[] = {{{a_text}}}, b[] = {{{b_text}}}; const float c[] = {{{c_text}}}; float d[4]; "
        f"ptx::multiply<{HALVES[formats[1]]}, {words}>(d, a, b, c, {op.line}); {steps} }}"
    )


@EMITTERS.enter("ldmatrix", "stmatrix")
def _matrices(op: Op) -> str:
    op.drop("sync", "aligned", "m8n8", "shared", "shared::cta", "b16")
    op.modifier("x1", "x2", "x4")
    transposed = str(bool(op.modifier("trans"))).lower()
    loads = op.name == "ldmatrix"
    items, address = op.items(0 if loads else 1), op.address(1 if loads else 0, True)
    if not loads:
        values = ", ".join(op.value(item, "b32") for item in items)
        call = f"ptx::store_matrices(words, {address}, {transposed}, {op.line});"
        return f"{{ const uint32_t words[] = {{{values}}}; {call} }}"
    steps = " ".join(op.set(item, f"words[{i}]", "b32") for i, item in enumerate(items))
    call = f"ptx::load_matrices(words, {address}, {transposed}, {op.line});"
    return f"{{ uint32_t words[{len(items)}]; {call} {steps} }}"


@EMITTERS.enter("movmatrix")
def _transpose_matrix(op: Op) -> str:
    op.drop("sync", "aligned", "m8n8", "trans")
    type_ = op.type()
    op.count(2)
    return op.set(0, f"ptx::transpose_matrix({op.value(1, 'b32')}, {op.line})", "b32" if type_ == "b16" else type_)


@EMITTERS.enter("bra")
def _branch(op: Op) -> str:
    op.drop("uni")
    (target,) = op.operands
    if isinstance(target, Register) or not hasattr(target, "name"):
        raise op.refuse("a branch to no label")
    return f"goto {label_name(target.name)};"


@EMITTERS.enter("ret", "exit")
def _return(op: Op) -> str:
    op.drop("uni")
    return "return;"


@EMITTERS.enter("trap")
def _trap(op: Op) -> str:
    return f'host_cuda::fail("line {op.line}: a trap");'

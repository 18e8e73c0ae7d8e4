"""The operator pair as PyTorch's machinery sees it: registration, compilation, checkpointing, tensors without data."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gspn_dit.ops import DIRECTIONS, gspn_scan, gspn_scan_from_proxy, operator, projected_operator
from gspn_dit.ops.cpu import binding as cpu
from tests.ops.scan_cases import Inputs, assert_close, lay_out, make_inputs, scan_and_gradients
from tests.ops.test_projected import draw

CALLS: dict[str, tuple[Inputs, list[int], int]] = {
    "plain": (make_inputs((2, 3, 4, 4), 2), [0, 1, 2, 3], 0),
    "bfloat16, window": (make_inputs((1, 3, 5, 2), 1, 2, torch.bfloat16), [3, 0], 2),
    "float64": (make_inputs((1, 2, 3, 2), directions=1, dtype=torch.float64, merge=torch.float64), [1], 1),
    "strided": (make_inputs((2, 3, 4, 4), 2, strides="permuted"), [0, 1, 2, 3], 3),
    "empty": (make_inputs((0, 3, 4, 2)), [0, 1, 2, 3], 0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck_forward(call: tuple[Inputs, list[int], int]) -> None:
    inputs, directions, window = call
    torch.library.opcheck(operator.scan_forward, (*inputs.leaves(), directions, window))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck_backward(call: tuple[Inputs, list[int], int]) -> None:
    inputs, directions, window = call
    torch.library.opcheck(operator.scan_backward, (torch.ones_like(inputs.x), *inputs, directions, window))


PROJECTED_CALLS: dict[str, tuple[list[Tensor], list[int], int]] = {
    "skip": (draw((2, 3, 4, 4), dtype=torch.float32), [0, 1, 2, 3], 0),
    "groups, window": (draw((1, 3, 5, 4), 2, 2, dtype=torch.float32, skip=False), [3, 0], 2),
    "strided": ([lay_out(tensor, "permuted") for tensor in draw((2, 3, 4, 4))], [0, 1, 2, 3], 3),
    "empty": (draw((0, 3, 4, 2)), [0, 1, 2, 3], 0),
}


@pytest.mark.parametrize("call", PROJECTED_CALLS.values(), ids=PROJECTED_CALLS)
def test_opcheck_projected(call: tuple[list[Tensor], list[int], int]) -> None:
    tensors, directions, window = call
    skip = tensors[6:] or [None]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:6]]
    torch.library.opcheck(projected_operator.projected_scan_forward, (*leaves, *skip, directions, window))
    arguments = (torch.ones_like(tensors[0]), *tensors[:6], *skip, directions, window)
    torch.library.opcheck(projected_operator.projected_scan_backward, arguments)


def test_gradients_without_fused_kernels_are_contiguous_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiler is told."""
    monkeypatch.setenv(cpu.KERNELS_VARIABLE, "pytorch")
    tensors = draw((2, 3, 4, 4), dtype=torch.float32)
    gradients = projected_operator.projected_scan_backward(tensors[0], *tensors, [0, 1, 2, 3], 0)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    assert all(gradient.is_contiguous() for gradient in gradients)


def mixer(x: Tensor, *others: Tensor, **options: Any) -> Tensor:
    """A scan with something before and behind it, for the compiler to look at."""
    return gspn_scan(x * 2, *others, **options).tanh() + x


def check_compiled(compiler: str, backend: str, autocast: bool = False, **options: Any) -> None:
    """Compare the compiled mixer, without graph breaks, with the eager one: y and all gradients, for two shapes."""
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend=compiler, fullgraph=True)
    for shape in ((2, 3, 4, 4), (1, 5, 2, 4)):
        leaves = make_inputs(shape, 2, len(options.get("directions", DIRECTIONS))).leaves()
        results = []
        for function in (compiled, mixer):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = function(*leaves, backend=backend, **options)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves.tensors())])
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    check_compiled("aot_eager", backend)


@pytest.mark.slow
def test_the_reference_compiles_too() -> None:
    check_compiled("aot_eager", "reference", directions=("left",))


def test_compiles_under_autocast_with_a_window() -> None:
    check_compiled("aot_eager", "auto", autocast=True, window=2)


def test_the_compiled_graph_holds_one_operator() -> None:
    """The scan is neither traced into nor split: the lines of the image do not appear in the graph."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(mixer, backend=keep, fullgraph=True)(*make_inputs((1, 3, 4, 2)))
    torch._dynamo.reset()
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert len([target for target in targets if "scan_forward" in target]) == 1
    assert len(targets) <= 5


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch.use_deterministic_algorithms(False)
    check_compiled("inductor", "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(backend: str, reentrant: bool) -> None:
    inputs = make_inputs((2, 3, 4, 4), 2)
    grad_y = torch.randn(2, 3, 4, 4)
    y, expected = scan_and_gradients(inputs, grad_y, window=2, backend=backend)
    leaves = inputs.leaves()
    again = checkpoint(lambda *t: gspn_scan(*t, window=2, backend=backend), *leaves, use_reentrant=reentrant)
    again.backward(grad_y)
    assert torch.equal(again, y)
    for leaf, gradient in zip(leaves.tensors(), expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_the_projected_scan(reentrant: bool, skip: bool) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in draw((2, 3, 4, 4), skip=skip)]
        run = partial(checkpoint, gspn_scan_from_proxy, use_reentrant=reentrant)
        y = (run if checkpointed else gspn_scan_from_proxy)(*leaves)
        y.square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    expected = gradients(False)
    assert len(expected) == 6 + skip
    assert all(torch.equal(one, other) for one, other in zip(gradients(True), expected, strict=True))


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    leaves = make_inputs((2, 3, 4, 4), 2).leaves()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gspn_scan(*leaves, backend="cpu")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves.tensors()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 3, 4, 4), 2, dtype=dtype, strides="permuted", device="meta")
    y, gradients = scan_and_gradients(inputs, torch.empty_like(inputs.x), backend="auto")
    assert y.is_meta
    assert (y.shape, y.dtype, y.is_contiguous()) == (inputs.x.shape, dtype, True)
    for tensor, gradient in zip(inputs.tensors(), gradients, strict=True):
        assert gradient.is_meta
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fake_tensors(backend: str) -> None:
    with FakeTensorMode() as mode:
        inputs = Inputs(*(mode.from_tensor(t) for t in make_inputs((2, 3, 4, 4), 2, strides="permuted").tensors()))
        y, gradients = scan_and_gradients(inputs, torch.empty(2, 3, 4, 4), backend=backend)
        assert (y.shape, y.device.type, y.is_contiguous()) == (inputs.x.shape, "cpu", True)
        assert [g.shape for g in gradients] == [t.shape for t in inputs.tensors()]


def test_a_deep_global_scan_is_accurate() -> None:
    """Accumulation in float32 along 256 lines, the states of which grow."""
    inputs = make_inputs((1, 2, 256, 2), directions=2)
    y, gradients = scan_and_gradients(inputs, torch.ones(1, 2, 256, 2), ("right", "left"), backend="cpu")
    expected, expected_gradients = scan_and_gradients(
        inputs.wide(), torch.ones(1, 2, 256, 2, dtype=torch.float64), ("right", "left")
    )
    assert_close(y, expected, "y")
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, other, "gradient")


def test_both_scans_decompose_into_operators_of_pytorch() -> None:
    """In a program of `torch.export`, in every direction, with a window and weights that channels share."""
    from gspn_dit.ops.decompositions import scan_decompositions

    class Both(torch.nn.Module):
        def forward(self, x: Tensor, logits: Tensor, gate: Tensor, proxy: Tensor, maps: Tensor) -> Tensor:
            scanned = gspn_scan(x, logits, gate, gate, window=2)
            weights = (maps[:12], maps[:16], maps[16:], torch.ones(4))
            return gspn_scan_from_proxy(scanned, proxy, *weights, maps[:4])

    torch.manual_seed(0)
    shapes = ((2, 3, 5, 4), (2, 3, 5, 4, 3, 2), (2, 3, 5, 4, 4), (2, 3, 5, 6), (32, 6))
    tensors = tuple(torch.randn(shape) for shape in shapes)
    program = torch.export.export(Both(), tensors)
    assert sum("gspn_dit" in str(node.target) for node in program.graph.nodes) > 0
    plain = program.run_decompositions(scan_decompositions())
    assert not [node for node in plain.graph.nodes if "gspn_dit" in str(node.target)]
    torch.testing.assert_close(plain.module()(*tensors), Both()(*tensors))

"""The operators as PyTorch sees them: opcheck, fakes, inference mode, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    EVERYTHING,
    FUSED_BACKENDS,
    INTERPRETED_BACKENDS,
    even_interpreted,
    even_interpreted_dtypes,
    even_interpreted_or_reference,
    interpreted,
    kernel_calls,
    widest,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from egnn_fast import Graph, Options, checks, functional
from egnn_fast.checks.cases import Case, Problem
from egnn_fast.weights import EdgeWeights

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)
CASE = Case(
    "ops", nodes=6, edges=14, hidden=5, attrs=2, mask="soft", options=EVERYTHING,
    velocity=True, node_attrs=1, node_mask=True, features=3,
)  # fmt: skip
VARIANTS = {
    "everything": CASE,
    "plain": Case("plain", nodes=5, edges=9, hidden=4, features=3),
    "no head": replace(CASE, options=Options(coord_agg=None, attention=True), velocity=False),
    "complete": replace(CASE, graph="complete", sizes=(3, 1, 2)),
    "no edges": replace(CASE, edges=0),
}
Calls = dict[str, tuple[Any, tuple[Any, ...]]]


class Recorder(TorchDispatchMode):
    """Keeps the last call of each of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "egnn_fast":
            self.calls[func._schema.name] = (func, args)
        return func(*args, **(kwargs or {}))


def record(case: Case, backend: str = "cpu") -> Calls:
    """Calls of every operator that a case reaches, by its two faces, through second order."""
    with Recorder() as recorder:
        for problem in (case.edge_pass(widest(backend)), case.layer(widest(backend))):
            checks.evaluate(problem, backend)
        edges = torch.randint(case.num_nodes, (2, 9))
        torch.ops.egnn_fast.sort_by_receiver(edges, case.num_nodes)
    return recorder.calls


def operators() -> set[str]:
    return {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("egnn_fast::")}


def needing_grad(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
        return [needing_grad(v) for v in value]
    return value


def without_grad(value: Any) -> Any:
    if isinstance(value, list):
        return [without_grad(v) for v in value]
    return value.detach() if isinstance(value, Tensor) else value


def test_the_recorder_meets_every_operator() -> None:
    assert set(record(CASE)) == operators()
    assert len(operators()) >= 4


# the operators are the same: the others of Triton's are left to the fakes below
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *itertools.product(VARIANTS, FUSED_BACKENDS),
        *(
            pytest.param(name, backend, marks=pytest.mark.interpreted)
            for name in ("everything", "plain", "no edges")
            for backend in INTERPRETED_BACKENDS
        ),
    ],
)
def test_opcheck(name: str, backend: str) -> None:
    for operator, (func, args) in record(VARIANTS[name], backend).items():
        with_grad = tuple(needing_grad(a) for a in args)
        if "double_backward" in operator:
            # its derivative is the third order, which is refused
            torch.library.opcheck(func, tuple(without_grad(a) for a in args))
            torch.library.opcheck(
                func, with_grad,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )  # fmt: skip
        else:
            torch.library.opcheck(func, with_grad)


@even_interpreted_dtypes
@pytest.mark.parametrize("name", VARIANTS)
def test_fakes_predict_shapes_dtypes_and_strides(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    for func, args in record(VARIANTS[name], backend).values():
        args = tuple(cast(a, dtype) for a in args)
        real = flatten(func(*args))
        with FakeTensorMode() as mode:
            fake = flatten(func(*(fakes(mode, a) for a in args)))
        assert len(real) == len(fake)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride(), a.device) == (
                b.shape, b.dtype, b.stride(), b.device,
            )  # fmt: skip


def flatten(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [cast(v, dtype) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def fakes(mode: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [fakes(mode, v) for v in value]
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def test_operators_refuse_what_they_have_no_kernel_for() -> None:
    calls = record(CASE)
    func, args = calls["egnn_fast::messages"]
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    assert all(t.device.type == "meta" for t in func(*meta))  # shapes only: the fake
    with pytest.raises(IndexError, match="edge_index"):
        torch.ops.egnn_fast.sort_by_receiver(torch.tensor([[0, 9], [1, 1]]), 3)


@even_interpreted
def test_no_cotangents_give_zeros(backend: str) -> None:
    func, args = record(replace(CASE, velocity=False), backend)["egnn_fast::messages_backward"]
    grads = func(None, None, *args[2:])
    assert len(grads) > 0
    assert all(not g.any() for g in grads)


@even_interpreted
def test_inference_mode_and_no_grad_give_the_same_bits(backend: str) -> None:
    for problem in (CASE.edge_pass(torch.float32), CASE.layer(torch.float32)):
        leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
        right = problem.run(leaves, backend, 0)
        for mode in (torch.inference_mode, torch.no_grad):
            with mode(), kernel_calls(1, 0, backend):
                found = problem.run(leaves, backend, 0)
            for name, t in right.items():
                assert torch.equal(t, found[name])
                assert not found[name].requires_grad
        with torch.inference_mode():
            fresh = {k: t.clone() for k, t in problem.leaves.items()}
            found = problem.run(fresh, backend, 0)
        assert all(torch.equal(t, found[name]) for name, t in right.items())


@contextmanager
def autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


@pytest.mark.parametrize("backend", [*FUSED_BACKENDS, "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_keeps_coordinates_distances_and_sums(backend: str, low: torch.dtype) -> None:
    case = replace(CASE, nodes=40, edges=400, hidden=32, node_mask=False)
    problem = case.layer(torch.float32)
    right = problem.run(problem.leaves, "reference", 0)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    with autocast(low), kernel_calls(*((1, 0) if backend == "cpu" else (0, 0))):
        found = problem.run(leaves, backend, 0)
    assert found["x"].dtype == torch.float32
    for name, t in right.items():
        assert checks.relative_error(found[name], t) < 0.03, name
    torch.stack([t.float().sum() for t in found.values()]).sum().backward()
    for name, t in leaves.items():
        assert t.grad is not None, name
        assert t.grad.dtype == torch.float32, name
        assert t.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", [*FUSED_BACKENDS, "reference"])
def test_autocast_sums_many_messages_exactly_enough(backend: str) -> None:
    """A bfloat16 sum of 20,000 equal messages would stop growing at 256 of them."""
    nodes = 20_001
    graph = Graph.from_edge_index(
        torch.stack((torch.zeros(nodes - 1, dtype=torch.int64), torch.arange(1, nodes))), nodes
    )
    case = Case("sum", "hub", nodes, nodes - 1, hidden=8, features=3)
    leaves = case.edge_pass(torch.float32).leaves
    weights = EdgeWeights(**{k: leaves.get(k) for k in EdgeWeights._fields})  # type: ignore[arg-type]
    p, q, x = torch.ones(nodes, 8), torch.zeros(nodes, 8), torch.zeros(nodes, 3)
    right, _ = functional.egcl_messages(p, q, x, graph, weights, Options(), backend="reference")
    with autocast():
        found, _ = functional.egcl_messages(
            p.bfloat16(), q.bfloat16(), x, graph, weights, Options(), backend=backend
        )
    assert found.dtype == torch.float32
    assert checks.relative_error(found, right) < 0.02


def low_pass(low: torch.dtype, **fields: Any) -> tuple[Problem, dict[str, Tensor]]:
    """An edge pass whose P and Q are as a linear leaves them under autocast."""
    case = replace(CASE, nodes=9, edges=40, hidden=16, **fields)
    problem = case.edge_pass(torch.float32)
    rounded = {k: t.to(low) if k in ("P", "Q") else t for k, t in problem.leaves.items()}
    return problem, {k: t.requires_grad_() for k, t in rounded.items()}


@pytest.mark.parametrize(
    ("backend", "low"),
    [
        *itertools.product((*FUSED_BACKENDS, "reference"), (torch.bfloat16, torch.float16)),
        # the interpreter multiplies bfloat16 wrongly
        *(pytest.param(name, torch.float16, marks=pytest.mark.interpreted)
          for name in INTERPRETED_BACKENDS),
    ],
)  # fmt: skip
def test_autocast_takes_p_and_q_of_its_dtype(backend: str, low: torch.dtype) -> None:
    """Only they are rounded: the sum of the two, M, X and the other gradients are not."""
    problem, leaves = low_pass(low)
    same = {k: t.detach().float().requires_grad_() for k, t in leaves.items()}
    ran = kernel_calls(0, 0) if backend == "reference" else kernel_calls(1, 0, backend)
    with autocast(low), ran:
        found = problem.run(leaves, backend, 0)
    with autocast(low):
        right = problem.run(same, backend, 0)
    for name, t in right.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], t), name
    towards = [torch.randn(t.shape) for t in right.values()]
    torch.autograd.backward(list(found.values()), towards)
    torch.autograd.backward(list(right.values()), towards)
    for name, t in leaves.items():
        grad, expected = t.grad, same[name].grad
        assert grad is not None, name
        assert expected is not None
        assert grad.dtype == t.dtype, name
        if name in ("P", "Q"):  # the same, rounded at the end or where edges add up
            size = 0.0 if backend != "reference" else 0.02
            assert checks.relative_error(grad, expected.to(low)) <= size, name
        elif backend != "triton":  # whose sums over senders have no order
            assert torch.equal(grad, expected), name


@even_interpreted_or_reference
def test_autocast_gathers_float32_where_that_is_given(backend: str) -> None:
    """P and Q are not rounded then, nor if one of the two is float32."""
    problem, leaves = low_pass(torch.float16)
    exact = problem.leaves["Q"]
    assert not torch.equal(exact, leaves["Q"].float())
    with autocast(torch.float16), torch.no_grad():
        mixed = problem.run({**leaves, "Q": exact}, backend, 0)
        same = problem.run({**leaves, "P": leaves["P"].float(), "Q": exact}, backend, 0)
        other = problem.run(leaves, backend, 0)
    for name, t in same.items():
        assert torch.equal(mixed[name], t), name
        assert not torch.equal(other[name], t), name


@even_interpreted_or_reference
def test_autocast_takes_p_and_q_of_another_dtype(backend: str) -> None:
    """Those of 16 bits that are not autocast's become float32."""
    problem, leaves = low_pass(torch.bfloat16)
    exact = {k: t.detach().float() for k, t in leaves.items()}
    with autocast(torch.float16), torch.no_grad():
        found = problem.run(leaves, backend, 0)
        right = problem.run(exact, backend, 0)
    assert all(torch.equal(found[name], t) for name, t in right.items())


@even_interpreted_or_reference
def test_low_precision_is_for_autocast(backend: str) -> None:
    problem, t = low_pass(torch.bfloat16)
    weights = EdgeWeights(**{k: t.get(k) for k in EdgeWeights._fields})  # type: ignore[arg-type]

    def run(p: Tensor) -> None:
        graph = Graph.complete([3, 3, 3])
        functional.egcl_messages(p, t["Q"], t["x"], graph, weights, CASE.options, backend=backend)

    with pytest.raises(TypeError, match=r"x: expected dtype torch.bfloat16 as P has, got .*32"):
        run(t["P"])
    with pytest.raises(TypeError, match=r"Q: expected dtype torch.float32 as P has, got .*bfloat"):
        run(problem.leaves["P"])


@interpreted
def test_the_operator_takes_p_and_q_in_16_bits(backend: str) -> None:
    """opcheck, and fakes that predict the gradients' dtypes."""
    problem, leaves = low_pass(torch.float16)
    with Recorder() as recorder, autocast(torch.float16):
        out = problem.run(leaves, backend, 0)
        torch.stack([t.sum() for t in out.values()]).sum().backward()
    for name in ("egnn_fast::messages", "egnn_fast::messages_backward"):
        func, args = recorder.calls[name]
        torch.library.opcheck(func, tuple(needing_grad(a) for a in args))
        real = flatten(func(*args))
        with FakeTensorMode() as mode:
            fake = flatten(func(*(fakes(mode, a) for a in args)))
        assert [t.dtype for t in fake] == [t.dtype for t in real]
    assert torch.float16 in {t.dtype for t in real}


@even_interpreted_or_reference
def test_compiled_code_takes_p_and_q_in_16_bits(backend: str) -> None:
    problem, leaves = low_pass(torch.float16, options=Options())

    def gradients(run: Any) -> dict[str, Tensor]:
        with autocast(torch.float16):
            out = run(leaves, backend, 0)
        total = torch.stack([(t * t).sum() for t in out.values()]).sum()
        wanted = [leaves[k] for k in ("P", "Q", "w2")]
        return dict(zip(("P", "Q", "w2"), torch.autograd.grad(total, wanted), strict=True))

    right = gradients(problem.run)
    torch.compiler.reset()
    found = gradients(torch.compile(problem.run, fullgraph=True, backend="aot_eager"))
    for name, t in right.items():
        assert found[name].dtype == t.dtype == leaves[name].dtype
        assert checks.relative_error(found[name], t) < 2e-3, name


@pytest.mark.parametrize("backend", [*FUSED_BACKENDS, "reference"])
def test_autocast_takes_low_precision_features(backend: str) -> None:
    """What a linear layer before ours gives under autocast."""
    problem = CASE.layer(torch.float32)
    low = {k: problem.leaves[k].bfloat16() for k in ("h", "edge_attr", "node_attr")}
    right = problem.run(problem.leaves, "reference", 0)
    with autocast():
        found = problem.run(problem.leaves | low, backend, 0)
    assert found["x"].dtype == torch.float32
    for name, t in right.items():
        assert checks.relative_error(found[name].float(), t) < 0.05, name


@every_backend
def test_autocast_does_not_touch_second_derivatives(backend: str) -> None:
    problem = replace(CASE, options=Options(attention=True)).edge_pass(torch.float32)
    right = checks.evaluate(problem, "reference")
    with autocast():
        found = checks.evaluate(problem, backend)
    for name, t in right["second order"].items():
        assert checks.relative_error(found["second order"][name], t) < 1e-5, name


@every_backend
def test_autocast_leaves_float64_alone(backend: str) -> None:
    problem = CASE.edge_pass(torch.float64)
    right = problem.run(problem.leaves, backend, 0)
    with autocast():
        found = problem.run(problem.leaves, backend, 0)
    for name, t in right.items():
        assert torch.equal(found[name], t)

"""First and second derivatives by finite differences, the third refused, None where unreached."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import (
    EVERYTHING,
    FUSED_BACKENDS,
    SINGLE_OPTIONS,
    describe,
    even_interpreted,
    even_interpreted_or_reference,
    kernel_calls,
    option_grid,
    widest,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from egnn_fast import Graph, Options, checks, functional
from egnn_fast.checks.cases import Case, Problem
from egnn_fast.operators import second_order
from egnn_fast.weights import EdgeWeights, LayerWeights

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)
SMALL = Case("small", nodes=4, edges=9, hidden=3, dim=2, attrs=1, mask="soft", features=2)


def as_function(
    problem: Problem, backend: str, norm: str | float | None = None
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A problem as gradcheck wants it: a function of tensors, and those tensors.

    With the detached norm, finite differences in x see a derivative that is left out on purpose;
    test_kernels compares that gradient with the reference's.
    """
    names = [name for name in problem.leaves if name != "x" or norm != "unit"]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        leaves = problem.leaves | dict(zip(names, values, strict=True))
        return tuple(problem.run(leaves, backend, 0).values())

    return run, tuple(problem.leaves[name].clone().requires_grad_() for name in names)


@every_backend
@pytest.mark.parametrize("name", SINGLE_OPTIONS)
def test_edge_pass(name: str, backend: str) -> None:
    case = replace(SMALL, options=SINGLE_OPTIONS[name])
    run, inputs = as_function(case.edge_pass(torch.float64), backend, case.options.coord_norm)
    with kernel_calls():
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)


@every_backend
@pytest.mark.parametrize("name", SINGLE_OPTIONS)
def test_whole_layer(name: str, backend: str) -> None:
    case = replace(
        SMALL, options=SINGLE_OPTIONS[name], velocity=True, node_attrs=1, node_mask=True,
        residual=name != "default",
    )  # fmt: skip
    run, inputs = as_function(case.layer(torch.float64), backend, case.options.coord_norm)
    with kernel_calls():
        assert gradcheck(run, inputs, fast_mode=True)
        assert gradgradcheck(run, inputs, fast_mode=True)


@every_backend
def test_combinations_of_options(backend: str) -> None:
    """Some of all, among which any two values of two options meet; test_kernels compares each."""
    for options, mask, attrs in itertools.islice(option_grid(), 1, None, 11):
        case = replace(SMALL, options=options, mask=mask, attrs=attrs, nodes=5)
        run, inputs = as_function(case.edge_pass(torch.float64), backend, case.options.coord_norm)
        label = f"{describe(options)} mask {mask} A{attrs}"
        assert gradcheck(run, inputs, fast_mode=True, raise_exception=False), label
        assert gradgradcheck(run, inputs, fast_mode=True, raise_exception=False), label


@every_backend
@pytest.mark.parametrize("graph", ["complete", "hub", "isolated", "loops", "sorted"])
def test_kinds_of_graphs(graph: str, backend: str) -> None:
    case = replace(SMALL, graph=graph, sizes=(3, 1, 2), options=EVERYTHING)
    run, inputs = as_function(case.edge_pass(torch.float64), backend, case.options.coord_norm)
    with kernel_calls():
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("options", [EVERYTHING, SINGLE_OPTIONS["active clamp"]], ids=describe)
def test_the_clamp_acts_on_some_components(options: Options) -> None:
    """The cases above mean something only if their clamp is neither idle nor always active."""
    case = replace(SMALL, options=options, mask=None)
    leaves, (receiver, sender) = case.edge_pass(torch.float64).leaves, case.build_graph().edge_index
    single = replace(case, nodes=2 * case.edges).edge_pass(torch.float64)
    # every edge alone between two nodes of its own: X holds the clamped updates one by one
    apart = Graph.from_edge_index(
        torch.arange(2 * case.edges).reshape(2, case.edges), 2 * case.edges
    )
    ends = torch.cat((receiver, sender))
    moved = {k: leaves[k][ends] for k in ("P", "Q", "x")}
    weights = EdgeWeights(**{k: leaves.get(k) for k in EdgeWeights._fields})  # type: ignore[arg-type]
    _, updates = functional.egcl_messages(
        moved["P"], moved["Q"], moved["x"], apart, weights, options,
        edge_attr=single.leaves["edge_attr"], backend="reference",
    )  # fmt: skip
    assert updates is not None
    clamped = updates[: case.edges].abs().eq(options.coord_clamp or 0)
    assert 0.2 < clamped.double().mean() < 0.8


def third_order(backend: str) -> Tensor:
    problem = SMALL.edge_pass(widest(backend))
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    value = torch.stack([t.pow(2).sum() for t in problem.run(leaves, backend, 0).values()]).sum()
    for _ in range(3):
        grads = torch.autograd.grad(value, leaves["x"], create_graph=True)
        value = grads[0].sin().sum()
    return value


@even_interpreted
def test_third_order_is_refused(backend: str) -> None:
    with pytest.raises(NotImplementedError, match=r"egnn_fast: .* second order; .*'reference'"):
        third_order(backend)


def test_third_order_of_the_reference_is_right() -> None:
    problem = replace(SMALL, options=EVERYTHING).edge_pass(torch.float64)

    def gradient(x: Tensor) -> Tensor:
        out = problem.run(problem.leaves | {"x": x}, "reference", 0)
        total = torch.stack([t.pow(2).sum() for t in out.values()]).sum()
        return torch.autograd.grad(total, x, create_graph=True)[0]

    assert gradgradcheck(gradient, (problem.leaves["x"].clone().requires_grad_(),))
    assert third_order("reference").isfinite()


@every_backend
def test_second_order_through_first_order_of_weights(backend: str) -> None:
    """A loss on gradients (forces) reaches every weight: nothing silently constant."""
    found = {}
    problem = replace(SMALL, options=EVERYTHING).edge_pass(torch.float64)
    for name in (backend, "reference"):
        leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
        energy = problem.run(leaves, name, 0)["M"].sum()
        (force,) = torch.autograd.grad(energy, leaves["x"], create_graph=True)
        reached = {k: t for k, t in leaves.items() if k not in ("w3", "b3", "w_x")}
        grads = torch.autograd.grad(force.pow(2).sum(), list(reached.values()))
        found[name] = dict(zip(reached, grads, strict=True))
    for name, right in found["reference"].items():
        torch.testing.assert_close(found[backend][name], right, rtol=1e-11, atol=1e-11)


@even_interpreted_or_reference
def test_unreached_tensors_get_none(backend: str) -> None:
    problem = replace(SMALL, options=Options(attention=True)).edge_pass(widest(backend))
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    out = problem.run(leaves, backend, 0)
    out["M"].sum().backward()
    for name, t in leaves.items():
        assert (t.grad is None) == (name in ("w3", "b3", "w_x")), name


@even_interpreted_or_reference
def test_last_layer_without_use_of_its_coordinates(backend: str) -> None:
    problem = SMALL.layer(widest(backend))
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    problem.run(leaves, backend, 0)["h"].sum().backward()
    unreached = {name for name, t in leaves.items() if t.grad is None}
    assert unreached == {"coord_w1", "coord_b1", "coord_w2"}


@even_interpreted_or_reference
def test_tensors_that_need_no_gradient_get_none(backend: str) -> None:
    problem = SMALL.edge_pass(widest(backend))
    leaves = {k: t.clone().requires_grad_(k == "w2") for k, t in problem.leaves.items()}
    torch.stack([t.sum() for t in problem.run(leaves, backend, 0).values()]).sum().backward()
    assert {name for name, t in leaves.items() if t.grad is not None} == {"w2"}


@even_interpreted
def test_nothing_runs_backward_where_nothing_is_needed(backend: str) -> None:
    problem = SMALL.edge_pass(widest(backend))
    with kernel_calls(1, 0, backend):
        out = problem.run(problem.leaves, backend, 0)
    assert not any(t.requires_grad for t in out.values())
    with torch.no_grad(), kernel_calls(1, 0, backend):
        out = problem.run({k: t.clone().requires_grad_() for k, t in problem.leaves.items()},
                          backend, 0)  # fmt: skip
    assert not any(t.requires_grad for t in out.values())


@every_backend
def test_double_backward_in_chunks_of_edges(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory bound splits the edges; the sums over chunks must not show it."""
    case = Case("chunks", nodes=20, edges=101, attrs=2, mask="soft", options=EVERYTHING)
    problem = case.edge_pass(torch.float64)
    right = checks.evaluate(problem, backend)["second order"]
    for edges in (1, 7, 100):
        monkeypatch.setattr(second_order, "CHUNK_ELEMENTS", edges * 2 * case.hidden)
        found = checks.evaluate(problem, backend)["second order"]
        for name, t in right.items():
            assert checks.relative_error(found[name], t) <= checks.FLOAT64_BOUND, name


@every_backend
@pytest.mark.parametrize("nodes", [0, 1, 3])
def test_no_edges(nodes: int, backend: str) -> None:
    case = replace(SMALL, nodes=nodes, edges=0, options=EVERYTHING, velocity=True)
    for problem in (case.edge_pass(torch.float64), case.layer(torch.float64)):
        run, inputs = as_function(problem, backend)
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)


@even_interpreted
def test_retained_graph_gives_the_same_gradients_again(backend: str) -> None:
    problem = SMALL.edge_pass(widest(backend))
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    total = torch.stack([t.sum() for t in problem.run(leaves, backend, 0).values()]).sum()
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(total, list(leaves.values()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@even_interpreted
def test_editing_a_saved_input_is_noticed(backend: str) -> None:
    problem = SMALL.edge_pass(widest(backend))
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    out = problem.run(leaves, backend, 0)["M"].sum()
    with torch.no_grad():
        leaves["x"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@even_interpreted
def test_a_graph_that_was_warm_in_inference_mode_still_trains(backend: str) -> None:
    for make in (
        lambda: Graph.complete([3, 2]),
        lambda: Graph.from_edge_index([[0, 4], [1, 2]], 5),
    ):
        case = replace(SMALL, nodes=5, attrs=0, mask=None)
        leaves = case.layer(widest(backend)).leaves
        weights = LayerWeights(
            **{k: t.clone().requires_grad_() for k, t in leaves.items() if "_w" in k or "_b" in k}
        )
        with torch.inference_mode():
            graph = make()
            functional.egcl(leaves["h"], leaves["x"], graph, weights, Options(), backend=backend)
        for name in (backend, "reference"):
            h, x, _ = functional.egcl(
                leaves["h"], leaves["x"], graph, weights, Options(), backend=name
            )
            (h.sum() + x.sum()).backward()
        assert weights.edge_w1.grad is not None

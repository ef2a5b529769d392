"""What holds for any graph, options and widths, on problems drawn by hypothesis.

Without an option the same problems are drawn each time; `--hypothesis-profile=thorough` draws many
more, and others in each run (the profiles stand in conftest.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bits import assert_same_bits, bits
from cases import DTYPES, kernel_calls
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from egnn_fast import Graph, Options, checks, functional, set_activation_budget
from egnn_fast.checks.cases import ORDERS, Case, Problem
from egnn_fast.operators.budget import DEFAULT_BUDGET
from egnn_fast.options import ACTIVATIONS, COORD_AGGS
from egnn_fast.runtime import native

pytestmark = pytest.mark.native
EXAMPLES = settings.default.max_examples if settings.default is not None else 0
# Draws of a case's numbers, where those drawn first leave an error in doubt.
DRAWS = 12
# whether a layer computes its activations again for the backward, or has kept them
BUDGETS = st.sampled_from((0, DEFAULT_BUDGET))
FACES = ("edge_pass", "layer")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Drawn(Case):
    """A case whose edges are listed; of an unlisted complete graph, they follow from the sizes."""

    pairs: tuple[tuple[int, int], ...] = ()
    face: str = "layer"

    def edge_index(self) -> Tensor:
        if self.graph == "complete":
            return super().edge_index()
        return torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2).T

    def problem(self, dtype: torch.dtype) -> Problem:
        return self.edge_pass(dtype) if self.face == "edge_pass" else self.layer(dtype)


@st.composite
def all_options(draw: st.DrawFn) -> Options:
    """Every field of Options."""
    return Options(
        activation=draw(st.sampled_from(ACTIVATIONS)),
        negative_slope=draw(st.sampled_from((0.01, 0.2, 0.0, -0.5, 1.0))),
        attention=draw(st.booleans()),
        coord_norm=draw(st.one_of(st.sampled_from((None, "unit")), st.floats(0.05, 2.0))),
        coord_tanh=draw(st.booleans()),
        coord_agg=draw(st.sampled_from(COORD_AGGS)),
        coord_scale=draw(st.floats(0.1, 3.0)),
        coord_clamp=draw(st.one_of(st.none(), st.floats(0.01, 1.0))),
    )


def draw_edges(draw: st.DrawFn, nodes: int, loops: bool, most: int) -> tuple[tuple[int, int], ...]:
    """Few edges at will, or many of a kind: repeated ones, hubs and isolated nodes among them."""
    kind = draw(st.sampled_from(("listed", "uniform", "to a hub", "from a hub", "few receivers")))
    if nodes == 0 or (nodes == 1 and not loops):
        return ()
    if kind == "listed":
        node = st.integers(0, nodes - 1)
        pairs = draw(st.lists(st.tuples(node, node), max_size=12))
    else:
        numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        edges = torch.randint(nodes, (draw(st.integers(1, most)), 2), generator=numbers)
        if kind == "few receivers":
            edges[:, 0] //= 3
        elif kind != "uniform":
            edges[:, 0 if kind == "to a hub" else 1] = nodes - 1
        pairs = edges.tolist()
    return tuple((i, j) for i, j in pairs if loops or i != j)


def numbers_of_nodes(least: int) -> st.SearchStrategy[int]:
    """Rarely none or one, which leave little to compute."""
    return st.one_of(
        st.integers(max(least, 3), 20), st.integers(max(least, 3), 20), st.integers(least, 20)
    )


@st.composite
def cases(
    draw: st.DrawFn, most_edges: int = 120, complete: bool | None = None, least: int = 0
) -> Drawn:
    """A graph, widths and options; at least `least` nodes and hidden units."""
    options = draw(all_options())
    # where points coincide, 1 / rho of the unit norm is 1e8 and drowns all else
    apart = options.coord_norm == "unit"
    is_complete = draw(st.integers(0, 2)) == 2 if complete is None else complete
    sizes: tuple[int, ...] = ()
    if is_complete:
        sizes = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
        sizes = (*sizes, least) if sum(sizes) < least else sizes
    nodes = sum(sizes) if is_complete else draw(numbers_of_nodes(least))
    pairs = () if is_complete else draw_edges(draw, nodes, not apart, most_edges)
    place = "uniform" if apart else draw(st.sampled_from(("uniform", "coincident")))
    return Drawn(
        "drawn",
        "complete" if is_complete else place,
        nodes=nodes,
        edges=len(pairs),
        pairs=pairs,
        sizes=sizes,
        hidden=draw(st.integers(max(1, least), 37)),
        dim=draw(st.integers(1, 8)),
        attrs=draw(st.integers(0, 4)),
        options=options,
        mask=draw(st.sampled_from((None, "binary", "soft"))),
        features=draw(st.integers(1, 9)),
        node_attrs=draw(st.integers(0, 3)),
        velocity=draw(st.booleans()),
        carry=draw(st.booleans()),
        node_mask=draw(st.booleans()),
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        face=draw(st.sampled_from(FACES)),
    )


def carried(case: Drawn) -> Drawn:
    """Only what a layer can do: a velocity is carried on where there is one."""
    return replace(case, carry=case.carry and case.velocity)


# A multiple of the profile's number of examples.
def examples(factor: int) -> settings:
    return settings(max_examples=EXAMPLES * factor)


def scales(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The size by which to measure each tensor's error: its own.

    A sum that cancels (as the mask's gradient does for a mean of equal shifts) has no digits; what
    is so small that it may be such a one is measured by the largest of its companions.
    """
    own = {name: float(t.abs().max()) if t.numel() else 0.0 for name, t in tensors.items()}
    noise = 1e-4 * max(own.values())
    return {name: max(size, noise) for name, size in own.items()}


def error_of(found: Tensor, right: Tensor, scale: float) -> float:
    """max|a - b| / scale."""
    if found.numel() == 0:
        return 0.0
    error = float((found.double() - right.double()).abs().max())
    assert math.isfinite(error)
    return error / scale if scale > 0 else error


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Within the bound for float64."""
    assert found.keys() == right.keys()
    scale = scales(right)
    for name, t in right.items():
        assert found[name].shape == t.shape
        error = error_of(found[name], t, scale[name])
        assert error <= checks.FLOAT64_BOUND, f"{name}: {error:.2e}"


def first_order(problem: Problem, order: int = 0) -> dict[str, Tensor]:
    """Outputs and gradients by the kernel, added up in another order."""
    found = checks.evaluate(problem, "cpu", order)
    return found["outputs"] | {f"gradient of {k}": t for k, t in found["gradients"].items()}


def assert_passed(case: Drawn, dtype: torch.dtype) -> None:
    """By the rule of `checks`.

    An error in doubt is judged again by more draws of the case's numbers, as if they were one
    batch: where the only number of a tensor cancels, no two ways of adding it up have errors that
    compare.
    """
    if all(row.passed for row in checks.compare(case.problem(dtype), "drawn", ["cpu"], dtype)):
        return
    problems = [replace(case, seed=case.seed + k).problem(dtype) for k in range(DRAWS)]

    def batch(backend: str, order: int = 0, exact: bool = False) -> dict[str, dict[str, Tensor]]:
        found = [checks.evaluate(exactly(p) if exact else p, backend, order) for p in problems]
        return {
            quantity: {name: torch.stack([f[quantity][name] for f in found]) for name in tensors}
            for quantity, tensors in found[0].items()
        }

    truth, found = batch("reference", exact=True), batch("cpu")
    orders = 0 if dtype == torch.float64 else checks.MORE * ORDERS
    plain = [batch("reference", order) for order in range(orders)]
    for quantity, tensors in truth.items():
        scale = scales(tensors)
        for name, right in tensors.items():
            error = error_of(found[quantity][name], right, scale[name])
            errors = [error_of(p[quantity][name], right, scale[name]) for p in plain]
            bound = checks.bound(dtype, errors)
            assert error <= bound, f"{quantity}, {name}: {error:.2e} > {bound:.2e}"


def exactly(problem: Problem) -> Problem:
    """The same numbers in float64."""
    return Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)


@examples(20)
@given(cases().map(carried), BUDGETS)
def test_the_kernel_computes_what_the_reference_does(case: Drawn, budget: int) -> None:
    with set_activation_budget(budget), kernel_calls():
        assert_passed(case, torch.float64)


# with few numbers in a sum a float32 error says nothing
@examples(8)
@given(cases(least=4).map(carried), BUDGETS)
def test_float32_is_as_accurate_as_plain_pytorch(case: Drawn, budget: int) -> None:
    with set_activation_budget(budget), kernel_calls():
        assert_passed(case, torch.float32)


# a single edge whose four channels nearly cancel in X
CANCELLING = Drawn(
    "cancelling", "uniform", nodes=4, edges=1, hidden=4, dim=1, attrs=0,
    options=Options(attention=True), mask=None, seed=8190, pairs=((2, 3),), face="edge_pass",
)  # fmt: skip


def test_a_sum_that_cancels_is_judged_among_others() -> None:
    assert_passed(CANCELLING, torch.float32)


def test_errors_of_many_draws_are_still_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    egcl_messages = functional.egcl_messages

    def worse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        m, x = egcl_messages(*args, **kwargs)
        return m, None if x is None else x * (1 + 2e-6)

    monkeypatch.setattr(functional, "egcl_messages", worse)
    with pytest.raises(AssertionError, match="outputs, X"):
        assert_passed(CANCELLING, torch.float32)


@examples(5)
@given(cases().map(carried), st.integers(1, 100))
def test_the_order_of_nodes_edges_and_units_does_not_matter(case: Drawn, order: int) -> None:
    problem = case.problem(torch.float64)
    assert_close(first_order(problem, order), first_order(problem))


@examples(5)
@given(cases(complete=False, most_edges=400).map(carried))
def test_edges_in_receiver_order_give_the_same_bits(case: Drawn) -> None:
    """Stably sorted, the edges are added in the order that they had: nothing may change."""
    case = replace(case, node_mask=False)  # which PyTorch applies, in the order of the edges
    order = case.edge_index()[0].argsort(stable=True)
    ordered = replace(case, pairs=tuple(case.pairs[k] for k in order.tolist()))
    assert ordered.build_graph().perm is None
    for dtype in DTYPES:
        problem = case.problem(dtype)
        moved = {
            k: t[order] if k in ("edge_attr", "edge_mask") else t for k, t in problem.leaves.items()
        }
        right = bits(problem)
        for name in ("gradient of edge_attr", "gradient of edge_mask"):
            if name in right:
                right[name] = right[name][order]
        assert_same_bits(bits(Problem(moved, ordered.problem(dtype).run)), right)


@examples(5)
@given(cases().map(carried), st.sampled_from(("rotation", "reflection", "translation")), st.data())
def test_symmetries(case: Drawn, symmetry: str, data: st.DataObject) -> None:
    """Outputs and gradients turn and move with the coordinates."""
    # the clamp acts on components
    case = replace(case, options=replace(case.options, coord_clamp=None))
    problem = case.problem(torch.float64)
    numbers = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    matrix = torch.eye(case.dim, dtype=torch.float64)
    shift = torch.zeros(case.dim, dtype=torch.float64)
    if symmetry == "translation":
        shift = torch.randn(case.dim, generator=numbers, dtype=torch.float64)
    else:
        square = torch.randn(case.dim, case.dim, generator=numbers, dtype=torch.float64)
        matrix = torch.linalg.qr(square).Q
        wanted = 1.0 if symmetry == "rotation" else -1.0
        matrix[0] *= wanted * torch.linalg.det(matrix).sign()
    turned = {k: t @ matrix.T if k in ("x", "v") else t for k, t in problem.leaves.items()}
    turned["x"] = turned["x"] + shift

    def transform(name: str, t: Tensor) -> Tensor:
        moves = shift if name == "x" and case.face == "layer" else torch.zeros_like(shift)
        return t @ matrix.T + moves if name in ("x", "v", "X") else t

    def gradients(leaves: dict[str, Tensor], turn: bool) -> dict[str, Tensor]:
        inputs = {k: t.clone().requires_grad_() for k, t in leaves.items()}
        out = problem.run(inputs, "cpu", 0)
        draw = torch.Generator().manual_seed(1)
        towards = {k: torch.rand(t.shape, generator=draw).double() + 0.5 for k, t in out.items()}
        if turn:
            towards = {k: t @ matrix.T if k in ("x", "v", "X") else t for k, t in towards.items()}
        found = torch.autograd.grad(
            list(out.values()),
            list(inputs.values()),
            list(towards.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        grads = {f"gradient of {k}": g for k, g in zip(inputs, found, strict=True)}
        return {k: t.detach() for k, t in out.items()} | grads

    here, there = gradients(problem.leaves, False), gradients(turned, True)
    right = {
        k: t @ matrix.T if k in ("gradient of x", "gradient of v") else transform(k, t)
        for k, t in here.items()
    }
    note(symmetry)
    assert_close(there, right)


@examples(5)
@given(cases(complete=True).map(carried))
def test_complete_graphs_equal_their_edge_lists(case: Drawn) -> None:
    assert case.build_graph().is_complete
    pairs = tuple((int(i), int(j)) for i, j in Graph.complete(case.sizes).edge_index.T)
    listed = replace(case, graph="uniform", nodes=case.num_nodes, edges=len(pairs), pairs=pairs)
    assert not listed.build_graph().is_complete
    for dtype in DTYPES:
        # the same edges in the same order: the same sums
        assert_same_bits(bits(case.problem(dtype)), bits(listed.problem(dtype)))


@pytest.mark.alone
@examples(5)
@given(cases(most_edges=900).map(carried), BUDGETS)
def test_threads_do_not_change_the_bits(case: Drawn, budget: int) -> None:
    for dtype in DTYPES:
        problem = case.problem(dtype)
        with set_activation_budget(budget):
            torch.set_num_threads(1)
            right = bits(problem)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert_same_bits(bits(problem), right)
    torch.set_num_threads(1)


@examples(5)
@given(cases().map(carried))
def test_instruction_sets_agree(case: Drawn) -> None:
    core = native.core
    assert core is not None, native.load_error
    chosen = core.instruction_set()
    problem = case.problem(torch.float64)
    try:
        core.set_instruction_set("portable")
        right = first_order(problem)
        for name in core.supported_instruction_sets():
            core.set_instruction_set(name)
            assert_close(first_order(problem), right)
    finally:
        core.set_instruction_set(chosen)

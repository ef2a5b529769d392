"""Every fused backend against the reference, over the table of cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from cases import (
    BACKENDS_AND_DTYPES,
    CASES,
    DTYPES,
    EVERYTHING,
    FUSED_BACKENDS,
    INTERPRETED_BACKENDS,
    ISA_CASES,
    LAYER_CASES,
    SINGLE_OPTIONS,
    assert_passed,
    describe,
    even_interpreted,
    even_interpreted_dtypes,
    kernel_calls,
    option_grid,
    widest,
)
from torch import Tensor

from egnn_fast import Options, checks, functional
from egnn_fast.checks import Row
from egnn_fast.checks.cases import ORDERS, Case, Problem
from egnn_fast.runtime import native
from egnn_fast.weights import LayerWeights

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]
every_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_face = pytest.mark.parametrize("face", ["edge_pass", "layer"])
FULL = Case(
    "full", nodes=40, edges=600, hidden=20, attrs=3, mask="soft", options=EVERYTHING,
    velocity=True, carry=True, node_attrs=2, node_mask=True,
)  # fmt: skip


def full(backend: str) -> Case:
    """The case with everything, small where an interpreter runs it."""
    return replace(FULL, nodes=12, edges=70) if backend in INTERPRETED_BACKENDS else FULL


def with_dtypes(*faces: tuple[str, Sequence[Case]]) -> pytest.MarkDecorator:
    """Parametrise by face, case and dtype.

    With one hidden unit sums are so ill-conditioned that a float32 error says nothing.
    """
    return pytest.mark.parametrize(
        ("face", "case", "dtype"),
        [
            pytest.param(face, case, dtype, id=f"{case.name}-{str(dtype)[6:]}")
            for face, cases in faces
            for case in cases
            for dtype in DTYPES
            if dtype == torch.float64 or case.hidden > 1
        ],
    )


def problem_of(case: Case, face: str, dtype: torch.dtype) -> Problem:
    problem: Problem = getattr(case, face)(dtype)
    return problem


@every_backend
@with_dtypes(("edge_pass", CASES))
@pytest.mark.usefixtures("poison")
def test_edge_pass(face: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    with kernel_calls(forward=1, backward=1):
        rows = list(checks.compare(problem_of(case, face, dtype), case.name, [backend], dtype))
    assert_passed(rows)


@every_backend
@with_dtypes(("layer", LAYER_CASES))
@pytest.mark.usefixtures("poison")
def test_layer(face: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    with kernel_calls():
        rows = list(checks.compare(problem_of(case, face, dtype), case.name, [backend], dtype))
    assert_passed(rows)


@even_interpreted
@pytest.mark.parametrize("face", ["edge_pass", "layer"])
@pytest.mark.parametrize("name", SINGLE_OPTIONS)
def test_no_option_leaves_the_kernel(name: str, face: str, backend: str) -> None:
    case = Case(name, edges=40, options=SINGLE_OPTIONS[name], attrs=1, mask="soft", velocity=True)
    problem = getattr(case, face)(torch.float32)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    with kernel_calls(forward=1, backward=0, backend=backend):
        out = problem.run(leaves, backend, 0)
    with kernel_calls(forward=0, backward=1, backend=backend):
        torch.stack([t.sum() for t in out.values()]).sum().backward()


@every_backend
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu", "leaky_relu"])
def test_all_combinations_of_options(activation: str, attention: bool, backend: str) -> None:
    rows: list[Row] = []
    for options, mask, attrs in option_grid():
        if (options.activation, options.attention) != (activation, attention):
            continue
        name = f"{describe(options)} mask {mask} A{attrs}"
        case = Case(name, nodes=8, edges=60, hidden=9, options=options, mask=mask, attrs=attrs)
        with kernel_calls(forward=1, backward=1):
            rows += checks.compare(case.edge_pass(torch.float64), name, [backend], torch.float64)
    assert len(rows) == 3 * 13 * 2 * 2
    assert_passed(rows)


@pytest.mark.values
@with_dtypes(("edge_pass", ISA_CASES), ("layer", LAYER_CASES))
def test_every_instruction_set(face: str, case: Case, dtype: torch.dtype) -> None:
    core = native.core
    assert core is not None, native.load_error
    names = core.supported_instruction_sets()
    assert "portable" in names
    problem = problem_of(case, face, dtype)
    for name in names:
        core.set_instruction_set(name)
        assert core.instruction_set() == name
        assert_passed(list(checks.compare(problem, f"{case.name} on {name}", ["cpu"], dtype)))


def gradients(
    problem: Problem, wanted: Sequence[str], outputs: Sequence[str], backend: str, order: int = 0
) -> dict[str, Tensor | None]:
    """Gradients of some leaves, only these requiring any, from some outputs."""
    inputs = {k: t.detach().clone().requires_grad_(k in wanted) for k, t in problem.leaves.items()}
    found = problem.run(inputs, backend, order)
    draw = torch.Generator().manual_seed(0)
    # the same numbers for every dtype
    towards = {k: torch.randn(t.shape, generator=draw).to(t.dtype) for k, t in found.items()}
    # around an edge pass PyTorch knows which outputs do not depend on what is wanted
    reached = [k for k in outputs if found[k].requires_grad]
    if not reached:
        return dict.fromkeys(wanted)
    grads = torch.autograd.grad(
        [found[k] for k in reached],
        [inputs[k] for k in wanted],
        [towards[k] for k in reached],
        allow_unused=True,
    )
    return dict(zip(wanted, grads, strict=True))


@even_interpreted
@every_face
@pytest.mark.parametrize("options", [EVERYTHING, Options(), Options(coord_agg=None)], ids=describe)
@pytest.mark.usefixtures("poison")
def test_a_gradient_does_not_depend_on_what_else_is_asked_for(
    options: Options, face: str, backend: str
) -> None:
    case = replace(full(backend), options=options)
    if backend in INTERPRETED_BACKENDS:  # one program, two blocks
        case = replace(case, nodes=6, edges=20)
    problem = problem_of(case, face, widest(backend))
    outputs = tuple(problem.run(problem.leaves, backend, 0))
    everything = gradients(problem, tuple(problem.leaves), outputs, backend)
    for k in (1,) if backend in INTERPRETED_BACKENDS else (1, 2):
        for wanted in itertools.combinations(problem.leaves, k):
            for name, grad in gradients(problem, wanted, outputs, backend).items():
                expected = everything[name]
                assert grad is not None
                assert expected is not None
                assert torch.equal(grad, expected), f"{name} when {wanted} are asked for"


@even_interpreted
@every_face
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("options", [EVERYTHING, Options(), Options(coord_agg=None)], ids=describe)
@pytest.mark.usefixtures("poison")
def test_gradients_from_some_outputs_only(
    options: Options, residual: bool, face: str, backend: str
) -> None:
    case, dtype = replace(full(backend), options=options, residual=residual), widest(backend)
    if backend in INTERPRETED_BACKENDS:
        case = replace(case, nodes=6, edges=20)
    problem = problem_of(case, face, dtype)
    exact = Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)
    names, leaves = tuple(problem.run(problem.leaves, backend, 0)), tuple(problem.leaves)
    orders = range(0 if dtype == torch.float64 else ORDERS)
    for k in range(1, len(names) + 1):
        for outputs in itertools.combinations(names, k):
            found = gradients(problem, leaves, outputs, backend)
            plain = [gradients(problem, leaves, outputs, "reference", order) for order in orders]
            for name, right in gradients(exact, leaves, outputs, "reference").items():
                got, label = found[name], f"{name} from {outputs}"
                # where the loss does not reach, neither gives a gradient
                assert (got is None) == (right is None), label
                if got is not None and right is not None:
                    errors = [checks.relative_error(present(p[name]), right) for p in plain]
                    allowed = checks.bound(dtype, errors)
                    assert checks.relative_error(got, right) <= allowed, label


def present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


@even_interpreted_dtypes
@every_face
def test_inputs_are_not_modified(dtype: torch.dtype, face: str, backend: str) -> None:
    problem = problem_of(full(backend), face, dtype)
    inputs = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    out = problem.run(inputs, backend, 0)
    torch.autograd.backward(list(out.values()), [torch.ones_like(t) for t in out.values()])
    for name, t in problem.leaves.items():
        assert torch.equal(inputs[name].detach(), t), name


@even_interpreted
def test_the_graph_is_not_modified(backend: str) -> None:
    case = full(backend)
    leaves, graph = case.layer(torch.float32).leaves, case.build_graph()
    parts = (graph.rowptr, graph.senders, graph.perm, graph.edge_index)
    before = [None if t is None else t.clone() for t in parts]
    weights = LayerWeights(**{k: leaves[k] for k in LayerWeights._fields if k in leaves})
    functional.egcl(
        leaves["h"].requires_grad_(), leaves["x"].requires_grad_(), graph, weights, EVERYTHING,
        edge_attr=leaves["edge_attr"], node_attr=leaves["node_attr"], v=leaves["v"],
        backend=backend,
    )[0].sum().backward()  # fmt: skip
    for part, kept in zip(parts, before, strict=True):
        assert part is not None
        assert kept is not None
        assert torch.equal(part, kept)


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T if t.dim() == 2 else t


def strided(t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, math.nan)), dim=-1)[..., 0]


def offset(t: Tensor) -> Tensor:
    """A view into a larger tensor that starts at an odd address for vectors."""
    return torch.cat((t.new_full((1,), math.nan), t.reshape(-1)))[1:].view(t.shape)


def window(t: Tensor) -> Tensor:
    """Columns of a wider matrix, as w_r and w_a are."""
    if t.dim() == 1:
        return torch.stack((torch.full_like(t, math.nan), t), dim=1)[:, 1]
    border = t.new_full((t.shape[0], 1), math.nan)
    return torch.cat((border, t, border), dim=1)[:, 1:-1]


@even_interpreted_dtypes
@every_face
@pytest.mark.parametrize("layout", [transposed, strided, offset, window])
def test_non_contiguous_inputs(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, face: str, backend: str
) -> None:
    problem = problem_of(full(backend), face, dtype)
    leaves = {k: layout(t) for k, t in problem.leaves.items()}
    for name, t in leaves.items():
        assert torch.equal(t, problem.leaves[name])
    found = with_gradients(problem, leaves, backend, layout)
    for name, right in with_gradients(problem, problem.leaves, backend, torch.clone).items():
        # around the kernel PyTorch may sum another layout in another order
        assert checks.relative_error(found[name], right) <= 8 * torch.finfo(dtype).eps, name


@even_interpreted
@every_face
def test_expanded_inputs(face: str, backend: str) -> None:
    problem = problem_of(full(backend), face, widest(backend))
    leaves = {k: t[..., :1].expand(t.shape) for k, t in problem.leaves.items()}
    found = with_gradients(problem, leaves, backend, lambda t: t[:1].expand(t.shape))
    plain = {k: t.contiguous() for k, t in leaves.items()}
    right = with_gradients(problem, plain, backend, lambda t: t[:1].expand(t.shape).contiguous())
    for name, t in right.items():
        assert torch.equal(found[name], t), name


def with_gradients(
    problem: Problem, leaves: dict[str, Tensor], backend: str, layout: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients; cotangents get the layout too."""
    inputs = {k: t.detach().requires_grad_() for k, t in leaves.items()}
    out = problem.run(inputs, backend, 0)
    draw = torch.Generator().manual_seed(5)
    towards = [layout(torch.randn(t.shape, generator=draw, dtype=t.dtype)) for t in out.values()]
    grads = torch.autograd.grad(list(out.values()), list(inputs.values()), towards)
    named = {f"gradient of {k}": g for k, g in zip(inputs, grads, strict=True)}
    return {k: t.detach() for k, t in out.items()} | named


@even_interpreted_dtypes
def test_masks_of_every_form(dtype: torch.dtype, backend: str) -> None:
    case = replace(full(backend), mask="binary")
    problem = case.edge_pass(dtype)
    right = problem.run(problem.leaves, "reference", 0)
    mask = problem.leaves["edge_mask"]
    for form in (mask, mask.unsqueeze(1), mask.bool(), mask.bool().unsqueeze(1)):
        found = problem.run(problem.leaves | {"edge_mask": form}, backend, 0)
        for name, t in right.items():
            assert checks.relative_error(found[name], t) < 1e-5, name


@every_backend
@every_dtype
@pytest.mark.parametrize("options", [Options(), EVERYTHING, Options(activation="relu")])
@pytest.mark.parametrize("leaf", ["P", "Q", "x", "edge_attr", "edge_mask", "w2", "w_x"])
def test_nan_comes_out_where_it_went_in(
    leaf: str, options: Options, dtype: torch.dtype, backend: str
) -> None:
    case = replace(FULL, options=options)
    problem = case.edge_pass(dtype)
    leaves = {k: t.clone() for k, t in problem.leaves.items()}
    leaves[leaf].view(-1)[0] = math.nan
    found = problem.run(leaves, backend, 0)
    for name, right in problem.run(leaves, "reference", 0).items():
        assert torch.equal(found[name].isnan(), right.isnan()), name
    assert any(t.isnan().any() for t in found.values())
    inputs = {k: t.requires_grad_() for k, t in leaves.items()}
    out = problem.run(inputs, backend, 0)
    total = torch.stack([t.sum() for t in out.values()]).sum()
    grads = torch.autograd.grad(total, list(inputs.values()))
    assert any(g.isnan().any() for g in grads)


@every_dtype
@pytest.mark.parametrize("leaf", ["P", "w_g", "b_g"])
def test_nan_with_any_bits_comes_out(leaf: str, dtype: torch.dtype) -> None:
    """NaN with any payload: the exponential turned some into numbers."""
    core = native.core
    assert core is not None
    problem = FULL.edge_pass(dtype)
    leaves = {k: t.clone() for k, t in problem.leaves.items()}
    largest = torch.tensor(math.inf, dtype=dtype)
    bits = largest.view(torch.int32 if dtype == torch.float32 else torch.int64)
    for sign, low in itertools.product((1, -1), (1, 0x155, 0x7FF, 0x3FFFFF)):
        leaves[leaf].view(-1)[0] = (bits + low).view(dtype).copysign(torch.tensor(sign))
        right = problem.run(leaves, "reference", 0)
        for isa in core.supported_instruction_sets():
            core.set_instruction_set(isa)
            found = problem.run(leaves, "cpu", 0)
            assert all(torch.equal(found[k].isnan(), t.isnan()) for k, t in right.items()), isa


@even_interpreted_dtypes
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_large_numbers_saturate_as_in_the_reference(
    size: float, dtype: torch.dtype, backend: str
) -> None:
    problem = Case("large", edges=60, hidden=20).edge_pass(dtype)
    leaves = problem.leaves | {k: problem.leaves[k] * size for k in ("P", "Q")}
    found = problem.run(leaves, backend, 0)
    for name, right in problem.run(leaves, "reference", 0).items():
        assert right.isfinite().all()
        assert checks.relative_error(found[name], right) < 1e-5, name


@even_interpreted
@pytest.mark.parametrize("options", [Options(coord_norm=n) for n in (None, "unit", 1.0)])
@pytest.mark.parametrize("graph", ["coincident", "loops", "isolated"])
def test_finite_through_second_order_at_coincident_points(
    graph: str, options: Options, backend: str
) -> None:
    case = Case("finite", graph, 10, 60, options=options, mask="soft", attrs=1)
    for dtype in (d for b, d in BACKENDS_AND_DTYPES if b == backend):
        for quantity, tensors in checks.evaluate(case.edge_pass(dtype), backend).items():
            for name, t in tensors.items():
                assert t.isfinite().all(), f"{quantity}: {name}"

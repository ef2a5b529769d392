"""The Triton kernels, by Triton's interpreter on the CPU, against the reference.

In float32, whose sums go through parts of bfloat16 as on a GPU, and in float16 under autocast.
Others are in test_tf32.py and test_bf16.py.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    EVERYTHING,
    INTERPRETED_BACKENDS,
    assert_passed,
    describe,
    kernel_calls,
    option_grid,
)
from triton_cases import CASES, LAYERS, SMALL

from egnn_fast import BackendError, Options, approximate_activations, checks
from egnn_fast.backends import Call, explain_call, info
from egnn_fast.checks import Row
from egnn_fast.checks.cases import ORDERS, Case, Problem
from egnn_fast.operators.precision import matmul_precision

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.usefixtures("one_thread", "bfloat16"),
    pytest.mark.skipif(not INTERPRETED_BACKENDS, reason="Triton's wheels are for Linux alone"),
]


def rows_of(case: Case, face: str = "edge_pass") -> list[Row]:
    """The case against the reference in float32; the kernels ran, forward and backward.

    A layer's second derivative runs its edge pass again: forward, backward for the first derivative
    and where that is differentiated; and backward through new features that a mask multiplies.
    """
    some = case.build_graph().num_edges > 0
    forward, backward = (1, 1) if face == "edge_pass" else (2, 3 + case.node_mask)
    with kernel_calls(forward * some, backward * some, backend="triton"):
        return list(
            checks.compare(getattr(case, face)(torch.float32), case.name, ["triton"], torch.float32)
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("poison")
def test_edge_pass(case: Case) -> None:
    if case.hidden > 1:
        assert_passed(rows_of(case))
        return
    # with one hidden unit sums are so ill-conditioned that a float32 error says nothing
    problem = case.edge_pass(torch.float32)
    with kernel_calls(1, 0, backend="triton"):
        found = problem.run(problem.leaves, "triton", 0)
    for name, right in problem.run(problem.leaves, "reference", 0).items():
        torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
@pytest.mark.usefixtures("poison")
def test_layer(case: Case) -> None:
    """A whole layer; its nodes are kernels, too."""
    from egnn_fast.backends import triton as triton_backend

    before = triton_backend.launches["nodes"]
    assert_passed(rows_of(case, "layer"))
    edges = case.build_graph().num_edges > 0
    # before and after the edges; before them again, backward
    found = triton_backend.launches["nodes"] - before
    assert found == (case.num_nodes > 0) * (2 + edges * (1 + case.node_mask))


@pytest.mark.usefixtures("poison")
def test_combinations_of_options() -> None:
    """Some of all, among which any two values of two options meet."""
    rows: list[Row] = []
    for options, mask, attrs in itertools.islice(option_grid(), 1, None, 11):
        name = f"{describe(options)} mask {mask} A{attrs}"
        case = Case(name, nodes=6, edges=16, hidden=9, options=options, mask=mask, attrs=attrs)
        rows += rows_of(case)
    assert len(rows) == 3 * 29
    assert_passed(rows)


@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
@pytest.mark.usefixtures("poison")
def test_any_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie within a program, that two share, and that go through many."""
    from egnn_fast.backends.triton import call

    monkeypatch.setattr(call, "_INTERPRETED_PROGRAMS", programs)
    for kind, nodes in (("uniform", 12), ("power", 4), ("hub", 5)):
        case = Case(f"{kind}, {programs} programs", kind, nodes, 140, options=EVERYTHING)
        assert_passed(rows_of(case))


@pytest.mark.parametrize("face", ["edge_pass", "layer"])
@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, edges=32),
        Case("H 33, no head", nodes=9, edges=32, hidden=33, options=Options(coord_agg=None)),
        Case("complete, relu", "complete", sizes=(4, 1, 5), options=Options(activation="relu")),
        # no clamp, whose slope jumps: with so many more values some lie beside it
        Case("wide", nodes=9, edges=32, hidden=136, options=replace(EVERYTHING, coord_clamp=None)),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.usefixtures("poison")
def test_float16_under_autocast(case: Case, face: str) -> None:
    """Within twice the error of the reference under the same autocast.

    Sums of so few roundings may come out right by chance: several draws say what the errors are.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    plain: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(4):
        problem = getattr(replace(case, seed=seed), face)(torch.float32)
        exact = Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)
        truth = checks.evaluate(exact, "reference")
        with torch.autocast("cpu", torch.float16):
            with kernel_calls(1 if face == "edge_pass" else 2, backend="triton"):
                runs = [(found, checks.evaluate(problem, "triton"))]
            runs += [(plain, checks.evaluate(problem, "reference", k)) for k in range(ORDERS)]
        for told, values in runs:
            for quantity, name in ((q, n) for q, tensors in truth.items() for n in tensors):
                error = checks.relative_error(values[quantity][name], truth[quantity][name])
                told[quantity, name].append(error)
    for key, errors in found.items():
        assert max(errors) <= checks.bound(torch.float32, plain[key]), key
    # products in float32 would be far more accurate
    assert max(max(errors) for errors in found.values()) > 1e-5


@pytest.mark.parametrize("low", [torch.float16, torch.float32])
def test_autocast_keeps_what_is_no_product_in_float32(low: torch.dtype) -> None:
    """P and Q come as they are; outputs, and gradients of what is float32, are float32."""
    problem = SMALL.edge_pass(torch.float32)
    leaves = {k: t.clone() for k, t in problem.leaves.items()}
    leaves |= {k: leaves[k].to(low) for k in ("P", "Q")}
    inputs = {k: t.requires_grad_() for k, t in leaves.items()}
    with torch.autocast("cpu", torch.float16), kernel_calls(1, 0, backend="triton"):
        out = problem.run(inputs, "triton", 0)
    assert {t.dtype for t in out.values()} == {torch.float32}
    torch.stack([t.sum() for t in out.values()]).sum().backward()
    for name, t in inputs.items():
        assert t.grad is not None, name
        assert t.grad.dtype == t.dtype, name


@pytest.mark.usefixtures("poison")
def test_wide_layers_run_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, rows and sums for the weights that go on in the next chunk; some finish together."""
    from egnn_fast.backends.triton import call, staged

    found: list[int] = []
    chunks = call.Call.chunks

    def counted(self: Any, *limits: int) -> list[tuple[int, int]]:
        bounds = chunks(self, *limits)
        found.append(len(bounds))
        return bounds

    monkeypatch.setattr(call.Call, "chunks", counted)
    monkeypatch.setattr(call, "CHUNK_BYTES", 4 * 4 * 136 * 40)
    monkeypatch.setattr(call, "FINISHED_TOGETHER", 2)
    monkeypatch.setattr(staged, "OUTER_EDGES", 16)
    for kind, options in (("uniform", EVERYTHING), ("power", Options()), ("hub", EVERYTHING)):
        case = Case(kind, kind, 20, 150, hidden=136, attrs=2, mask="soft", options=options)
        assert_passed(rows_of(case))
    assert found == [2, 5] * 3


@pytest.mark.parametrize("options", [EVERYTHING, Options(coord_agg=None)], ids=describe)
@pytest.mark.usefixtures("poison")
def test_a_gradient_of_stages_does_not_depend_on_what_else_is_asked_for(options: Options) -> None:
    case = replace(SMALL, nodes=6, edges=20, hidden=136, options=options)
    problem = case.edge_pass(torch.float32)

    def gradients(wanted: tuple[str, ...], outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
        leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in problem.leaves.items()}
        found = problem.run(leaves, "triton", 0)
        total = torch.stack([(found[k] * found[k]).sum() for k in outputs]).sum()
        grads = torch.autograd.grad(total, [leaves[k] for k in wanted], materialize_grads=True)
        return dict(zip(wanted, grads, strict=True))

    every = tuple(problem.leaves)
    for outputs in (("M", "X"), ("M",), ("X",)) if options.updates_coords else (("M",),):
        expected = gradients(every, outputs)
        for name in every:
            found = gradients((name,), outputs)[name]
            assert torch.equal(found, expected[name]), f"{name} of {outputs}"


@pytest.mark.parametrize("hidden", [64, 136])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dim", [3, 8])
@pytest.mark.parametrize(
    "options",
    [Options(), EVERYTHING, Options(activation="relu"), Options(coord_agg=None)],
    ids=describe,
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_row(
    value: float, dim: int, options: Options, hidden: int
) -> None:
    """The sums over receivers multiply by 0 what belongs to other rows."""
    case = replace(SMALL, nodes=7, edges=24, dim=dim, options=options, mask="binary", hidden=hidden)
    problem = case.edge_pass(torch.float32)
    for leaf in ("P", "Q", "x", "edge_attr"):
        leaves = {k: t.clone() for k, t in problem.leaves.items()}
        leaves[leaf].view(-1)[0] = value
        found = problem.run(leaves, "triton", 0)
        for name, right in problem.run(leaves, "reference", 0).items():
            broken, expected = (~t.isfinite() for t in (found[name], right))
            assert expected.any() or leaf == "x", f"{leaf}: {name}"
            assert torch.equal(broken.any(dim=1), expected.any(dim=1)), f"{leaf}: {name}"


def test_approximate_activations_are_asked_for() -> None:
    """The interpreter has no tanh of 11 bits: the formula around it is what runs here."""
    case = replace(SMALL, options=Options(attention=True))
    with approximate_activations():
        assert matmul_precision("cpu") == "highest~"
        assert_passed(rows_of(case))
        with approximate_activations(False):
            assert matmul_precision("cpu") == "highest"
    assert matmul_precision("cpu") == "highest"


def test_what_the_kernels_do_not_take_is_refused() -> None:
    for case, dtype, message in (
        (SMALL, torch.float64, r"take float32 \(bf16 and fp16 by autocast\), not torch.float64"),
        (SMALL, torch.float16, "take float32"),
        (replace(SMALL, hidden=257), torch.float32, "at most 256 hidden features"),
        (replace(SMALL, dim=17), torch.float32, "at most 16 coordinates"),
    ):
        for problem in (case.edge_pass(dtype), case.layer(dtype)):
            with (
                kernel_calls(0, 0, backend="triton"),
                pytest.raises(BackendError, match=f"'triton' cannot run this call: .*{message}"),
            ):
                problem.run(problem.leaves, "triton", 0)


def test_too_many_edges_are_refused_before_any_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from egnn_fast.backends.triton import call

    monkeypatch.setattr(call, "INT32_MAX", call.MAX_BLOCK + 60)
    for case in (replace(SMALL, edges=61), Case("many", "complete", sizes=(9,))):
        problem = case.edge_pass(torch.float32)
        with (
            kernel_calls(0, 0, backend="triton"),
            pytest.raises(ValueError, match=r"^graph: .* at most 60 edges, got (61|72)$"),
        ):
            problem.run(problem.leaves, "triton", 0)
    assert_passed(rows_of(replace(SMALL, edges=60)))


def test_auto_leaves_the_interpreter_alone() -> None:
    """It is there to check the kernels, not to be fast."""
    state = {line.name: line for line in info()}["triton"]
    assert state.available
    assert state.reason == "ready (interpreted on the CPU)"
    problem = SMALL.edge_pass(torch.float32)
    with kernel_calls(1, 0), kernel_calls(0, 0, backend="triton"):
        problem.run(problem.leaves, "auto", 0)
    call = Call("cpu", torch.float32, hidden=16, coord_dim=3, activation="silu")
    assert explain_call("triton", call).instruction_set == "interpreted on the CPU"
    assert explain_call("auto", call).backend == "cpu"

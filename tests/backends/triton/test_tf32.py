"""The Triton kernels at the precision "high", by the interpreter: operands rounded to tf32.

The matrix units drop the digits that the kernels rounded away, so here too the operands are tf32;
products are exact in both places. PyTorch's own products are rounded likewise, which says what
error is tf32's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from cases import EVERYTHING, INTERPRETED_BACKENDS, assert_passed, describe, kernel_calls
from triton_cases import SMALL

from bench.gpu import checks as suite  # the checkout's own folder, not installed
from bench.gpu import setting
from egnn_fast import Options, checks
from egnn_fast.checks import Row
from egnn_fast.checks.cases import Case
from egnn_fast.operators import messages

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.usefixtures("one_thread", "bfloat16"),
    pytest.mark.skipif(not INTERPRETED_BACKENDS, reason="Triton's wheels are for Linux alone"),
]
HALF_UNIT = setting.rounding("high")  # half a unit in the last place of tf32, for numbers at 1


@contextmanager
def tf32() -> Iterator[None]:
    """As where the user asked for "high"."""
    with (
        mock.patch.object(messages, "matmul_precision", return_value="high"),
        setting.Tf32Products() as mode,
    ):
        yield
        assert mode.seen > 0


def rows_of(case: Case, face: str = "edge_pass") -> list[Row]:
    """The case against the reference in float64; the kernels ran."""
    calls = (1, 1) if face == "edge_pass" else (2, 3)
    with kernel_calls(*calls, backend="triton"), tf32():
        problem = getattr(case, face)(torch.float32)
        compared = checks.compare(problem, case.name, ["triton"], torch.float32, rounding=HALF_UNIT)
        return list(compared)


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        Options(),
        Options(coord_agg=None),
        Options(activation="relu", attention=True),
        Options(activation="leaky_relu", negative_slope=0.3),
        Options(activation="leaky_relu", negative_slope=-1e6),
    ],
    ids=describe,
)
@pytest.mark.parametrize("hidden", [16, 33, 64])
@pytest.mark.usefixtures("poison")
def test_edge_pass(hidden: int, options: Options) -> None:
    rows = rows_of(replace(SMALL, hidden=hidden, options=options))
    assert_passed(rows)
    # the roundings did happen
    assert max(row.error for row in rows) > HALF_UNIT / 16


def test_layer() -> None:
    assert_passed(rows_of(SMALL, "layer"))


@pytest.mark.parametrize("hidden", [65, 128])
@pytest.mark.usefixtures("poison")
def test_sums_for_the_weights_in_memory(hidden: int) -> None:
    """One kernel backward at widths whose sums no registers hold, which float32 runs in stages."""
    from egnn_fast.kernels.blocks import blocks_for

    row = blocks_for("backward", "high", 128)
    assert row.in_memory == row.streamed == 2
    assert not row.staged
    assert_passed(rows_of(replace(SMALL, hidden=hidden)))


def test_the_precision_that_was_asked_for_reaches_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from egnn_fast.kernels.records import Spec

    found: list[tuple[str, str, bool]] = []
    make = Spec.of

    def of(**fields: Any) -> Spec:
        found.append((fields["DOT"], str(fields["OPERAND"]), fields["ROUND"]))
        return make(**fields)

    monkeypatch.setattr(Spec, "of", of)
    problem = replace(SMALL, edges=20).edge_pass(torch.float32)
    for precision in ("highest", "high"):
        monkeypatch.setattr(messages, "matmul_precision", lambda device, p=precision: p)
        problem.run(problem.leaves, "triton", 0)
    assert found == [("tf32x3", "fp32", False), ("tf32", "fp32", True)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3e38])
@pytest.mark.parametrize("leaf", ["edge_attr", "P", "x"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_slope_that_is_not_finite_stays_with_its_edges(leaf: str, value: float) -> None:
    """Slopes come back from shared memory by a product with the identity."""
    problem = replace(SMALL, mask=None, options=Options()).edge_pass(torch.float32)
    leaves = {k: t.clone() for k, t in problem.leaves.items()}
    leaves[leaf].view(-1)[0] = value
    leaves = {k: t.requires_grad_() for k, t in leaves.items()}
    broken = {}
    with tf32():
        for backend in ("triton", "reference"):
            out = problem.run(leaves, backend, 0)
            total = torch.stack([t.sum() for t in out.values()]).sum()
            grad = torch.autograd.grad(total, leaves["edge_attr"])[0]
            broken[backend] = ~grad.isfinite().all(dim=1)
    # rounded to tf32 a huge number may become infinite where float32's does not: never for others
    own = broken["reference"].clone()
    if leaf == "edge_attr":
        own[0] = True
    elif leaf == "P":
        own |= problem_edges(0)
    else:
        own |= problem_edges(0, senders=True)
    assert not (broken["triton"] & ~own).any()
    assert (broken["triton"] | ~broken["reference"]).all()


def problem_edges(node: int, senders: bool = False) -> torch.Tensor:
    """Which of the user's edges a node receives, or sends."""
    graph = replace(SMALL, mask=None, options=Options()).build_graph()
    found = graph.receivers == node
    if senders:
        found |= graph.sorted_senders() == node
    assert graph.perm is not None
    mine = torch.zeros_like(found)
    mine[graph.perm.long()] = found
    return mine


def test_rows_without_edges_may_hold_anything() -> None:
    """The cotangent of M where a node receives nothing, as of 0 / 0."""
    case = replace(SMALL, graph="isolated")
    for precision in ("highest", "high"):
        with mock.patch.object(messages, "matmul_precision", return_value=precision):
            found = gradients_with_nan(case, "triton")
            for name, right in gradients_with_nan(case, "reference").items():
                assert right.isfinite().all()
                assert found[name].isfinite().all(), f"{precision}: {name}"


def gradients_with_nan(case: Case, backend: str) -> dict[str, torch.Tensor]:
    problem = case.edge_pass(torch.float32)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    m = problem.run(leaves, backend, 0)["M"]
    lonely = case.build_graph().rowptr.diff() == 0
    assert lonely.any()
    cotangent = torch.where(lonely.unsqueeze(1), math.nan, torch.ones_like(m))
    names = [n for n in leaves if n not in ("w3", "b3", "w_x", "edge_mask")]
    grads = torch.autograd.grad(m, [leaves[n] for n in names], cotangent)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_the_suite_for_gpus_lets_pytorch_round_as_the_kernels_do(seed: int) -> None:
    """Against products of float32 nineteen draws of twenty fail, PyTorch's own in tf32 no less."""
    case = replace(
        SMALL, nodes=8, edges=40, hidden=33, dim=2, attrs=1, name="tiny", seed=seed
    )  # fmt: skip
    outcome = suite._case("edge pass", case, "high", setting.Setting("cpu"))
    assert (outcome.status, outcome.reason) == (setting.PASS, "")

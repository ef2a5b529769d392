"""The Triton kernels in bfloat16, by the interpreter with its bfloat16 put right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import INTERPRETED_BACKENDS, assert_passed, kernel_calls
from torch import Tensor
from triton_cases import CASES, LAYERS

from egnn_fast import checks
from egnn_fast.checks import Row
from egnn_fast.checks.cases import Case, Outputs, Problem, check_cases

if not INTERPRETED_BACKENDS:
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

import interpreter
import numpy as np
import triton
import triton.language as tl

# last: an installed package goes before the checkout
from bench.gpu import draws

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("one_thread", "bfloat16")]
UNIT = 2.0**-8  # half a unit in the last place of bfloat16, for numbers at 1


def problem_of(case: Case, face: str) -> Problem:
    """The case under autocast, which leaves float64 alone."""
    plain: Problem = getattr(case, face)(torch.float32)

    def run(leaves: dict[str, Tensor], backend: str, order: int) -> Outputs:
        with torch.autocast("cpu", torch.bfloat16):
            return plain.run(leaves, backend, order)

    return Problem(plain.leaves, run)


def rows_of(case: Case, face: str) -> list[Row]:
    """The case against the reference in float64; the kernels ran, forward and backward."""
    some = case.build_graph().num_edges > 0
    forward, backward = (1, 1) if face == "edge_pass" else (2, 3 + case.node_mask)
    problem = problem_of(case, face)
    with kernel_calls(forward * some, backward * some, backend="triton"):
        rows = list(checks.compare(problem, case.name, ["triton"], torch.float32, rounding=UNIT))
    if not draws.jumps(case.options):
        return rows
    return draws.judged(lambda seed: problem_of(replace(case, seed=seed), face), rows, UNIT)


STAGED_OPTIONS = ("wide, option relu", "wide, option everything")


def in_bf16(case: Case) -> bool:
    """Whether bfloat16 may do to a case what float32, in test_passes.py, does not.

    Stages compute options in float32, between products, and the list of edges has no dtype. With
    one hidden unit sums are so ill-conditioned that an error says nothing.
    """
    staged = case.name.startswith("wide, option ") and case.name not in STAGED_OPTIONS
    complete = case.name.startswith("option ") and case.name.endswith(", complete")
    return case.hidden > 1 and not staged and not complete


@pytest.mark.parametrize("case", [c for c in CASES if in_bf16(c)], ids=lambda case: case.name)
@pytest.mark.usefixtures("poison")
def test_edge_pass(case: Case) -> None:
    rows = rows_of(case, "edge_pass")
    assert_passed(rows)
    # the roundings did happen
    assert case.build_graph().num_edges == 0 or max(row.error for row in rows) > UNIT / 16


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
@pytest.mark.usefixtures("poison")
def test_layer(case: Case) -> None:
    assert_passed(rows_of(case, "layer"))


@pytest.mark.parametrize("case", check_cases(quick=False), ids=lambda case: case.name)
@pytest.mark.usefixtures("poison")
def test_cases_of_the_check(case: Case) -> None:
    """With fewer edges where there are many."""
    assert_passed(rows_of(replace(case, edges=min(case.edges, 80), sizes=case.sizes[:4]), "layer"))


# ---- the interpreter put right ------------------------------------------------------------------
@triton.jit
def _multiply(a, b, out, total, SIZE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at), tl.load(total + at), PRECISION)
    tl.store(out + at, product)


@triton.jit
def _convert(a, numbers, rounded, whole, widened, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(rounded + i, tl.load(a + i).to(tl.bfloat16))
    tl.store(whole + i, tl.load(numbers + i).to(tl.bfloat16))
    tl.store(widened + i, tl.load(a + i).to(tl.bfloat16).to(tl.float32))


@triton.jit
def _add(a, out):  # type: ignore[no-untyped-def]
    tl.store(out, tl.load(a) + tl.load(a))


def test_conversions_are_pytorchs() -> None:
    tie = 1 + 2.0**-8
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3.4e38, tie, tie + 2.0**-7, -tie]
    values = torch.cat((torch.tensor(special), torch.randn(54)))
    numbers = torch.arange(-20, 44)
    rounded, whole = (torch.empty(64, dtype=torch.bfloat16) for _ in range(2))
    widened = torch.empty(64)
    _convert[(1,)](values, numbers, rounded, whole, widened, SIZE=64)
    assert torch.equal(whole, numbers.bfloat16())
    torch.testing.assert_close(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(widened, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_products_are_those_of_the_values() -> None:
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    total, out = torch.randn(16, 16), torch.empty(16, 16)
    _multiply[(1,)](a, b, out, total, SIZE=16, PRECISION="tf32")
    torch.testing.assert_close(out, total + a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_arithmetic_of_bfloat16_is_refused() -> None:
    """The interpreter would add the bits."""
    with pytest.raises(Exception, match="bfloat16: the interpreter would add up its bits"):
        _add[(1,)](torch.ones(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16))


def exactly(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """``total + a @ b`` in float64."""
    return total.double() + a.double() @ b.double()


def towards_zero(values: Tensor) -> Tensor:
    return torch.from_numpy(interpreter.towards_zero(values.numpy()))


@pytest.mark.parametrize(
    ("dtype", "precision", "at_once"),
    [(torch.bfloat16, "tf32", 16), (torch.float16, "tf32", 16), (torch.float32, "tf32", 8)],
)
def test_sums_of_the_matrix_units(dtype: torch.dtype, precision: str, at_once: int) -> None:
    """Each instruction cuts off what it adds up, as test_towards_zero says."""
    # few digits, so that products are exact, and sums beyond 2^24, so that they are not
    a, b = (torch.randint(1, 64, (16, 16)).to(dtype) for _ in range(2))
    total, out = 2.0**24 + torch.randint(64, (16, 16)).float(), torch.empty(16, 16)
    with interpreter.truncation():
        _multiply[(1,)](a, b, out, total, SIZE=16, PRECISION=precision)
    right = total
    for k in range(0, 16, at_once):
        right = towards_zero(exactly(a[:, k : k + at_once], b[k : k + at_once], right))
    assert torch.equal(out, right)
    assert (out.double() < exactly(a, b, total)).any()


def test_sums_of_products_in_parts_are_rounded_to_nearest() -> None:
    """Triton adds them to the total outside the matrix units."""
    a, b = (torch.randint(1, 64, (16, 16)).float() for _ in range(2))
    total, out = 2.0**24 + torch.randint(64, (16, 16)).float(), torch.empty(16, 16)
    with interpreter.truncation():
        _multiply[(1,)](a, b, out, total, SIZE=16, PRECISION="tf32x3")
    assert torch.equal(out, exactly(a, b, total).float())


def test_towards_zero() -> None:
    unit = 2.0**-23
    values = np.array([1 + 0.9 * unit, -1 - 0.9 * unit, 1 - 0.1 * unit, 1.0, 0.0, math.inf])
    found = interpreter.towards_zero(values)
    assert found.dtype == np.float32
    assert found.tolist() == [1.0, -1.0, 1 - unit / 2, 1.0, 0.0, math.inf]

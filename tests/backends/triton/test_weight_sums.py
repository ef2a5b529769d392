"""Sums for the weights' gradients, where the matrix units round towards zero as tensor cores do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from cases import INTERPRETED_BACKENDS, kernel_calls
from torch import Tensor

from egnn_fast import checks
from egnn_fast.checks.cases import Case
from egnn_fast.operators import messages

if not INTERPRETED_BACKENDS:
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

import interpreter
import triton.language as tl

from egnn_fast.backends.triton import call
from egnn_fast.kernels import backward, gradients
from egnn_fast.kernels.blocks import Blocks

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("one_thread")]
# one program, with so large blocks that it takes seconds
EDGES, BLOCK = 8192, 1024
SHIPPED = gradients.FLUSH.value
WEIGHTS = ("w_r", "w2", "b2", "w3", "b3", "w_x")


@contextmanager
def one_program(precision: str, staged: bool) -> Iterator[None]:
    blocks = Blocks(BLOCK, 4, 1, 0, "a test's", staged=staged)
    with (
        mock.patch.object(call, "blocks_for", return_value=blocks),
        mock.patch.object(call, "CHUNK_BYTES", 1 << 30),
        mock.patch.object(call, "_INTERPRETED_PROGRAMS", 1),
        mock.patch.object(messages, "matmul_precision", return_value=precision),
    ):
        yield


def weight_gradients() -> dict[str, Tensor]:
    """Sums whose summands mostly have one sign, where a loss at each addition shows best."""
    problem = Case("hub", "hub", 64, EDGES).edge_pass(torch.float32)
    leaves = {k: t.clone().requires_grad_(k in WEIGHTS) for k, t in problem.leaves.items()}
    with kernel_calls(1, 1, backend="triton"):
        out = problem.run(leaves, "triton", 0)
        total = torch.stack([t.abs().sum() for t in out.values()]).sum()
        grads = torch.autograd.grad(total, [leaves[name] for name in WEIGHTS])
    return dict(zip(WEIGHTS, grads, strict=True))


def losses(edges: int) -> dict[str, float]:
    """How far the gradients lie from those of sums rounded to nearest, flushed after some edges."""
    with interpreter.bfloat16():
        right = weight_gradients()
    flush = tl.constexpr(edges)
    with (
        interpreter.truncation(),
        mock.patch.object(gradients, "FLUSH", flush),
        mock.patch.object(backward, "FLUSH", flush),
    ):
        found = weight_gradients()
    return {name: checks.relative_error(found[name], right[name]) for name in WEIGHTS}


@pytest.mark.parametrize(
    ("precision", "at_once", "staged"), [("bf16", 16, False), ("high", 8, False), ("high", 8, True)]
)
def test_long_sums_are_not_biased(precision: str, at_once: int, staged: bool) -> None:
    """An addition of ``at_once`` products loses less than a unit in the last place, 2^-23.

    Half of it on average, and of a total that is half of the final one on average: at most 2^-25 of
    that. To nearest, as the sums for the bound are rounded and those of flushes, a few units' half.
    """
    with one_program(precision, staged):
        shipped, never = losses(SHIPPED), losses(1 << 30)
    bound = SHIPPED / at_once * 2.0**-25 + 4 * 2.0**-24
    assert max(shipped.values()) < bound < 1e-5
    # in stages the matrices are the BLAS's; a sum of few digits is exact for longer
    biased = {name for name, loss in never.items() if loss > 1.5 * bound}
    assert biased >= ({"w_r", "w_x"} if staged else {"w_r", "w2", "w3", "w_x"})

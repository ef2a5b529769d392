"""Check outputs and gradients of a case before it is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egnn_fast import checks
from egnn_fast.bench import problems
from egnn_fast.bench.cases import FUSED, Case
from egnn_fast.bench.peers import PEERS, Runner

# A case with more edges is checked on a smaller graph of the same kind, with this many edges, so
# that the reference fits into memory.
CHECKED_EDGES, QUICK_EDGES = 320_000, 32_000
_ORDERS = 4  # random orders of the edges in which the baseline runs, besides the graph's own


class Check(NamedTuple):
    """The largest error of egnn_fast's outputs and gradients against the reference in float64.

    ``error`` is max|a - b| / max|b| of ``tensor``, the tensor with the largest ratio of error to
    bound. ``bound`` is that of ``egnn-fast check``. ``edges`` is the number of edges of the graph
    that was checked.
    """

    passed: bool
    error: float
    bound: float
    tensor: str
    edges: int


def check(case: Case, quick: bool = False) -> Check:
    """Compare egnn_fast with the reference on the case's own module and inputs.

    Parameters
    ----------
    case : Case
        The case.
    quick : bool
        Use a smaller graph.
    """
    problem = problems.build(case.at_most(QUICK_EDGES if quick else CHECKED_EDGES))
    exact = PEERS["reference"].build(problem.double())
    with torch.no_grad():
        outputs = exact.forward()
    # Cotangents with the outputs' signs: if a sum cancels, its relative error says little.
    cotangents = tuple(torch.where(out < 0, -1.0, 1.0).to(out.dtype) for out in outputs)
    truth = evaluate(exact, cotangents)
    baselines = [evaluate(runner, cotangents) for runner in _baselines(case, problem)]
    fused = evaluate(PEERS[FUSED].build(problem), cotangents)
    dtype: torch.dtype = getattr(torch, case.dtype)
    worst = Check(True, 0.0, checks.bound(dtype, [0.0]), "", problem.graph.num_edges)
    for name, right in truth.items():
        allowed = checks.bound(dtype, [checks.relative_error(p[name], right) for p in baselines])
        error = checks.relative_error(fused[name], right)
        # "not <=" rather than ">", so that NaN is the worst
        if not error / allowed <= worst.error / worst.bound:
            worst = Check(error <= allowed, error, allowed, name, worst.edges)
    return worst


def evaluate(runner: Runner, cotangents: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs and gradients by name.

    ``cotangents`` have the outputs' shapes, in any dtype.
    """
    outputs = runner.forward()
    converted = [t.to(out.dtype) for t, out in zip(cotangents, outputs, strict=True)]
    tensors = {f"output {k}": out.detach() for k, out in enumerate(outputs)}
    for name, grad in runner.gradients(outputs, converted).items():
        tensors[f"gradient of {name}"] = grad
    return tensors


def _baselines(case: Case, problem: problems.Problem) -> Iterator[Runner]:
    """Plain PyTorch in several orders of summation, to see how large its rounding errors are."""
    if case.dtype == "float64":  # the bound is a constant there
        return
    yield PEERS["reference"].build(problem)
    peer = "reference" if case.kind == "edges" else "official"
    for seed in range(_ORDERS):
        yield PEERS[peer].build(problem.shuffled(seed))

"""Whether what is timed computes the right numbers: outputs and gradients, before any speed-up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from egnn_fast import checks
from egnn_fast.bench import problems
from egnn_fast.bench.cases import FUSED, Case
from egnn_fast.bench.peers import PEERS, Runner

# more are checked on a graph of the same kind with so many: the reference must fit into memory
CHECKED_EDGES, QUICK_EDGES = 320_000, 32_000
_ORDERS = 4  # of the edges, besides the given one


class Check(NamedTuple):
    """How far egnn_fast lies from the reference in float64, over outputs and gradients.

    ``error`` is max|a - b| / max|b| of the tensor that goes furthest towards its ``bound``, which
    is that of ``egnn-fast check``; ``tensor`` names it. ``edges`` is the size it was found at.
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
        What is to be timed.
    quick : bool
        Be content with a smaller graph.
    """
    problem = problems.build(case.at_most(QUICK_EDGES if quick else CHECKED_EDGES))
    exact = PEERS["reference"].build(problem.double())
    with torch.no_grad():
        outputs = exact.forward()
    # cotangents with the outputs' signs: where a sum cancels, an error says little
    towards = tuple(torch.where(out < 0, -1.0, 1.0).to(out.dtype) for out in outputs)
    truth = evaluate(exact, towards)
    plain = [evaluate(runner, towards) for runner in _plain(case, problem)]
    found = evaluate(PEERS[FUSED].build(problem), towards)
    dtype: torch.dtype = getattr(torch, case.dtype)
    worst = Check(True, 0.0, checks.bound(dtype, [0.0]), "", problem.graph.num_edges)
    for name, right in truth.items():
        allowed = checks.bound(dtype, [checks.relative_error(p[name], right) for p in plain])
        error = checks.relative_error(found[name], right)
        # written so that NaN counts as the worst
        if not error / allowed <= worst.error / worst.bound:
            worst = Check(error <= allowed, error, allowed, name, worst.edges)
    return worst


def evaluate(runner: Runner, towards: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    outputs = runner.forward()
    cotangents = [t.to(out.dtype) for t, out in zip(towards, outputs, strict=True)]
    found = {f"output {k}": out.detach() for k, out in enumerate(outputs)}
    for name, grad in runner.gradients(outputs, cotangents).items():
        found[f"gradient of {name}"] = grad
    return found


def _plain(case: Case, problem: problems.Problem) -> Iterator[Runner]:
    """Plain PyTorch in several ways: what its roundings may come to."""
    if case.dtype == "float64":  # its bound is a constant
        return
    yield PEERS["reference"].build(problem)
    way = "reference" if case.kind == "edges" else "official"
    for seed in range(_ORDERS):
        yield PEERS[way].build(problem.shuffled(seed))

"""Errors over several draws, where a single one says little.

The slopes of a clamp and of ReLU jump. Where roundings move a value across, in plain PyTorch as
often as in a kernel, a gradient is off by an edge's whole part: few draws have such a value.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import torch

from egnn_fast import checks
from egnn_fast.checks.cases import Problem
from egnn_fast.options import Options

DRAWS, ORDERS = range(10, 17), 2  # seeds, and orders of summation in each


def jumps(options: Options) -> bool:
    """Whether a slope of the layer's functions jumps."""
    return options.coord_clamp is not None or options.activation != "silu"


def judged(
    problem_of: Callable[[int], Problem], rows: Sequence[checks.Row], rounding: float
) -> list[checks.Row]:
    """The rows of one draw; of quantities that failed, those of the medians over other draws.

    A row that is not finite stays: no rounding explains that.

    Parameters
    ----------
    problem_of : callable
        The same problem with the numbers of another seed.
    rows : sequence of Row
        What :func:`egnn_fast.checks.compare` says of the first draw.
    rounding : float
        See :func:`egnn_fast.checks.bound`.
    """
    in_doubt = {row.quantity for row in rows if not row.passed and math.isfinite(row.error)}
    kept = [row for row in rows if row.quantity not in in_doubt]
    return kept + (_medians(problem_of, rows[0].case, in_doubt, rounding) if in_doubt else [])


def _medians(
    problem_of: Callable[[int], Problem], case: str, quantities: Collection[str], rounding: float
) -> list[checks.Row]:
    """A row for each tensor of these quantities, with the median of its errors over DRAWS."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    plain: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in DRAWS:
        problem = problem_of(seed)
        exact = Problem({k: t.double() for k, t in problem.leaves.items()}, problem.run)
        truth = checks.evaluate(exact, "reference")
        own = checks.evaluate(problem, "triton")
        others = [checks.evaluate(problem, "reference", order) for order in range(ORDERS)]
        for quantity in quantities:
            for name, right in truth[quantity].items():
                key = quantity, name
                found[key].append(checks.relative_error(own[quantity][name], right))
                errors = (checks.relative_error(p[quantity][name], right) for p in others)
                plain[key].append(max(errors))
    return [
        checks.Row("triton", "float32", case, quantity, statistics.median(errors),
                   checks.bound(torch.float32, [statistics.median(plain[quantity, name])],
                                rounding), name)
        for (quantity, name), errors in found.items()
    ]  # fmt: skip

"""Does every backend compute what the reference computes? The work behind ``egnn-fast check``.

:func:`run` is the entry point; it returns a :class:`Report`::

    report = run(quick=True, progress=print)
    report.rows           # Row: backend, dtype, case, quantity, error, bound, worst, passed
    report.equivariance   # EquivarianceRow: backend, dtype, dim, symmetry, error, bound, passed
    report.missing        # {"triton": "why it was not checked", "triton, float64": "...", ...}
    report.passed         # False: exit with a non-zero status
    report.to_json()      # all of it as text

Quantities are outputs, the gradients of every input and every weight, and second-order gradients
(the derivative of a random combination of the gradients). An error is ``max|a - b| / max|b|`` of a
tensor, with b from the reference in float64; a row holds a quantity's worst tensor. In float64 at
most 1e-11 passes; below, twice the error that the reference makes in the same dtype (the largest
of several orders of summation, of more before a check fails), plus a few ulp.

A backend is called through :mod:`egnn_fast.functional`, the reference is
:mod:`egnn_fast.reference` itself: they share the Graph and no arithmetic but, in second
derivatives, what :mod:`egnn_fast.operators.second_order` takes from the reference.
"""

from egnn_fast.checks.compare import (
    FLOAT64_BOUND,
    MORE,
    QUANTITIES,
    SYMMETRIES,
    ULPS,
    bound,
    compare,
    equivariance,
    evaluate,
    relative_error,
)
from egnn_fast.checks.poison import poisoned_memory
from egnn_fast.checks.report import EquivarianceRow, Report, Row
from egnn_fast.checks.run import DIMS, DTYPES, THREADED_EDGES, run

__all__ = [
    "DIMS",
    "DTYPES",
    "FLOAT64_BOUND",
    "MORE",
    "QUANTITIES",
    "SYMMETRIES",
    "THREADED_EDGES",
    "ULPS",
    "EquivarianceRow",
    "Report",
    "Row",
    "bound",
    "compare",
    "equivariance",
    "evaluate",
    "poisoned_memory",
    "relative_error",
    "run",
]

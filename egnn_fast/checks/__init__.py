"""Compares every backend with the reference; ``egnn-fast check`` prints the result.

:func:`run` is the entry point; it returns a :class:`Report`::

    report = run(quick=True, progress=print)
    report.rows           # Row: backend, dtype, case, quantity, error, bound, worst, passed
    report.equivariance   # EquivarianceRow: backend, dtype, dim, symmetry, error, bound, passed
    report.missing        # {"triton": "why it was not checked", "triton, float64": "...", ...}
    report.passed         # whether everything passed; False if nothing was checked
    report.to_json()      # the whole report as text

The quantities are outputs, the gradients of every input and every weight, and second-order
gradients (the derivative of a random combination of the gradients). The error of a tensor a is
``max|a - b| / max|b|``, with b from the reference in float64; the row of a quantity has the tensor
whose error is largest relative to its bound. The bound is 1e-11 in float64. In other dtypes it is
twice the error of the reference in the same dtype, plus a few ulp. That error is the largest over
several orders of summation; before a check fails, more orders are tried.

Backends run through :mod:`egnn_fast.functional`, the reference through :mod:`egnn_fast.reference`
directly. They share the Graph, but no arithmetic, except that second derivatives of a backend use
the reference (:mod:`egnn_fast.operators.second_order`).
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

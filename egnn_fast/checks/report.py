"""The results of a check: a row for each comparison, and the report that holds them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch

from egnn_fast.backends import BACKENDS, instruction_set, unavailable


@dataclass(frozen=True)
class Row:
    """The error of one quantity of one case on a backend, against the reference.

    ``worst`` is the name of the tensor whose error is largest relative to its bound; ``error`` and
    ``bound`` are its.
    """

    backend: str
    dtype: str
    case: str
    quantity: str
    error: float
    bound: float
    worst: str

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class EquivarianceRow:
    """How far a layer is from equivariance under one symmetry, in D = ``dim`` dimensions."""

    backend: str
    dtype: str
    dim: int
    symmetry: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """The result of a check.

    ``missing`` says why a backend, or a dtype of a backend, was not checked.
    """

    rows: tuple[Row, ...]
    equivariance: tuple[EquivarianceRow, ...]
    missing: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether something was checked and all of it passed."""
        rows: list[Row | EquivarianceRow] = [*self.rows, *self.equivariance]
        return len(rows) > 0 and all(row.passed for row in rows)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON; an error that is not finite is written as null."""

        def record(row: Row | EquivarianceRow) -> dict[str, object]:
            error = row.error if math.isfinite(row.error) else None
            return {**asdict(row), "error": error, "passed": row.passed}

        content = {
            "passed": self.passed,
            "torch": torch.__version__,
            "instruction_sets": {
                name: instruction_set(name) for name in BACKENDS if unavailable(name) is None
            },
            "missing": self.missing,
            "seconds": self.seconds,
            "rows": [record(row) for row in self.rows],
            "equivariance": [record(row) for row in self.equivariance],
        }
        return json.dumps(content, indent=indent)

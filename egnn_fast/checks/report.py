"""The records of a check: a row for each comparison, and the report of all."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch

from egnn_fast.backends import BACKENDS, instruction_set, unavailable


@dataclass(frozen=True)
class Row:
    """How far one backend's quantity of one case lies from the reference."""

    backend: str
    dtype: str
    case: str
    quantity: str
    error: float
    bound: float
    worst: str  # the tensor with the largest error

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class EquivarianceRow:
    """How far a layer's output moves away from its input's symmetry."""

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
    """The result of a check."""

    rows: tuple[Row, ...]
    equivariance: tuple[EquivarianceRow, ...]
    missing: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether something was checked and all of it passed."""
        lines: list[Row | EquivarianceRow] = [*self.rows, *self.equivariance]
        return len(lines) > 0 and all(line.passed for line in lines)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON; a number that is none is written as null."""

        def record(line: Row | EquivarianceRow) -> dict[str, object]:
            error = line.error if math.isfinite(line.error) else None
            return {**asdict(line), "error": error, "passed": line.passed}

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

"""Records of a run's results, and their JSON. ``bench/README.md`` describes the fields."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import egnn_fast
from egnn_fast import backends
from egnn_fast.bench.cases import EAGER, FUSED
from egnn_fast.experiments.errors import ExperimentError
from egnn_fast.experiments.io import write_atomic

SCHEMA = 1


@dataclass(frozen=True)
class Environment:
    """Machine, versions and date of a run.

    ``load`` is the load average of the minute before the run, or None if the system has none. Times
    from a busy machine are less reliable.
    """

    cpu: str
    instruction_set: str
    threads: int
    torch: str
    egnn_fast: str
    commit: str | None
    date: str
    system: str
    python: str
    load: float | None

    @classmethod
    def here(cls) -> Environment:
        """The environment of this process."""
        return cls(
            cpu=_cpu_model(),
            instruction_set=backends.instruction_set("cpu"),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            egnn_fast=egnn_fast.__version__,
            commit=_commit(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        )


@dataclass(frozen=True)
class RateRow:
    """The rates that a case's floors were computed with: medians over its passes."""

    blas_gflops: float
    silu_g: float | None
    copy_gb: float


@dataclass(frozen=True)
class TimeRow:
    """One peer's time for one pass of one case.

    ``ratio`` is this time over that of egnn_fast in the same pass, so 1 for egnn_fast.
    ``gflops``, ``floor_s`` and ``floor_share`` are None for peers that compute another function.
    """

    measured: str
    peer: str
    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    best_s: float
    samples: int
    runs_per_sample: int
    ratio: float | None
    gflops: float | None
    floor_s: float | None
    floor_share: float | None


@dataclass(frozen=True)
class MemoryRow:
    """Peak memory of one peer in forward + backward; see :class:`egnn_fast.bench.memory.Memory`.

    ``node_tensors`` is ``peak_bytes`` in tensors ``[N, H]``.
    """

    peer: str
    peak_bytes: int | None
    node_tensors: float | None
    skipped: str | None


@dataclass(frozen=True)
class CheckRow:
    """See :class:`egnn_fast.bench.check.Check`; an error that is not finite is None."""

    passed: bool
    error: float | None
    bound: float
    tensor: str
    edges: int


@dataclass
class CaseResult:
    """All results of one case."""

    name: str
    about: str
    nodes: int
    edges: int
    hidden: int
    layers: int
    dtype: str
    check: CheckRow
    flop_per_byte: float
    rates: RateRow | None = None
    times: list[TimeRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def time(self, measured: str, peer: str) -> TimeRow | None:
        """The row of a pass and a peer; None if there is none.

        ``"eager"`` is the faster peer of ``EAGER``.
        """
        names = EAGER if peer == "eager" else (peer,)
        rows = [row for row in self.times if row.measured == measured and row.peer in names]
        return min(rows, key=lambda row: row.median_s, default=None)

    def peak(self, peer: str = FUSED) -> MemoryRow | None:
        """The memory of a peer; None if there is no row of it."""
        return next((row for row in self.memory if row.peer == peer), None)


@dataclass(frozen=True)
class Finding:
    """A figure that has a goal."""

    case: str
    what: str
    value: float
    unit: str
    goal: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the figure reaches its goal."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass
class Results:
    """A run of ``egnn-fast bench``."""

    environment: Environment
    quick: bool
    repeats: int
    cases: list[CaseResult] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every case passed its check."""
        return all(case.check.passed for case in self.cases)

    def rates(self) -> dict[tuple[str, int], RateRow]:
        """For each dtype and H, the rates of the case with the fastest BLAS."""
        fastest: dict[tuple[str, int], RateRow] = {}
        for case in self.cases:
            key = (case.dtype, case.hidden)
            best = fastest.get(key)
            if case.rates and (best is None or case.rates.blas_gflops > best.blas_gflops):
                fastest[key] = case.rates
        return fastest

    def to_json(self) -> str:
        """The content of ``results.json``."""
        content = asdict(self)
        for written, finding in zip(content["findings"], self.findings, strict=True):
            written["met"] = finding.met
        return json.dumps({"schema": SCHEMA, **content}, indent=1, allow_nan=False) + "\n"

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ExperimentError
            The file has no results of this schema.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError("its schema is another one")
            content["environment"] = Environment(**content["environment"])
            content["cases"] = [_case(row) for row in content["cases"]]
            for row in content["findings"]:
                del row["met"]
            content["findings"] = [Finding(**row) for row in content["findings"]]
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExperimentError(f"{path} holds no results of egnn-fast bench: {error}") from error


def _case(content: dict[str, Any]) -> CaseResult:
    content["check"] = CheckRow(**content["check"])
    content["rates"] = None if content["rates"] is None else RateRow(**content["rates"])
    content["times"] = [TimeRow(**row) for row in content["times"]]
    content["memory"] = [MemoryRow(**row) for row in content["memory"]]
    return CaseResult(**content)


def finite(value: float) -> float | None:
    """The value, or None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _commit() -> str | None:
    """The commit of the checkout, with "-dirty" if files have changed; None without a checkout."""
    folder = Path(egnn_fast.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

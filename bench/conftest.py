"""The table of cases for pytest-benchmark: ``python -m pytest bench --benchmark-only``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from egnn_fast.bench import check, floor, measure, memory, peers, problems
from egnn_fast.bench.cases import BACKWARD, CASES, FUSED, Case

ROUNDS = 7
Time = Callable[[Case, str, str], None]


def table(*kinds: str, passes: tuple[str, ...]) -> list[Any]:
    """``(case, pass, peer)`` for all cases of some kinds; egnn_fast first."""
    return [
        pytest.param(case, measured, peer, id=f"{case.name}-{measured}-{peer}".replace(" ", ""))
        for case in CASES
        if case.kind in kinds
        for measured in case.passes
        if measured in passes and measured != BACKWARD
        for peer in (FUSED, *case.against)
    ]


class Bench:
    """The case at hand: checked and built once for all its passes and peers."""

    def __init__(self) -> None:
        self.case: Case | None = None

    def runner(self, case: Case, peer: str) -> peers.Runner:
        """A peer on a case that passed its check."""
        if case is not self.case:
            self.problem = problems.build(case)
            self.check = check.check(case)
            self.case = case
        if not self.check.passed:
            pytest.fail(f"{case.name} is not timed: it failed its check, {self.check}")
        return peers.PEERS[peer].build(self.problem)


@pytest.fixture(scope="session")
def bench() -> Bench:
    """Shared by all, so that a case is built once."""
    return Bench()


@pytest.fixture
def time(benchmark: BenchmarkFixture, bench: Bench) -> Time:
    """Time one peer in one pass of one case."""

    def run(case: Case, measured: str, peer: str) -> None:
        reason = peers.PEERS[peer].missing() or memory.skipped(case, peer)
        if reason is not None:
            pytest.skip(reason)
        function = bench.runner(case, peer).timed(measured)
        benchmark.group = f"{case.name}: {measured}"
        work = floor.pass_work(case, measured)
        benchmark.extra_info |= {"edges": case.num_edges, "gflop": work.flop / 1e9}
        # pytest-benchmark's own calibration would take longest where a run takes a second
        runs = measure.runs_per_sample(function) if benchmark.enabled else 1
        benchmark.pedantic(function, rounds=ROUNDS, iterations=runs, warmup_rounds=1)

    return run

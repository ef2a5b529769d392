"""Compare the results of a run with its goals."""

from __future__ import annotations

from collections.abc import Iterator

from egnn_fast.bench.cases import (
    BACKWARD,
    CASES,
    FUSED,
    INFERENCE,
    RECORDING,
    TRAINING,
    Case,
)
from egnn_fast.bench.results import CaseResult, Finding

# the goal for peak memory: this many node tensors, and this many bytes more
MEMORY_TENSORS, MEMORY_EXTRA = 16, 64e6
GROWTH = 1.3  # the goal for the slowest over the fastest time per edge in a series
OVERHEAD = {INFERENCE: 25e-6, RECORDING: 60e-6}  # seconds that the edge operator may add
_SERIES = {
    "growth-": "slowest over fastest time per edge, {}",
    "degrees-": "slowest over fastest distribution of degrees, {}",
}


def findings(results: list[CaseResult]) -> list[Finding]:
    """All figures with a goal that these results contain, without cases that failed their check."""
    passed = {result.name: result for result in results if result.check.passed}
    figures: list[Finding] = []
    for case in CASES:
        if case.name in passed:
            result = passed[case.name]
            figures += [*_goals(case, result), *_overhead(case, result), *_memory(case, result)]
    for prefix, what in _SERIES.items():
        series = [result for name, result in passed.items() if name.startswith(prefix)]
        figures += _series(prefix + "*", what, series)
    return figures


def _goals(case: Case, result: CaseResult) -> Iterator[Finding]:
    for goal in case.goals:
        ours = result.time(goal.measured, FUSED)
        peer = result.time(goal.measured, goal.against)
        if goal.share is not None and ours is not None and ours.floor_share is not None:
            what = f"share of the floor, {goal.measured}"
            yield Finding(case.name, what, 100 * ours.floor_share, "%", 100 * goal.share, True)
        if goal.ratio is not None and peer is not None and peer.ratio is not None:
            what = f"times {goal.against}, {goal.measured}"
            yield Finding(case.name, what, peer.ratio, "x", goal.ratio, True)


def _overhead(case: Case, result: CaseResult) -> Iterator[Finding]:
    if case.kind != "overhead":
        return
    for measured in case.passes:
        whole, edge_op, nodes = (
            result.time(measured, name) for name in (FUSED, "edge-op", "node-ops")
        )
        if nodes is None:
            continue
        if edge_op is not None and measured in OVERHEAD:
            added = edge_op.median_s - nodes.median_s
            what = f"edge operator over node operations, {measured}"
            yield Finding(case.name, what, 1e6 * added, "µs", 1e6 * OVERHEAD[measured], False)
        if whole is not None:
            what = f"node operations over whole layer, {measured}"
            yield Finding(case.name, what, nodes.median_s / whole.median_s, "x", 1.0, True)


def _memory(case: Case, result: CaseResult) -> Iterator[Finding]:
    row = result.peak()
    if case.name == "memory" and row is not None and row.peak_bytes is not None:
        allowed = MEMORY_TENSORS * case.node_tensor_bytes + MEMORY_EXTRA
        what = "peak memory, forward + backward"
        yield Finding(case.name, what, row.peak_bytes / 1e6, "MB", allowed / 1e6, False)


def _series(name: str, what: str, series: list[CaseResult]) -> Iterator[Finding]:
    if len(series) < 2:
        return
    for measured in (INFERENCE, TRAINING, BACKWARD):
        rows = [(result, result.time(measured, FUSED)) for result in series]
        times = [row.median_s / result.edges for result, row in rows if row is not None]
        if len(times) == len(series):
            ratio = max(times) / min(times)
            yield Finding(name, what.format(measured), ratio, "x", GROWTH, False)

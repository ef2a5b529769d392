"""Run cases one after the other: check, time the peers in turn, measure memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from egnn_fast.bench import check as checking
from egnn_fast.bench import floor, measure, memory, peers, problems
from egnn_fast.bench.cases import BACKWARD, FUSED, Case
from egnn_fast.bench.findings import findings
from egnn_fast.bench.results import (
    CaseResult,
    CheckRow,
    Environment,
    MemoryRow,
    RateRow,
    Results,
    TimeRow,
    finite,
)

Tell = Callable[[str], None]


def run(
    cases: Sequence[Case],
    *,
    against: Sequence[str] | None = None,
    repeats: int = 7,
    quick: bool = False,
    tell: Tell = lambda line: None,
    save: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure cases on PyTorch's present number of threads.

    Parameters
    ----------
    cases : sequence of Case
        The cases.
    against : sequence of str, optional
        Names of peers; by default all peers of each case that can run here.
    repeats : int
        Samples of each function.
    quick : bool
        Leave out the peers that take a minute to compile, and check on smaller graphs.
    tell : callable
        Called with a line that says what is being done.
    save : callable
        Called with all results so far after each case.

    Raises
    ------
    UsageError
        A peer does not exist or cannot run here.
    """
    peers.check_names(against)
    results = Results(Environment.here(), quick, repeats)
    for case in cases:
        tell(f"{case.name}: checking")
        result = start(case, quick)
        results.cases.append(result)
        chosen, result.left_out = peers.chosen(case, against, quick)
        if result.check.passed:
            if case.passes:
                tell(f"{case.name}: timing {', '.join(peer.name for peer in chosen)}")
                _time(case, result, chosen, repeats)
            for name in case.memory:
                tell(f"{case.name}: memory of {name}")
                result.memory.append(_memory(case, name))
        results.findings = findings(results.cases)
        save(results)
    return results


def start(case: Case, quick: bool = False) -> CaseResult:
    """Check a case; returns a result with its sizes and the check, without times and memory."""
    check = checking.check(case, quick)
    row = CheckRow(check.passed, finite(check.error), check.bound, check.tensor, check.edges)
    work = floor.forward_work(case)
    return CaseResult(
        case.name,
        case.about,
        case.num_nodes,
        case.num_edges,
        case.hidden,
        case.layers,
        case.dtype,
        row,
        work.flop / work.bytes,
    )


def _time(
    case: Case,
    result: CaseResult,
    chosen: Sequence[peers.Peer],
    repeats: int,
) -> None:
    """Time all passes of a case and add the rows to ``result``."""
    probes = floor.Probes(case.dtype, case.hidden, torch.get_num_threads())
    problem = problems.build(case)
    runners = {}
    for peer in chosen:
        reason = memory.skipped(case, peer.name)
        if reason is None:
            runners[peer.name] = peer.build(problem)
        else:
            result.left_out[peer.name] = reason
    rates_of_passes: list[floor.Rates] = []
    for measured in case.passes:
        # the backward alone is timed for its share of the floor, so without peers
        names = [FUSED] if measured == BACKWARD else list(runners)
        functions = {name: runners[name].timed(measured) for name in names}
        timings = measure.alternate({**functions, **probes.functions()}, repeats)
        rates = probes.rates({name: timings.pop(name).median for name in probes.functions()})
        rates_of_passes.append(rates)
        result.times += [
            _row(case, measured, name, timing, timings[FUSED], rates)
            for name, timing in timings.items()
        ]
    result.rates = _rate_row(rates_of_passes)


def _rate_row(rates_of_passes: Sequence[floor.Rates]) -> RateRow:
    silu = [rates.silu for rates in rates_of_passes if rates.silu is not None]
    return RateRow(
        statistics.median(rates.blas for rates in rates_of_passes) / 1e9,
        statistics.median(silu) / 1e9 if silu else None,
        statistics.median(rates.copy for rates in rates_of_passes) / 1e9,
    )


def _row(
    case: Case,
    measured: str,
    name: str,
    timing: measure.Timing,
    ours: measure.Timing,
    rates: floor.Rates,
) -> TimeRow:
    work = floor.pass_work(case, measured)
    same = not peers.PEERS[name].differs
    floor_s = rates.seconds(work) if same else None
    return TimeRow(
        measured,
        name,
        *timing,
        ratio=timing.median / ours.median,
        gflops=work.flop / timing.median / 1e9 if same else None,
        floor_s=floor_s,
        floor_share=None if floor_s is None else floor_s / timing.median,
    )


def _memory(case: Case, name: str) -> MemoryRow:
    peak_bytes, skipped = memory.peak(case, name, torch.get_num_threads())
    tensors = None if peak_bytes is None else peak_bytes / case.node_tensor_bytes
    return MemoryRow(name, peak_bytes, tensors, skipped)

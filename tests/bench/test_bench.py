"""The benchmarks' own arithmetic: cases, floor, timing, check, findings."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from egnn_fast import checks
from egnn_fast.bench import cases, check, floor, measure, memory, peers, problems, report, run
from egnn_fast.bench.cases import BACKWARD, CASES, FUSED, INFERENCE, PASSES, STEP, TRAINING, Case
from egnn_fast.bench.findings import findings
from egnn_fast.bench.results import (
    CaseResult,
    CheckRow,
    Environment,
    MemoryRow,
    Results,
    TimeRow,
)
from egnn_fast.experiments.errors import UsageError

BY_NAME = {case.name: case for case in CASES}
KINDS = ("layer-64", "layer-64-float64", "edges-64", "nbody", "qm9", "overhead")


def small(name: str) -> Case:
    """A case in a size for tests."""
    case = BY_NAME[name]
    sizes = tuple(min(size, 6) for size in case.sizes[:3])
    return dataclasses.replace(case, sizes=sizes, hidden=16).at_most(320)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def test_the_table_has_what_was_asked_for() -> None:
    assert len(BY_NAME) == len(CASES)
    for name, hidden, dtype in (
        ("layer-64", 64, "float32"),
        ("layer-128", 128, "float32"),
        ("layer-64-float64", 64, "float64"),
    ):
        case = BY_NAME[name]
        assert (case.num_nodes, case.num_edges) == (10_000, 320_000)
        assert (case.hidden, case.dtype, case.layers) == (hidden, dtype, 1)
        assert {INFERENCE, TRAINING, BACKWARD} == set(case.passes)
    nbody, qm9 = BY_NAME["nbody"], BY_NAME["qm9"]
    assert (nbody.sizes, nbody.layers, nbody.attrs) == ((5,) * 100, 4, 2)
    assert (len(qm9.sizes), min(qm9.sizes), max(qm9.sizes)) == (96, 9, 29)
    assert (qm9.layers, qm9.hidden, qm9.attention, qm9.head) == (7, 128, True, False)
    for case in (nbody, qm9):
        assert set(case.passes) == {INFERENCE, STEP}
    growth = [case for case in CASES if case.name.startswith("growth-")]
    assert [growth[0].num_edges, growth[-1].num_edges] == [100_000, 20_000_000]
    assert all(case.num_edges == 32 * case.num_nodes for case in growth)
    degrees = [case for case in CASES if case.name.startswith("degrees-")]
    assert {case.graph for case in degrees} == {"uniform", "power", "hub"}
    assert {case.num_edges for case in degrees} == {320_000}
    assert BY_NAME["memory"].num_edges == 3_200_000
    assert BY_NAME["memory"].node_tensor_bytes == 100_000 * 64 * 4
    assert BY_NAME["overhead"].num_nodes == 20
    assert any(case.quick for case in CASES)


def test_every_peer_and_pass_of_the_table_exists() -> None:
    used = {name for case in CASES for name in (*case.against, *case.memory)}
    assert used | {FUSED} == set(peers.PEERS)
    assert {name for case in CASES for name in case.passes} == set(cases.PASSES)
    for case in CASES:
        assert all(goal.measured in case.passes for goal in case.goals)
        assert all(goal.against in ("eager", *case.against) for goal in case.goals)


@pytest.mark.parametrize("name", ["layer-64", "qm9", "degrees-hub", "degrees-power", "edges-64"])
def test_problems_have_the_size_that_the_table_says(name: str) -> None:
    case = BY_NAME[name].at_most(3200)
    graph = problems.build(case).graph
    assert (graph.num_nodes, graph.num_edges) == (case.num_nodes, case.num_edges)
    if case.graph == "hub":
        assert int(graph.degree.max()) == case.num_edges


def test_selection_of_cases() -> None:
    assert cases.select(None, False) == CASES
    assert all(case.quick for case in cases.select(None, True))
    assert [case.name for case in cases.select(["layer-*", "qm9"], True)] == [
        "layer-64",
        "layer-128",
        "layer-64-float64",
        "qm9",
    ]
    with pytest.raises(UsageError, match="--case: no case is called 'nothing'; there are layer-64"):
        cases.select(["layer-64", "nothing"], False)


def test_floor_of_a_layer_counted_by_hand() -> None:
    """H = 2, three nodes, four edges: every product written out."""
    case = Case("by hand", "", sizes=(), nodes=2, degree=2, hidden=2)
    forward = floor.forward_work(case)
    # an edge: W2 and W3, 2 x 2 multiply-adds each
    edges = 4 * 2 * (2 * 2 * 2)
    # a node: P and Q 2 x 4; phi_h 4 x 2 and 2 x 2 multiply-adds
    nodes = 2 * (2 * 2 * 4 + 2 * 4 * 2 + 2 * 2 * 2)
    assert forward.flop == edges + nodes == 64 + 80
    assert forward.activations == 4 * 3 * 2 + 2 * 2
    backward = floor.backward_work(case)
    assert backward.flop == 3 * forward.flop
    assert backward.activations == forward.activations
    assert floor.pass_work(case, TRAINING) == forward + backward
    assert floor.pass_work(case, BACKWARD) == backward
    assert floor.pass_work(case, INFERENCE) == forward


def test_floor_per_edge_is_that_of_the_formula() -> None:
    """4 H^2 flop and 3 H activations an edge forward, 12 H^2 and 3 H backward."""
    fewer, more = (Case("", "", nodes=10, degree=degree, hidden=64) for degree in (1, 2))
    for work, flop in ((floor.forward_work, 4), (floor.backward_work, 12)):
        one, two = work(fewer), work(more)
        assert two.flop - one.flop == 10 * flop * 64**2
        assert two.activations - one.activations == 10 * 3 * 64


def test_floor_without_head_with_velocity_and_with_layers() -> None:
    plain = Case("", "", nodes=10, degree=3, hidden=8)
    node_flop, edges = 10 * 10 * 8 * 8, 30
    headless = floor.forward_work(dataclasses.replace(plain, head=False, layers=7))
    assert headless.flop == 7 * (node_flop + edges * 2 * 8 * 8)
    assert headless.activations == 7 * (10 * 8 + edges * 2 * 8)
    moving = floor.forward_work(dataclasses.replace(plain, velocity=True))
    assert moving.flop - floor.forward_work(plain).flop == 10 * (2 * 8 * 8 + 2 * 8)
    assert moving.activations - floor.forward_work(plain).activations == 10 * 8
    alone = floor.forward_work(dataclasses.replace(plain, kind="edges"))
    assert alone.flop == edges * 4 * 8 * 8


def test_floor_in_seconds() -> None:
    rates = floor.Rates(blas=100e9, silu=2e9, copy=1e9)
    assert rates.seconds(floor.Work(flop=50e9, activations=1e9)) == pytest.approx(0.5 + 0.5)
    assert floor.Rates(100e9, None, 1e9).seconds(floor.Work(flop=1.0)) is None
    with pytest.raises(ValueError, match="threads: PyTorch runs on 1, got 7"):
        floor.Probes("float32", 64, 7)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "SQUARE", 128)
    monkeypatch.setattr(floor, "TALL", 512)
    monkeypatch.setattr(floor, "_COPY_BYTES", 1 << 20)
    probes = floor.Probes("float32", 16, 1)
    timings = measure.alternate(probes.functions(), 3, min_sample=1e-3)
    rates = probes.rates({name: timing.median for name, timing in timings.items()})
    assert 1e8 < rates.blas < 1e13
    assert rates.silu is not None
    assert 1e7 < rates.silu < 1e12
    assert 1e8 < rates.copy < 1e13


def test_timing_alternates_and_takes_medians() -> None:
    order: list[str] = []

    def run_of(name: str) -> Any:
        seconds = iter([9.0, 1.0, 2.0, 3.0, 100.0, 4.0])  # the first is the warm-up
        next_of = {"a": seconds, "b": iter([9.0, 9.0, 8.0, 8.0, 8.0, 8.0, 8.0])}[name]

        def step() -> float:
            order.append(name)
            return next(next_of)

        return step

    timings = measure.alternate({"a": run_of("a"), "b": run_of("b")}, 4, min_sample=0.0)
    assert order[4:] == ["a", "b"] * 4
    assert timings["a"].median == pytest.approx(3.5)
    assert (timings["a"].best, timings["a"].samples) == (2.0, 4)
    assert timings["b"].spread == 0
    assert timings["b"].runs_per_sample == 1


@pytest.mark.alone
def test_short_functions_run_several_times_in_a_sample() -> None:
    timing = measure.alternate({"": lambda: time.sleep(1e-4)}, 3, min_sample=3e-3)[""]
    assert timing.runs_per_sample > 5
    assert 1e-4 <= timing.median < 3e-3


@pytest.mark.alone
def test_peak_growth_sees_what_comes_and_goes() -> None:
    megabytes = 200
    grown = measure.peak_growth(lambda: float(torch.ones(megabytes * 250_000)[0]))
    if grown is not None:  # where the system tells
        assert 0.9 * megabytes < grown / 1e6 < 1.5 * megabytes


@pytest.mark.parametrize("name", KINDS)
def test_check_passes(name: str) -> None:
    found = check.check(small(name))
    assert found.passed
    assert 0 < found.error <= found.bound
    assert found.tensor


@pytest.mark.parametrize("name", [n for n in KINDS if n != "edges-64"])
def test_the_official_way_computes_the_same(name: str) -> None:
    problem = problems.build(dataclasses.replace(small(name), dtype="float64"))
    problem = problem.double()
    runners = [peers.PEERS[peer].build(problem) for peer in ("reference", "official")]
    runners.append(peers.PEERS["official"].build(problem.shuffled(1)))
    towards = tuple(torch.ones_like(out) for out in runners[0].forward())
    right, *others = (check.evaluate(runner, towards) for runner in runners)
    for other in others:
        assert other.keys() == right.keys()
        for key, value in right.items():
            assert checks.relative_error(other[key], value) < 1e-12, key


def test_the_edge_operator_between_node_operations_computes_the_same() -> None:
    problem = problems.build(small("overhead"))
    one, other = (peers.PEERS[name].build(problem).forward() for name in (FUSED, "edge-op"))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_every_pass_runs() -> None:
    for name in KINDS:
        case = small(name)
        problem = problems.build(case)
        for peer in peers.chosen(case, None, quick=True)[0]:
            for measured in case.passes:
                result = peer.build(problem).timed(measured)()
                assert isinstance(result, float) == (measured == BACKWARD)


def test_a_step_changes_the_weights() -> None:
    for name in ("nbody", "qm9"):
        problem = problems.build(small(name))
        module = problem.with_backend("cpu")
        before = {key: value.detach().clone() for key, value in module.named_parameters()}
        loss = problem.step(module)()
        assert math.isfinite(float(loss))
        changed = [key for key, value in module.named_parameters() if (value != before[key]).any()]
        assert len(changed) > len(before) / 2


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient is off by a thousandth: no times, no ratio, no goal."""
    right = peers.Runner.gradients

    def wrong(self: peers.Runner, *args: Any) -> dict[str, Tensor]:
        found = right(self, *args)
        if self.forward in spoiled:
            found["x"] = found["x"] * 1.001
        return found

    spoiled: list[Any] = []

    def build(problem: problems.Problem) -> peers.Runner:
        runner = fused.build(problem)
        spoiled.append(runner.forward)
        return runner

    fused = peers.PEERS[FUSED]
    monkeypatch.setitem(peers.PEERS, FUSED, fused._replace(build=build))
    monkeypatch.setattr(peers.Runner, "gradients", wrong)
    case = dataclasses.replace(small("layer-64"), memory=())
    results = run.run([case], repeats=1)
    (result,) = results.cases
    assert not results.passed
    assert not result.check.passed
    assert result.check.tensor == "gradient of x"
    assert result.times == []
    assert result.memory == []
    assert results.findings == []


def test_nan_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = peers.PEERS[FUSED]

    def build(problem: problems.Problem) -> peers.Runner:
        runner = fused.build(problem)
        forward = runner.forward
        return dataclasses.replace(runner, forward=lambda: tuple(o * math.nan for o in forward()))

    monkeypatch.setitem(peers.PEERS, FUSED, fused._replace(build=build))
    found = check.check(small("layer-64"))
    assert not found.passed
    assert math.isinf(found.error)


def test_memory_of_an_eager_layer_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_memory", lambda: 10**9)
    case = BY_NAME["memory"]
    found = memory.peak(case, "official", 1)
    assert found.peak_bytes is None
    assert found.skipped == "would need about 9 GB, 1 GB are free"
    assert memory.skipped(case, FUSED) is None
    assert memory.skipped(BY_NAME["layer-64"], "official") is None


def row(measured: str, peer: str, median: float, **fields: Any) -> TimeRow:
    values: dict[str, Any] = {"ratio": None, "gflops": None, "floor_s": None, "floor_share": None}
    values |= fields
    return TimeRow(measured, peer, median, median, median, median, 7, 1, **values)


def result_of(name: str, *times: TimeRow, **fields: Any) -> CaseResult:
    case = BY_NAME[name]
    ok = CheckRow(True, 0.0, 1.0, "x", 1)
    sizes = (case.num_nodes, case.num_edges, case.hidden, case.layers, case.dtype)
    return CaseResult(name, case.about, *sizes, ok, 1.0, None, list(times), **fields)


def test_findings_of_goals_take_the_faster_eager() -> None:
    result = result_of(
        "layer-64",
        row(INFERENCE, FUSED, 1.0, ratio=1.0, floor_share=0.9),
        row(INFERENCE, "reference", 9.0, ratio=9.0),
        row(INFERENCE, "official", 8.0, ratio=8.0),
    )
    found = {finding.what: finding for finding in findings([result])}
    assert found["times eager, inference"].value == 8.0
    assert not found["times eager, inference"].met
    assert found["share of the floor, inference"].met
    assert not any("compile" in what or "backward" in what for what in found)


def test_findings_of_overhead_memory_and_series() -> None:
    tiny = result_of(
        "overhead",
        row(INFERENCE, FUSED, 30e-6),
        row(INFERENCE, "edge-op", 70e-6),
        row(INFERENCE, "node-ops", 40e-6),
    )
    large = result_of("memory", memory=[MemoryRow(FUSED, 473_600_000, 18.5, None)])
    kinds = [
        result_of(f"degrees-{kind}", row(INFERENCE, FUSED, seconds))
        for kind, seconds in (("uniform", 1.0), ("power", 1.2), ("hub", 1.5))
    ]
    values = {(f.case, f.what): f for f in findings([tiny, large, *kinds])}
    overhead = values["overhead", "edge operator over node operations, inference"]
    assert overhead.value == pytest.approx(30)
    assert not overhead.met
    assert values["overhead", "node operations over whole layer, inference"].met
    peak = values["memory", "peak memory, forward + backward"]
    assert peak.goal == pytest.approx(16 * 25.6 + 64)
    assert peak.met
    (spread,) = [f for f in values.values() if f.case == "degrees-*"]
    assert spread.value == pytest.approx(1.5)
    assert not spread.met


def test_findings_leave_out_what_failed() -> None:
    result = result_of("layer-64", row(INFERENCE, FUSED, 1.0, floor_share=0.9))
    result.check = CheckRow(False, None, 1.0, "x", 1)
    assert findings([result]) == []


@pytest.mark.parametrize("name", list(BY_NAME))
def test_the_report_has_whole_words_on_80_columns(name: str) -> None:
    """Each pass by each peer, with figures as wide as they come."""
    wide = {"ratio": 88.8, "gflops": 88.88, "floor_share": 0.88}
    times = [row(p, peer, 88.8e-6, **wide) for p in PASSES for peer in peers.PEERS]
    memory = [MemoryRow(peer, 88_800_000_000, 77.7, None) for peer in peers.PEERS]
    result = result_of(name, *times, memory=memory)
    here = Environment("a CPU", "avx2", 2, "2.13", "0.1", "abc", "2026-01-01", "Linux", "3.11", 0.1)
    console = Console(width=80, file=io.StringIO())
    console.print(report.report(Results(here, True, 3, [result], findings([result]))))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    found = printed.split()
    for text in (*PASSES, "case, pass peer median spread ratio GFLOP/s floor peak N·H"):
        assert set(text.split()) <= set(found)
    rows = len(PASSES) * len(peers.PEERS)
    assert found.count("88%") == found.count("88.9") == rows
    assert found.count("88.8x") == rows - len(PASSES)
    assert found.count("77.7") == len(peers.PEERS)
    assert name in map(str.strip, printed.splitlines())
    for peer in peers.PEERS:
        assert peer in printed.replace("-\n", "-") or f"{peer.rpartition('-')[0]}-" in found

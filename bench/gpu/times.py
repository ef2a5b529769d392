"""Times by CUDA events, alternating between rivals; kernel by kernel; memory; the largest graph."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu import graphs
from bench.gpu.cases import (
    BY_NAME,
    IN_GRAPH,
    ORDERED,
    RIVALS,
    TimedCase,
    timed,
)
from bench.gpu.setting import PRECISIONS, Item, Outcome, Setting, deterministic, matmul
from bench.gpu.system import captured
from egnn_fast.bench import measure
from egnn_fast.bench.cases import FUSED, INFERENCE, TRAINING
from egnn_fast.nn import EGCL

if TYPE_CHECKING:
    from egnn_fast.bench.peers import Runner
    from egnn_fast.bench.problems import Problem

SECONDS = 2.0  # of samples of one pass of all peers
LEAST, MOST = 5, 40  # samples
_FLUSH_CACHES = 4  # how many times the L2 cache is written between two samples
_REACH_FIRST, _REACH_SECONDS = 8_000_000, 30.0
_PROFILED = 5  # runs
_FEW_NODES = 20_000
COMPILED = ("compile",)
Run = Callable[[], object]


class Clock:
    """Seconds of one run, the cache emptied before it.

    The writes that empty it keep the GPU busy while the first kernels are being launched.
    """

    def __init__(self, setting: Setting) -> None:
        self.on_gpu, self.waste = setting.on_gpu, torch.empty(0)
        if setting.on_gpu:
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self.waste = torch.empty(_FLUSH_CACHES * size // 4, device="cuda")

    def __call__(self, run: Run) -> Callable[[], float]:
        """A function that runs, and says how long it took."""
        return partial(self._on_gpu if self.on_gpu else self._on_cpu, run)

    def _on_gpu(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.waste.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def _on_cpu(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def alternate(runs: Mapping[str, Run], clock: Clock) -> dict[str, measure.Timing]:
    """Samples of each in turn, as many as fit into :data:`SECONDS`; all ran before."""
    functions = {name: clock(run) for name, run in runs.items()}
    once = sum(function() for function in functions.values())
    repeats = max(LEAST, min(MOST, int(SECONDS / once))) if clock.on_gpu else 2
    return measure.alternate(functions, repeats, min_sample=0.0)


def items(setting: Setting) -> Iterator[Item]:
    """Everything that is timed, in the order of its importance."""
    yield Item("rates", "times", _rates, 8, alone=True)
    cases = timed(setting)
    for case in cases:
        for precision in case.precisions:
            run = partial(_compile, case, precision)
            yield Item(f"compile: {case.name}: {precision}", "times", run, 15, 60)
    for case in cases:
        for precision in case.precisions:
            run = partial(_times, case, precision)
            yield Item(f"times: {case.name}: {precision}", "times", run, 10, 120, True)
        if case.name == "nbody":
            first = BY_NAME["edges-random-64"].precisions if setting.on_gpu else ("highest",)
            for precision in first:
                run = partial(_kernels, precision)
                yield Item(f"kernels: {precision}", "times", run, 6, alone=True)
    yield Item("reach", "times", _reach, 45, 150, True)
    for case in cases:
        for precision in case.compiled:
            run = partial(_against_compile, case, precision)
            name = f"times: {case.name} beside torch.compile: {precision}"
            yield Item(name, "times", run, 60, 150, True)


def _compile(case: TimedCase, precision: str, setting: Setting) -> Outcome:
    """What a timed case needs, on a small graph: others compile beside it."""
    from bench.gpu.problems import at, build, runner

    if setting.on_gpu and case.graph in ("random", "radius"):
        # so many that the kernels over nodes take the tiles of many
        case = replace(case, nodes=_FEW_NODES, degree=8, exactly=0)
    with matmul(precision):
        found = runner(at(build(case, setting), precision, setting.device), FUSED)
        for measured in case.passes:
            run = found.timed(measured)
            run()
            if measured == TRAINING and case.ordered:
                _ordered(run)()
    return Outcome()


def _times(case: TimedCase, precision: str, setting: Setting) -> Outcome:
    from bench.gpu.problems import at, build, runner

    outcome, clock = Outcome(), Clock(setting)
    with matmul(precision):
        problem = at(build(case, setting), precision, setting.device)
        names = [FUSED, *(RIVALS if case.kind != "edges" else RIVALS[:1])]
        runners = {name: runner(problem, name) for name in names}
        for name in case.memory if setting.on_gpu else ():
            _memory(outcome, case, problem, precision, name, runners[name])
        for measured in case.passes:
            runs = {name: found.timed(measured) for name, found in runners.items()}
            if measured == TRAINING and case.ordered:
                runs[ORDERED] = _ordered(runs[FUSED])
            if case.in_graph and setting.on_gpu:
                _add_captured(outcome, case, precision, measured, runners, runs)
            _time(outcome, case, problem, precision, measured, runs, clock)
    return outcome


def _against_compile(case: TimedCase, precision: str, setting: Setting) -> Outcome:
    from bench.gpu.problems import at, build, runner

    outcome, clock = Outcome(), Clock(setting)
    with matmul(precision):
        problem = at(build(case, setting), precision, setting.device)
        runners = {name: runner(problem, name) for name in (FUSED, "compile")}
        for measured in case.passes:
            runs = {name: found.timed(measured) for name, found in runners.items()}
            _time(outcome, case, problem, precision, measured, runs, clock)
    return outcome


def _ordered(run: Run) -> Run:
    def inner() -> object:
        with deterministic():
            return run()

    return inner


def _add_captured(
    outcome: Outcome, case: TimedCase, precision: str, measured: str,
    runners: Mapping[str, Runner], runs: dict[str, Run],
) -> None:  # fmt: skip
    """The same passes as CUDA graphs, where they can be captured."""
    for name in (FUSED, "official"):
        run = torch.no_grad()(runners[name].forward) if measured == INFERENCE else runs[name]
        try:
            graph, held = captured(run)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if name == FUSED:
                outcome.fail(f"{measured} cannot be captured: {reason}")
            _left_out(outcome, case, precision, measured, name + IN_GRAPH, reason)
            torch.cuda.synchronize()
            continue
        runs[name + IN_GRAPH] = partial(_replay, graph, held)


def _replay(graph: torch.cuda.CUDAGraph, held: Any) -> None:
    graph.replay()


def _time(
    outcome: Outcome, case: TimedCase, problem: Problem, precision: str, measured: str,
    runs: Mapping[str, Run], clock: Clock,
) -> None:  # fmt: skip
    """Rows of one pass; a peer that does not fit into memory is left out."""
    usable: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            for _ in range(2):
                run()
            if clock.on_gpu:
                torch.cuda.synchronize()
            usable[name] = run
        except torch.OutOfMemoryError:
            _left_out(outcome, case, precision, measured, name, "out of memory")
        except Exception as error:
            if name not in RIVALS + COMPILED:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            _left_out(outcome, case, precision, measured, name, reason)
        _collect(clock.on_gpu)
    if FUSED not in usable:
        outcome.fail(f"{measured}: out of memory")
    for name, timing in alternate(usable, clock).items() if usable else ():
        outcome.add(
            "times", case=case.name, kind=case.kind, nodes=problem.graph.num_nodes,
            edges=problem.graph.num_edges, hidden=case.hidden, layers=case.layers,
            precision=precision, measured=measured, peer=name, median_s=timing.median,
            lower_quartile_s=timing.lower_quartile, upper_quartile_s=timing.upper_quartile,
            best_s=timing.best, samples=timing.samples,
        )  # fmt: skip


def _left_out(
    outcome: Outcome, case: TimedCase, precision: str, measured: str, peer: str, reason: str
) -> None:
    outcome.add(
        "left_out", case=case.name, precision=precision, measured=measured, peer=peer,
        reason=reason,
    )  # fmt: skip


def _memory(
    outcome: Outcome, case: TimedCase, problem: Problem, precision: str, peer: str, found: Runner
) -> None:
    """What forward + backward allocates at most, beyond what was there before."""
    run = found.timed(TRAINING)
    nodes, hidden = problem.graph.num_nodes, case.hidden
    try:
        run()  # what the graph keeps is not counted
        _collect(True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        _collect(True)
        _left_out(outcome, case, precision, "peak memory", peer, "out of memory")
        return
    outcome.add(
        "memory", case=case.name, precision=precision, peer=peer, peak_bytes=peak,
        node_tensors=peak / (4 * nodes * hidden),
    )  # fmt: skip


def _collect(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def _rates(setting: Setting) -> Outcome:
    """What the GPU reaches: a large copy, and large products in each precision."""
    outcome, clock = Outcome(), Clock(setting)
    side, count = (8192, 1 << 30) if setting.on_gpu else (64, 1 << 16)
    source = torch.ones(count // 4, device=setting.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    seconds = alternate({"copy": copy}, clock)["copy"].median
    outcome.add("rates", what="copy", value=2 * count / seconds, unit="bytes/s")
    for precision in PRECISIONS:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        a, b = (torch.randn(side, side, device=setting.device).to(kind) for _ in range(2))
        run: Run = partial(torch.mm, a, b)
        with matmul(precision):
            run()
            seconds = alternate({"mm": run}, clock)["mm"].median
        outcome.add("rates", what=precision, value=2 * side**3 / seconds, unit="flop/s")
    return outcome


def _kernels(precision: str, setting: Setting) -> Outcome:
    """What each kernel takes in forward and backward of the large edge pass."""
    from bench.gpu.problems import at, build, runner

    outcome = Outcome()
    (case,) = (case for case in timed(setting) if case.name == "edges-random-64")
    with matmul(precision):
        problem = at(build(case, setting), precision, setting.device)
        found = runner(problem, FUSED)
        for about, run in (
            (TRAINING, found.timed(TRAINING)), (ORDERED, _ordered(found.timed(TRAINING))),
        ):  # fmt: skip
            for _ in range(2):
                run()
            for name, calls, seconds in profiled(run, setting):
                outcome.add(
                    "kernels", case=case.name, precision=precision, what=about, kernel=name,
                    calls_per_run=calls, seconds_per_run=seconds,
                )  # fmt: skip
    return outcome


def profiled(run: Run, setting: Setting, most: int = 20) -> list[tuple[str, float, float]]:
    """``(kernel, calls, seconds)`` of a run, those that take longest first, at most so many."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        for _ in range(_PROFILED):
            run()
        if setting.on_gpu:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if setting.on_gpu else "self_cpu_time_total"
    found = [
        (event.key[:120], event.count / _PROFILED, getattr(event, attribute, 0.0) / 1e6 / _PROFILED)
        for event in profiler.key_averages()
    ]
    found = sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])
    return found[:most]


def _reach(setting: Setting) -> Outcome:
    """The largest graph on which a layer trains, by doubling; H = 64, 32 senders for each node."""
    outcome, hidden, degree = Outcome(), 64, 32
    first = _REACH_FIRST if setting.on_gpu else 32
    for peer in ("triton", "reference"):
        most, limit, end = 0, "the time for the search is over", time.monotonic() + _REACH_SECONDS
        edges, took = first, 0.0
        while time.monotonic() + 3 * took < end and (setting.on_gpu or edges <= 4 * first):
            begin = time.monotonic()
            try:
                _train_once(edges // degree, degree, hidden, peer, setting)
            except torch.OutOfMemoryError:
                limit = f"out of memory at {edges:,} edges"
                break
            except ValueError as error:  # more edges than 32 bits count
                limit = f"refused at {edges:,} edges: {error}"
                break
            finally:
                _collect(setting.on_gpu)
            took, most, edges = time.monotonic() - begin, edges, 2 * edges
        outcome.add("reach", peer=FUSED if peer == "triton" else peer, edges=most, hidden=hidden,
                    precision="highest", limit=limit)  # fmt: skip
    return outcome


def _train_once(nodes: int, degree: int, hidden: int, backend: str, setting: Setting) -> None:
    graph = graphs.regular_graph(nodes, degree, setting.device)
    layer = EGCL(hidden, hidden, hidden, backend=backend, device=setting.device)
    h = torch.randn(nodes, hidden, device=setting.device, requires_grad=True)
    x = torch.randn(nodes, 3, device=setting.device, requires_grad=True)
    with matmul("highest"):
        new_h, new_x = layer(h, x, graph)
        torch.autograd.backward([new_h, new_x], [torch.ones_like(new_h), torch.ones_like(new_x)])
    if setting.on_gpu:
        torch.cuda.synchronize()

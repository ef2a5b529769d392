"""Block sizes by trial: which of them are right, which the fastest; rows for ``kernels/blocks.py``.

Every candidate first runs in a child, several side by side, which compiles and checks it. Then
those that were right are timed one after the other, from the compiler's cache.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu import graphs
from bench.gpu.checks import judge_tensors
from bench.gpu.large import Pass
from bench.gpu.setting import Item, Outcome, Setting, autocast, matmul
from egnn_fast import functional
from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights

EDGES = (16, 32, 64, 128)
WARPS = (4, 8)
PROGRAMS = {4: (1, 2, 3, 4), 8: (1, 2)}  # of a multiprocessor, by their warps
WIDTHS = (64, 128, 256)
PRECISIONS = ("bf16", "high", "highest")
_SHARED = 4_000_000  # edges of the graph that all are tried on, N = E / 32
_SAMPLES = 7
# environment variable with the names of candidates, as JSON, that are not to be timed
WRONG = "EGNN_FAST_SUITE_WRONG"


class Target(NamedTuple):
    """A row of the table: ``direction`` is "forward" or "backward"."""

    direction: str
    precision: str
    width: int

    @property
    def name(self) -> str:
        """As ``--case`` calls it."""
        return f"{self.direction} {self.precision} {self.width}"


class Shape(NamedTuple):
    """What a kernel is compiled for; how many programs run it is free."""

    edges: int
    warps: int
    in_memory: int
    streamed: int = 0
    staged: bool = False
    split: str = "tf32x3"
    paired: bool = True
    shared_slopes: int = 0
    prefetch: bool = False

    @property
    def name(self) -> str:
        """For people."""
        name = f"{self.edges} edges, {self.warps} warps"
        name += f", {self.in_memory} sums in memory" * (self.in_memory > 0)
        name += f", {self.streamed} weights streamed" * (self.streamed > 0)
        name += ", in stages" * self.staged + f", {self.split}" * (self.split != "tf32x3")
        name += f", slopes of {self.shared_slopes} shared" * (self.shared_slopes > 0)
        name += ", rows prefetched" * self.prefetch
        return name + ", a reciprocal for each activation" * (not self.paired)


def targets(setting: Setting) -> list[Target]:
    """All rows, the most used first."""
    if not setting.on_gpu:
        return [Target("forward", "highest", 16), Target("backward", "highest", 16)]
    widths = WIDTHS[:1] if setting.quick else WIDTHS
    return [
        Target(direction, precision, width)
        for width, precision in itertools.product(widths, PRECISIONS)
        for direction in ("forward", "backward")
    ]


def shapes(target: Target, setting: Setting) -> list[Shape]:
    """What is tried for a row."""
    if not setting.on_gpu:
        return [Shape(16, 4, 2 if target.direction == "backward" else 0), Shape(32, 4, 0)]
    backward = target.direction == "backward"
    # weights are loaded again for each block only where they do not fit into shared memory
    streams = (0,) if target.width <= 64 else (0, 1, 2)
    splits = ("tf32x3", "bf16x6") if target.precision == "highest" else ("tf32x3",)
    # on an H200 prefetching gained in each precision backward, and nothing forward (NOTES)
    prefetching = (True, False) if backward else (False,)
    # what is moved out of registers: sums, or slopes where these can be shared
    relieved = [(0, 0)] + [(1, 0), (2, 0)] * backward
    if backward and target.precision != "highest":
        relieved += [(0, 1), (0, 2), (1, 1)]
    found = [
        Shape(edges, warps, in_memory, streamed, False, split, paired, slopes, prefetch)
        for edges, warps, (in_memory, slopes), streamed, split, paired, prefetch in (
            itertools.product(EDGES, WARPS, relieved, streams, splits, (False, True), prefetching)
        )
    ]
    # tiles of [edges, width] that no multiprocessor holds; from 128 on stages may be faster
    staged = [Shape(*values, 0, 0, True) for values in itertools.product(EDGES, WARPS)]
    found = found * (target.width <= 128) + staged * (target.width >= 128)
    return [shape for shape in found if shape.edges * target.width <= 16_384]


def candidate_items(setting: Setting) -> Iterator[Item]:
    """The trials."""
    for target in targets(setting):
        for shape in shapes(target, setting):
            yield Item(candidate(target, shape), "tune", partial(_try, target, shape), 10, 100)


def candidate(target: Target, shape: Shape) -> str:
    """The name of a trial."""
    return f"candidate: {target.name}: {shape.name}"


def timing_items(setting: Setting) -> Iterator[Item]:
    """The races among those that were right."""
    for target in targets(setting):
        yield Item(f"tune: {target.name}", "tune", partial(_race, target), 6, 120, True)


@contextmanager
def override(direction: str, blocks: Any) -> Iterator[None]:
    """Launch one direction with other blocks."""
    from egnn_fast.backends.triton import call

    module: Any = call
    before = module.blocks_for

    def chosen(asked: str, precision: str, width: int, arch: str = "sm_90") -> Any:
        return blocks if asked == direction else before(asked, precision, width, arch)

    module.blocks_for = chosen
    try:
        yield
    finally:
        module.blocks_for = before


def _problem(target: Target, setting: Setting) -> Pass:
    edges = _SHARED if setting.on_gpu else 60
    nodes = max(edges // 32, 8)
    return Pass(graphs.random_graph(nodes, edges, setting.device), target.width)


def _blocks(shape: Shape, programs: int, source: str = "") -> Any:
    from egnn_fast.kernels.blocks import Blocks

    return Blocks(programs=programs, source=source, **shape._asdict())


def _try(target: Target, shape: Shape, setting: Setting) -> Outcome:
    """Compile and check a candidate."""
    from egnn_fast.backends.triton import launches

    outcome, problem = Outcome(), _problem(target, setting)
    with matmul(target.precision):
        plain, truth = problem.reference(target.precision), problem.reference(None)
        # the registers of a thread, so the compiled code, may depend on the programs
        for programs in _programs(shape, setting):
            staged = launches["staged"]
            with override(target.direction, _blocks(shape, programs)):
                found = problem.kernel(target.precision)
            if not shape.staged and launches["staged"] != staged:
                outcome.fail(f"{programs} programs: does not fit, ran in stages")
            name = f"{target.name}, {shape.name}, {programs} programs"
            judge_tensors(outcome, target.precision, "edge pass", name, found, [plain], truth)
    return outcome


def _programs(shape: Shape, setting: Setting) -> tuple[int, ...]:
    return PROGRAMS[shape.warps] if setting.on_gpu else (1,)


def _row(target: Target, shape: Shape) -> dict[str, Any]:
    return {**target._asdict(), **shape._asdict()}


def _race(target: Target, setting: Setting) -> Outcome:
    """Time every candidate that was right."""
    from bench.gpu.times import Clock
    from egnn_fast.bench import measure

    outcome, clock, problem = Outcome(), Clock(setting), _problem(target, setting)
    wrong = json.loads(os.environ.get(WRONG, "[]"))
    runs = {}
    with matmul(target.precision):
        for shape in shapes(target, setting):
            if candidate(target, shape) in wrong:
                continue
            for programs in _programs(shape, setting):
                run = partial(_run, problem, target, _blocks(shape, programs))
                runs[json.dumps([*shape, programs])] = clock(run)
        timings = measure.alternate(runs, _SAMPLES if setting.on_gpu else 1, min_sample=0.0)
    for key, timing in timings.items():
        *values, programs = json.loads(key)
        outcome.add("tune", **_row(target, Shape(*values)), programs=programs,
                    median_s=timing.median)  # fmt: skip
    return outcome


def _run(problem: Pass, target: Target, blocks: Any) -> None:
    """One pass of the kernels: forward alone, or both with the same forward each time."""
    needs_grad = target.direction == "backward"
    leaves: dict[str, Tensor] = {
        k: t.detach().requires_grad_(needs_grad) for k, t in problem.leaves.items()
    }
    weights = EdgeWeights(
        leaves["w_r"], None, leaves["w2"], leaves["b2"], w3=leaves["w3"], b3=leaves["b3"],
        w_x=leaves["w_x"],
    )  # fmt: skip
    with (
        override(target.direction, blocks),
        autocast(target.precision, problem.graph.device.type),
    ):
        m, x = functional.egcl_messages(
            leaves["P"], leaves["Q"], leaves["x"], problem.graph, weights, Options(),
            backend="triton",
        )  # fmt: skip
        if needs_grad:
            assert x is not None
            torch.autograd.grad([m, x], list(leaves.values()), problem.towards)


def winners(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest candidate of each target."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        target = Target(row["direction"], row["precision"], row["width"])
        known = best.get(target)
        if known is None or row["median_s"] < known["median_s"]:
            best[target] = row
    return [best[target] for target in sorted(best)]


def table_rows(rows: Sequence[dict[str, Any]], gpu: str, date: str) -> list[str]:
    """Lines for ``kernels/blocks.py``."""
    from egnn_fast.kernels.blocks import Blocks

    usual = Blocks._field_defaults
    lines = []
    for row in winners(rows):
        kind = "16" if row["precision"] == "bf16" else row["precision"]
        values = [row["edges"], row["warps"], row["programs"], row["in_memory"]]
        source = f'"measured: {gpu}, {date}"'
        more = [f"{n}={row[n]!r}".replace("'", '"') for n in usual if row[n] != usual[n]]
        given = ", ".join([*map(str, values), source, *more])
        lines.append(f'("{row["direction"]}", "{kind}", {row["width"]}): Blocks({given}),')
    return lines

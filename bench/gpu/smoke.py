"""Which variant of the compiler is right, and which of those is the fastest.

Few cases, each with every variant: enough edges that a program runs several blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench.gpu import graphs, triage
from bench.gpu.checks import EVERYTHING, at, judge_tensors, launched
from bench.gpu.large import Pass
from bench.gpu.setting import Item, Outcome, Setting, matmul, synchronize
from bench.gpu.variants import NAMES
from egnn_fast import checks
from egnn_fast.checks.cases import Case

ORDERS = 3  # orders of summation, from which plain PyTorch's error is estimated
EDGES = 300_000  # on an H200 some ten blocks for each program
_SPEED_EDGES, _SPEED_SAMPLES = 4_000_000, 7
SPEEDS = ("bf16", "high", "highest")


@dataclass(frozen=True)
class Smoke:
    """A case that every variant must get right: an edge pass or a layer, in one precision."""

    name: str
    case: Case
    precision: str
    face: str = "edge pass"


def cases(setting: Setting) -> list[Smoke]:
    """What every variant has to get right."""

    def random(hidden: int, **more: Any) -> Case:
        return Case("smoke", nodes=10_000, edges=EDGES, hidden=hidden, **more)

    # a clamp that acts would make the errors of a single draw say little: see bench.gpu.draws
    rich = {"options": replace(EVERYTHING, coord_clamp=1e4), "attrs": 4, "mask": "soft"}
    found = [
        Smoke("H 64", random(64), "bf16"),
        Smoke("H 64", random(64), "high"),
        Smoke("H 64", random(64), "highest"),
        Smoke("H 128", random(128), "bf16"),
        Smoke("H 128", random(128), "high"),
        Smoke("H 128", random(128), "highest"),
        Smoke("hub", Case("smoke", "hub", 10_000, EDGES, hidden=64), "bf16"),
        Smoke("all options", random(64, **rich), "bf16"),
        Smoke("layer, complete", Case("smoke", "complete", sizes=(5, 29, 1, 18) * 40, hidden=64,
                                      features=64, velocity=True), "bf16", "layer"),
    ]  # fmt: skip
    if setting.on_gpu:
        return found
    chosen = (0, 6, 7, 8)
    return [
        replace(found[k], precision="highest",
                case=replace(found[k].case, nodes=8, edges=40, hidden=16, features=5,
                             sizes=found[k].case.sizes[:2] and (2, 5)))
        for k in chosen
    ]  # fmt: skip


def items(setting: Setting) -> Iterator[Item]:
    """Each case with each variant, then how fast each variant is."""
    for smoke in cases(setting):
        for variant in NAMES:
            name = f"smoke: {variant}: {smoke.name}: {smoke.precision}"
            yield Item(name, "smoke", partial(_run, smoke), 20, 60, gigabytes=8, variant=variant)
    for variant in NAMES:
        run = partial(_speed, variant)
        yield Item(f"speed: {variant}", "smoke", run, 8, 40, True, 8, variant)


def _run(smoke: Smoke, setting: Setting) -> Outcome:
    outcome, case = Outcome(), smoke.case
    make: Callable[..., Any] = case.edge_pass if smoke.face == "edge pass" else case.layer
    problem = at(make(torch.float32, device=setting.device), smoke.precision, setting.device)
    with matmul(smoke.precision):
        with checks.poisoned_memory(), launched(outcome, "forward", "backward"):
            found = triage.first_order(problem, "triton")
            synchronize(setting)
        plain = [triage.first_order(problem, "reference", order) for order in range(ORDERS)]
        exact = problem._replace(leaves={k: t.double() for k, t in problem.leaves.items()})
        truth = triage.first_order(exact, "reference")  # autocast leaves float64 alone
        judge_tensors(
            outcome, smoke.precision, smoke.face, f"smoke: {smoke.name}", found, plain, truth,
            again=lambda: triage.first_order(problem, "triton"),
        )  # fmt: skip
    return outcome


def _speed(variant: str, setting: Setting) -> Outcome:
    """Forward and backward of the edge pass at H = 64."""
    from bench.gpu.times import Clock
    from egnn_fast.bench import measure

    outcome, clock = Outcome(), Clock(setting)
    edges, hidden = (_SPEED_EDGES, 64) if setting.on_gpu else (60, 16)
    graph = graphs.random_graph(max(edges // 32, 8), edges, setting.device)
    problem = Pass(graph, hidden)
    for precision in SPEEDS if setting.on_gpu else ("highest",):
        with matmul(precision):
            run = partial(problem.kernel, precision)
            for _ in range(2):
                run()
            samples = _SPEED_SAMPLES if setting.on_gpu else 1
            timing = measure.alternate({"": clock(run)}, samples, min_sample=0.0)[""]
        outcome.add("speeds", variant=variant, precision=precision, seconds=timing.median)
    return outcome

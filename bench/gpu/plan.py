"""What runs when: the order of a run, and until which second each part of it may last.

Correctness first, then the most important times, so that a run that is cut short is of use; what is
used most comes before what is used least.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.gpu.setting import Item

# seconds of the whole order, estimated for an H200; what was begun may take some 20 more
FULL = 540.0
FIRST_TIMES = "first times"


class Phase(NamedTuple):
    """A part of a run: the items whose names match, and when it ends of :data:`FULL` seconds."""

    name: str
    end: float
    patterns: tuple[str, ...]


PHASES = (
    Phase("smoke", 100, (
        "smoke: *: H 64: *", "memcheck: *", "racecheck: *", "smoke: *", "speed: *",
    )),
    Phase("compile", 125, ("compile: random-64: *", "compile: edges-random-64: *",
                           "compile: nbody: *")),
    Phase(FIRST_TIMES, 260, (
        "rates", "host: *", "times: random-64: *", "times: edges-random-64: *", "times: nbody: *",
        "kernels: *",
    )),
    Phase("full size", 330, ("at full size: *-64: *", "at full size: *")),
    Phase("used most", 410, (
        "compile: *", "layer: *: bf16", "layer: *: highest", "edge pass: H 64, D 3, A 0: *",
        "edge pass: H 128, D 3, A 0: *", "CUDA graph: *", "graphed: *",
        "capture before any other call: *", "no host synchronisation: *", "same bits: *",
        "torch.compile: *", "NaN stays in its row: *", "equivariance: D 3: *",
    )),
    Phase("more times", 490, (
        "times: random-64 beside torch.compile: *", "times: radius-64: *", "times: fluid*",
        "times: qm9: *", "times: random-128: *", "times: edges-random-128: *", "reach", "times: *",
    )),
    Phase("the rest", FULL, ("*",)),
)  # fmt: skip


def phases_of(items: Mapping[str, Item]) -> list[tuple[Phase, list[Item]]]:
    """Each phase with its items: an item belongs to the first one that it matches."""
    waiting, found = dict(items), []
    for phase in PHASES:
        mine = []
        for pattern in phase.patterns:
            matching = [name for name in waiting if fnmatch.fnmatchcase(name, pattern)]
            mine += [waiting.pop(name) for name in matching]
        found.append((phase, mine))
    return found


def ends(budget: float, on_gpu: bool, phases: Sequence[Phase] = PHASES) -> list[float]:
    """Seconds after the start at which phases end.

    On a GPU as planned, cut off at the budget, so that a short run is the first part of a long one;
    a longer budget is the last phase's. Without one they stretch with the budget.
    """
    if not on_gpu:
        return [budget * phase.end / FULL for phase in phases]
    found = [min(phase.end, budget) for phase in phases]
    return [*found[:-1], budget]

"""The table of benchmark cases: sizes, passes and goals. Does not import PyTorch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from egnn_fast.experiments.errors import UsageError

INFERENCE = "inference"  # forward under torch.inference_mode
RECORDING = "recording"  # forward that saves what the backward needs
TRAINING = "forward + backward"  # with gradients of every input and weight
BACKWARD = "backward"  # the backward alone: the forward runs, but its time is not counted
STEP = "training step"  # forward, loss, backward and Adam
PASSES = (INFERENCE, RECORDING, TRAINING, BACKWARD, STEP)

FUSED = "egnn_fast"
EAGER = ("reference", "official")
LAYER_PEERS = (*EAGER, "compile", "egnn-pytorch-sparse")
MODEL_PEERS = (*EAGER, "compile")

FLOAT_BYTES = {"float32": 4, "float64": 8}


class Goal(NamedTuple):
    """The goal of egnn_fast in the pass ``measured`` of a case.

    ``ratio``: how many times faster than the peer ``against`` it shall be; "eager" is the faster
    peer of :data:`EAGER`. ``share``: the share of the floor that it shall reach
    (:mod:`egnn_fast.bench.floor`).
    """

    measured: str
    ratio: float | None = None
    share: float | None = None
    against: str = "eager"


@dataclass(frozen=True)
class Case:
    """One benchmark: a graph, widths, and the passes to time.

    Parameters
    ----------
    name : str
        The name for ``--case``.
    about : str
        A description in one line.
    kind : {"layer", "edges", "nbody", "qm9", "overhead"}
        A layer with its node MLPs; the edge pass alone; the n-body or QM9 model with its training
        step; or a layer so small that the overhead of a call dominates.
    graph : {"regular", "uniform", "power", "hub", "complete"}
        ``degree`` random senders for every node; both ends of every edge at random; receivers by a
        power law; one receiver for all edges; or complete graphs of the sizes ``sizes``.
    nodes, degree : int
        N, and E / N. Complete graphs have ``sizes`` instead.
    hidden, layers, attrs, dtype
        H, the number of layers, the width A of edge_attr, and "float32" or "float64".
    attention, head, velocity : bool
        Whether the layers have a gate, a coordinate head, a velocity MLP.
    passes, against, memory : tuple of str
        The passes to time; the peers to time beside egnn_fast, if installed; and the peers whose
        peak memory is measured.
    quick : bool
        Whether ``--quick`` includes it.
    goals : tuple of Goal
        Goals on two threads.
    """

    name: str
    about: str
    kind: str = "layer"
    graph: str = "regular"
    nodes: int = 10_000
    degree: int = 32
    sizes: tuple[int, ...] = ()
    hidden: int = 64
    layers: int = 1
    attrs: int = 0
    dtype: str = "float32"
    attention: bool = False
    head: bool = True
    velocity: bool = False
    passes: tuple[str, ...] = (INFERENCE, TRAINING, BACKWARD)
    against: tuple[str, ...] = EAGER
    memory: tuple[str, ...] = ()
    quick: bool = False
    goals: tuple[Goal, ...] = ()

    @property
    def num_nodes(self) -> int:
        """N."""
        return sum(self.sizes) if self.sizes else self.nodes

    @property
    def num_edges(self) -> int:
        """E."""
        if self.sizes:
            return sum(size * (size - 1) for size in self.sizes)
        return self.nodes * self.degree

    @property
    def itemsize(self) -> int:
        """Bytes of one number of ``dtype``."""
        return FLOAT_BYTES[self.dtype]

    @property
    def node_tensor_bytes(self) -> int:
        """Bytes of a tensor ``[N, H]``."""
        return self.num_nodes * self.hidden * self.itemsize

    def at_most(self, edges: int) -> Case:
        """The case with fewer nodes, so that it has at most ``edges`` edges.

        Cases with ``sizes`` stay as they are. One node is the least, which may have more edges.
        """
        if self.sizes or self.num_edges <= edges:
            return self
        return replace(self, nodes=max(1, edges // self.degree))


def _ragged(graphs: int) -> tuple[int, ...]:
    # 9 to 29 atoms, each size about equally often, in no obvious order
    return tuple(9 + (11 * k) % 21 for k in range(graphs))


def _growth(edges: int) -> Case:
    small = edges <= 1_000_000
    return Case(
        f"growth-{edges // 1000}k",
        f"H = 64, {edges:,} edges: time and memory per edge as E grows",
        nodes=edges // 32,
        against=EAGER if small else (),
        memory=(FUSED, "official") if edges <= 3_200_000 else (FUSED,),
    )


CASES: tuple[Case, ...] = (
    Case(
        "layer-64",
        "whole EGCL with its node MLPs, H = 64",
        against=LAYER_PEERS,
        memory=(FUSED, "official"),
        quick=True,
        goals=(
            Goal(INFERENCE, 8.5, 0.85),
            Goal(TRAINING, 6.8),
            Goal(BACKWARD, share=0.75),
            Goal(INFERENCE, 4.5, against="compile"),
            Goal(TRAINING, 4.5, against="compile"),
        ),
    ),
    Case(
        "layer-128",
        "whole EGCL with its node MLPs, H = 128",
        hidden=128,
        against=MODEL_PEERS,
        memory=(FUSED, "official"),
        goals=(Goal(INFERENCE, 7.5, 0.85), Goal(TRAINING, 6.0), Goal(BACKWARD, share=0.75)),
    ),
    Case(
        "layer-64-float64",
        "whole EGCL with its node MLPs, H = 64, double precision",
        dtype="float64",
        memory=(FUSED, "official"),
        goals=(Goal(INFERENCE, 5.0, 0.80), Goal(TRAINING, 5.0), Goal(BACKWARD, share=0.70)),
    ),
    Case(
        "edges-64",
        "the edge pass alone (functional.egcl_messages), P and Q given, H = 64",
        kind="edges",
        against=("reference",),
    ),
    Case(
        "complete-64",
        "16 complete graphs of 64 nodes, H = 64: a size that dense layers can hold",
        graph="complete",
        sizes=(64,) * 16,
        against=(*EAGER, "egnn-pytorch"),
    ),
    Case(
        "nbody",
        "n-body batch as trained: 100 graphs of 5, EGNNVel of 4 layers, H = 64, fused Adam",
        kind="nbody",
        graph="complete",
        sizes=(5,) * 100,
        layers=4,
        attrs=2,
        velocity=True,
        passes=(INFERENCE, STEP),
        against=MODEL_PEERS,
        quick=True,
        goals=(Goal(INFERENCE, 6.0), Goal(STEP, 4.0)),
    ),
    Case(
        "qm9",
        "QM9-like batch: 96 complete graphs of 9 to 29, 7 layers, H = 128, attention, fused Adam",
        kind="qm9",
        graph="complete",
        sizes=_ragged(96),
        hidden=128,
        layers=7,
        attention=True,
        head=False,
        passes=(INFERENCE, STEP),
        against=MODEL_PEERS,
        quick=True,
        goals=(Goal(INFERENCE, 4.0), Goal(STEP, 3.5)),
    ),
    Case(
        "overhead",
        "N = 20, one sender each, H = 64: overhead of a call beside PyTorch's node operations",
        kind="overhead",
        nodes=20,
        degree=1,
        passes=(INFERENCE, RECORDING, TRAINING),
        against=("reference", "edge-op", "node-ops"),
        quick=True,
    ),
    *(
        Case(f"degrees-{kind}", about, graph=kind, against=("official",))
        for kind, about in (
            ("uniform", "320,000 edges with both ends at random, H = 64"),
            ("power", "320,000 edges, the k-th node receiving as 1/(k+1)^1.5, H = 64"),
            ("hub", "320,000 edges to one receiver, H = 64"),
        )
    ),
    Case(
        "memory",
        "N = 100,000, 32 senders each, H = 64: peak memory of forward + backward",
        nodes=100_000,
        passes=(),
        against=(),
        memory=(FUSED, *EAGER),
    ),
    *(_growth(edges) for edges in (100_000, 320_000, 1_000_000, 3_200_000, 10_000_000, 20_000_000)),
)


def select(patterns: Sequence[str] | None, quick: bool) -> tuple[Case, ...]:
    """The cases whose names match one of the shell patterns.

    Without patterns: all cases, or those with ``quick`` if ``quick`` is set.

    Raises
    ------
    UsageError
        A pattern matches no case.
    """
    if not patterns:
        return tuple(case for case in CASES if case.quick or not quick)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in CASES):
            names = ", ".join(case.name for case in CASES)
            raise UsageError(f"--case: no case is called {pattern!r}; there are {names}")
    return tuple(case for case in CASES if any(fnmatch.fnmatchcase(case.name, p) for p in patterns))

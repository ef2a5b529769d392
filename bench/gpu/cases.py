"""What is timed on a GPU: sizes, precisions, rivals. Imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from egnn_fast.bench.cases import CASES, FUSED, INFERENCE, STEP, TRAINING, Case

if TYPE_CHECKING:
    from bench.gpu.setting import Setting

ORDERED = f"{FUSED}, deterministic"
IN_GRAPH = " in a CUDA graph"
RIVALS = ("reference", "official")


@dataclass(frozen=True)
class TimedCase(Case):
    """A case of ``egnn_fast.bench`` on a GPU; also of kind "network": an ``EGNN``.

    Parameters
    ----------
    exactly : int
        E, where it is not N times the degree.
    precisions : tuple of str
        In which it is timed, on all sides.
    compiled : tuple of str
        In which of them against ``torch.compile`` too.
    in_graph : bool
        Whether also in a CUDA graph.
    ordered : bool
        Whether also with deterministic sums.
    """

    exactly: int = 0
    precisions: tuple[str, ...] = ("bf16", "highest")
    compiled: tuple[str, ...] = ()
    in_graph: bool = False
    ordered: bool = False

    @property
    def num_edges(self) -> int:
        """E; of a radius graph about."""
        return self.exactly or super().num_edges

    @property
    def gathers_from_memory(self) -> bool:
        """Whether the senders' rows come from everywhere, so not from the cache."""
        return self.graph == "random"

    @property
    def is_one_pass(self) -> bool:
        """Whether it is a layer or an edge pass, which is checked on its own graph."""
        return self.kind in ("layer", "edges")


def _like(name: str) -> dict[str, Any]:
    """The fields of a case of the CPU's table."""
    (case,) = (case for case in CASES if case.name == name)
    own = ("name", "about", "goals", "against", "memory", "quick")
    return {k: v for k, v in vars(case).items() if k not in own}


_LARGE: dict[str, Any] = {"nodes": 1_000_000, "degree": 32, "passes": (INFERENCE, TRAINING)}
_LAYER: dict[str, Any] = {**_LARGE, "kind": "layer", "memory": (FUSED, *RIVALS)}
_EDGES: dict[str, Any] = {**_LARGE, "kind": "edges"}
# in the order of their importance
TIMED: tuple[TimedCase, ...] = (
    TimedCase("random-64", "a layer, random graph", graph="random", **_LAYER, ordered=True,
              precisions=("bf16", "highest", "high"), compiled=("bf16", "highest")),
    TimedCase("edges-random-64", "its edge pass", graph="random", **_EDGES, ordered=True,
              precisions=("bf16", "highest", "high")),
    TimedCase("nbody", "n-body batch", **_like("nbody") | {"in_graph": True},
              compiled=("highest",)),
    TimedCase("radius-64", "a layer, radius graph", graph="radius", **_LAYER),
    TimedCase("edges-radius-64", "its edge pass", graph="radius", **_EDGES),
    TimedCase("fluid", "EGNN of 4 layers, N and E of Fluid113K", kind="network", graph="radius",
              nodes=113_140, exactly=1_706_973, layers=4, passes=(INFERENCE, STEP),
              compiled=("bf16",), memory=(FUSED, *RIVALS)),
    TimedCase("qm9", "QM9-like batch", **_like("qm9") | {"in_graph": True}),
    TimedCase("random-128", "a layer, random graph", graph="random", hidden=128, **_LAYER),
    TimedCase("edges-random-128", "its edge pass", graph="random", hidden=128, **_EDGES),
    TimedCase("radius-128", "a layer, radius graph", graph="radius", hidden=128, **_LAYER,
              precisions=("bf16",)),
    TimedCase("edges-radius-128", "its edge pass", graph="radius", hidden=128, **_EDGES,
              precisions=("bf16",)),
)  # fmt: skip
BY_NAME = {case.name: case for case in TIMED}
_QUICK = ("random-64", "edges-random-64", "nbody", "fluid")


def timed(setting: Setting) -> tuple[TimedCase, ...]:
    """The cases of a run; tiny ones for the interpreter."""
    chosen = [case for case in TIMED if not setting.quick or case.name in _QUICK]
    if setting.on_gpu:
        return tuple(chosen)
    return tuple(
        replace(case, nodes=12, degree=3, exactly=20 if case.exactly else 0, hidden=16, layers=1,
                sizes=tuple(min(size, 3) for size in case.sizes[:2]), precisions=("highest",),
                compiled=(), ordered=False)
        for case in chosen
    )  # fmt: skip

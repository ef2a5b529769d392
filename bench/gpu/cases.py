"""What is timed on a GPU: sizes, precisions, rivals; and the problems made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu import graphs
from bench.gpu.setting import Setting, autocast
from egnn_fast.bench import peers, problems
from egnn_fast.bench.cases import CASES, FUSED, INFERENCE, STEP, TRAINING, Case
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.nn import EGNN

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


class NetworkProblem(problems.Problem):
    """An ``EGNN``; a step to given positions and features."""

    def _draw(self, dtype: torch.dtype) -> None:
        case = self.case
        n, hidden = self.graph.num_nodes, case.hidden
        self.module = EGNN(hidden, hidden, hidden, n_layers=case.layers, dtype=dtype)
        self.inputs = {
            "h": torch.randn(n, hidden, dtype=dtype), "x": torch.randn(n, 3, dtype=dtype),
            "target": torch.randn(n, 3, dtype=dtype),
        }  # fmt: skip

    def forward(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Features and positions."""
        found: tuple[Tensor, ...] = module(self.inputs["h"], self.inputs["x"], self.graph)
        return found

    def step(self, module: nn.Module) -> problems.Step:
        """Loss, gradients, Adam."""
        return _step(self, module)


class BatchProblem(problems.NBodyProblem):
    """The n-body batch, stepped without Fabric, so that a CUDA graph can hold a step."""

    def step(self, module: nn.Module) -> problems.Step:
        """Loss, gradients, Adam."""
        return _step(self, module)


def _step(problem: problems.Problem, module: nn.Module) -> problems.Step:
    config, target = Config(), problem.inputs["target"]
    optimizer = torch.optim.Adam(
        module.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True,
        capturable=target.is_cuda,
    )  # fmt: skip

    def run() -> Tensor:
        outputs = problem.forward(module)
        loss = F.mse_loss(outputs[-1].float(), target)
        if len(outputs) > 1:  # every weight has a part in it
            loss = loss + outputs[0].float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


_KINDS: dict[str, type[problems.Problem]] = {
    **problems._KINDS, "network": NetworkProblem, "nbody": BatchProblem,
}  # fmt: skip


def build(case: TimedCase, setting: Setting) -> problems.Problem:
    """The case's module and inputs on the device."""
    graph, x = None, None
    if case.graph == "random":
        graph = graphs.random_graph(case.nodes, case.num_edges, setting.device)
    elif case.graph == "radius":
        # some more than are wanted: a node near a face has fewer
        neighbours = 1.25 * case.num_edges / case.nodes if case.exactly else case.degree
        radius = graphs.cutoff(case.nodes, neighbours)
        x = graphs.positions(case.nodes, radius, setting.device)
        graph = graphs.radius_graph(x, radius)
        if case.exactly:
            graph = graphs.with_edges(graph, min(case.exactly, graph.num_edges))
    problem = _KINDS[case.kind](case, graph).to(setting.device)
    if x is not None and problem.inputs["x"].shape == x.shape:
        problem.inputs["x"] = x.requires_grad_(problem.inputs["x"].requires_grad)
    return problem


def at(problem: problems.Problem, precision: str, device: str) -> problems.Problem:
    """The problem with its forward under autocast, where the precision asks for it."""
    found: Any = copy.copy(problem)
    run: Callable[[nn.Module], tuple[Tensor, ...]] = problem.forward

    def forward(module: nn.Module) -> tuple[Tensor, ...]:
        with autocast(precision, device):
            return run(module)

    found.forward = forward
    result: problems.Problem = found
    return result


def runner(problem: problems.Problem, peer: str) -> peers.Runner:
    """A peer on a problem; egnn_fast is its Triton kernels."""
    if peer == FUSED:
        return peers.on_backend("triton")(problem)
    return peers.PEERS[peer].build(problem)

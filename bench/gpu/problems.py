"""The problems that are timed on a GPU, made of the table's cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu import graphs
from bench.gpu.cases import TimedCase
from bench.gpu.setting import Setting, autocast, low_type
from egnn_fast.bench import peers, problems
from egnn_fast.bench.cases import FUSED
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.nn import EGNN


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
    """The problem with its forward under autocast, where the precision asks for it.

    An edge pass alone then takes P and Q as a layer's does, in autocast's dtype.
    """
    found: Any = copy.copy(problem)
    low = low_type(precision)
    if problem.case.kind == "edges" and low is not None:
        found.inputs = {
            name: t.detach().to(low).requires_grad_(t.requires_grad) if name in ("p", "q") else t
            for name, t in problem.inputs.items()
        }
    run: Callable[[nn.Module], tuple[Tensor, ...]] = found.forward

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

"""The peers that are compared: egnn_fast, plain PyTorch in several ways, and other packages."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egnn_fast import reference
from egnn_fast.bench import cases, eager
from egnn_fast.bench.problems import Problem, Step
from egnn_fast.experiments.errors import UsageError
from egnn_fast.nn import EGCL
from egnn_fast.operators import second_order
from egnn_fast.operators.messages import messages

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Runner:
    """A peer on a problem.

    Attributes
    ----------
    forward : callable
        Returns the outputs.
    leaves : mapping of Tensor
        Inputs and weights whose gradients are computed, by name.
    make_step : callable, optional
        Returns a function that takes a training step.
    """

    forward: Callable[[], Outputs]
    leaves: Mapping[str, Tensor]
    make_step: Callable[[], Step] | None = None
    _cotangents: list[Tensor] = field(default_factory=list)

    def timed(self, measured: str) -> Callable[[], object]:
        """The function to time for a pass, one of ``cases.PASSES``."""
        if measured == cases.INFERENCE:
            return torch.inference_mode()(self.forward)
        if measured == cases.RECORDING:
            return self.forward
        if measured == cases.TRAINING:
            return lambda: self._backward(self.forward())
        if measured == cases.BACKWARD:
            return self._backward_alone
        assert self.make_step is not None
        return self.make_step()

    def gradients(self, outputs: Outputs, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients by leaf. Leaves that the outputs do not depend on are left out."""
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        outs, cots = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outs, list(self.leaves.values()), cots, allow_unused=True)
        named = zip(self.leaves, grads, strict=True)
        return {name: grad for name, grad in named if grad is not None}

    def _backward(self, outputs: Outputs) -> None:
        if not self._cotangents:
            self._cotangents.extend(torch.ones_like(out) for out in outputs)
        self.gradients(outputs, self._cotangents)

    def _backward_alone(self) -> float:
        """Run forward and backward; returns the seconds of the backward."""
        outputs = self.forward()
        begin = time.perf_counter()
        self._backward(outputs)
        return time.perf_counter() - begin


class Peer(NamedTuple):
    """An implementation to time.

    ``differs`` says how its function differs from egnn_fast's; it is empty for the same function of
    the same weights. ``needs`` are modules that it imports and egnn_fast does not require.
    """

    name: str
    about: str
    build: Callable[[Problem], Runner]
    differs: str = ""
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Why the peer cannot run here; None if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def on_backend(name: str) -> Callable[[Problem], Runner]:
    """The ``build`` of a peer that runs the problem's own module on a backend of this package."""
    return lambda problem: _runner(problem, problem.with_backend(name))


def _official(problem: Problem) -> Runner:
    return _runner(problem, eager.official(problem.module, problem.edges, problem.order))


def _compiled(problem: Problem) -> Runner:
    torch.compiler.reset()  # else compilations of earlier cases count against a limit
    module = eager.official(problem.module, problem.edges)
    problem.network(module).compile(dynamic=False)
    return _runner(problem, module)


def _runner(problem: Problem, module: nn.Module) -> Runner:
    return Runner(
        lambda: problem.forward(module), problem.leaves(module), lambda: problem.step(module)
    )


def _layer_inputs(problem: Problem) -> tuple[EGCL, Tensor, Tensor]:
    assert isinstance(problem.module, EGCL)
    return problem.module, problem.inputs["h"], problem.inputs["x"]


def _edge_op(problem: Problem) -> Runner:
    """A layer as the fused edge operator between node operations in PyTorch."""
    layer, h, x = _layer_inputs(problem)
    graph = problem.graph
    weight = graph.inverse_degree(x.dtype)

    def forward() -> Outputs:
        new_h, new_x, _ = second_order.layer_around(
            messages, h, x, graph, layer.weights(), layer.options, v=None, edge_attr=None,
            edge_mask=None, node_attr=None, coord_weight=weight, residual=True, backend="cpu",
        )  # fmt: skip
        return new_h, new_x

    return Runner(forward, problem.leaves(layer))


def _node_ops(problem: Problem) -> Runner:
    """:func:`_edge_op` without the edge operator: M and X are constants."""
    layer, h, x = _layer_inputs(problem)
    weight = problem.graph.inverse_degree(x.dtype)
    message_sum = torch.zeros_like(h).requires_grad_()
    coord_sum = torch.zeros_like(x).requires_grad_()

    def forward() -> Outputs:
        weights = layer.weights()
        w_pq, b_pq, _ = weights.split(h.shape[1])
        new_h, new_x, _ = reference.update_nodes(
            h, x, None, message_sum, coord_sum, reference.maps_of(weights, layer.options),
            layer.options, node_attr=None, weight=weight, residual=True,
        )  # fmt: skip
        return new_h, new_x, F.linear(h, w_pq, b_pq)

    leaves = {**problem.leaves(layer), "message_sum": message_sum, "coord_sum": coord_sum}
    return Runner(forward, leaves)


def _dense(problem: Problem) -> Runner:
    layer, h, x = _layer_inputs(problem)
    graphs, nodes = len(problem.case.sizes), problem.case.sizes[0]
    package: Any = importlib.import_module("egnn_pytorch")
    theirs = package.EGNN(dim=layer.hidden_features, m_dim=layer.hidden_features).to(h.dtype)

    def forward() -> Outputs:
        new_h, new_x = theirs(h.view(graphs, nodes, -1), x.view(graphs, nodes, -1))
        return new_h, new_x

    return Runner(forward, {"h": h, "x": x, **dict(theirs.named_parameters())})


def _sparse(problem: Problem) -> Runner:
    layer, h, x = _layer_inputs(problem)
    package: Any = importlib.import_module("egnn_pytorch")
    width = layer.hidden_features
    theirs = package.EGNN_Sparse(feats_dim=width, m_dim=width, aggr="mean").to(h.dtype)
    edges = problem.edges.flip(0)  # PyTorch Geometric has the senders first

    def forward() -> Outputs:
        return (theirs(torch.cat((x, h), dim=1), edges),)

    return Runner(forward, {"h": h, "x": x, **dict(theirs.named_parameters())})


_WIDER = "an edge MLP 4 F + 2 wide (ours H), a coordinate MLP 4 H wide, a node MLP 2 F wide"

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(cases.FUSED, "the fused kernels of the CPU", on_backend("cpu")),
        Peer("reference", "backend='reference': plain PyTorch", on_backend("reference")),
        Peer("official", "plain PyTorch written the official code's way", _official),
        Peer("compile", "torch.compile of the official way", _compiled),
        Peer(
            "egnn-pytorch",
            "the dense layer of the package egnn-pytorch",
            _dense,
            differs=f"{_WIDER}; every node is its own neighbour too; sums of coordinate updates",
            needs=("egnn_pytorch",),
        ),
        Peer(
            "egnn-pytorch-sparse",
            "the layer of egnn-pytorch for PyTorch Geometric",
            _sparse,
            differs=f"{_WIDER}; means of messages too",
            needs=("egnn_pytorch", "torch_geometric"),
        ),
        Peer(
            "edge-op",
            "the edge operator between PyTorch's node operations",
            _edge_op,
        ),
        Peer(
            "node-ops",
            "those node operations alone",
            _node_ops,
            differs="no edges at all",
        ),
    )
}


def chosen(
    case: cases.Case, against: Sequence[str] | None, quick: bool
) -> tuple[list[Peer], dict[str, str]]:
    """The peers to time in a case, egnn_fast first, and why others are left out.

    Parameters
    ----------
    case : Case
        The case; ``case.against`` names its peers.
    against : sequence of str, optional
        Use only these of the case's peers.
    quick : bool
        Leave out "compile", which compiles for a minute, unless ``against`` names it.

    Returns
    -------
    (peers, left_out)
        A list, and a reason by name for each peer that cannot run here.
    """
    named = [name for name in case.against if against is None or name in against]
    if against is None and quick:
        named = [name for name in named if name != "compile"]
    reasons = {name: PEERS[name].missing() for name in named}
    left_out = {name: why for name, why in reasons.items() if why is not None}
    return [PEERS[name] for name in (cases.FUSED, *named) if name not in left_out], left_out


def check_names(against: Sequence[str] | None) -> None:
    """Check that the named peers exist and can run here.

    Raises
    ------
    UsageError
        One does not.
    """
    known = [name for name in PEERS if name != cases.FUSED]
    for name in against or ():
        if name not in known:
            raise UsageError(f"--against: expected some of {', '.join(known)}, got {name!r}")
        reason = PEERS[name].missing()
        if reason is not None:
            raise UsageError(f"--against: {name} cannot run here: {reason}")

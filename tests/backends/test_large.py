"""More than 2**31 elements: E * H and E * A beyond what 32 bits count.

Nothing of size E * H exists; what is large are the offsets. The right answer comes from small
problems: a graph whose edges are all repeated k times gives k times the sums.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from egnn_fast import Graph, Options, checks, functional
from egnn_fast.weights import EdgeWeights

OVER = 2**31
EPS = torch.finfo(torch.float32).eps


def leaf(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.detach().requires_grad_()


def draw_weights(hidden: int, attrs: int, head: bool) -> EdgeWeights:
    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape) * 2 - 1) * (2 / shape[-1]) ** 0.5

    return EdgeWeights(
        uniform(hidden),
        uniform(hidden, attrs) if attrs else None,
        uniform(hidden, hidden),
        uniform(hidden),
        w3=uniform(hidden, hidden) if head else None,
        b3=uniform(hidden) if head else None,
        w_x=uniform(hidden) if head else None,
    )


def repeated(graph: Graph, times: int) -> Graph:
    """Each edge `times` times, side by side."""
    assert graph.senders is not None
    assert graph.perm is None
    return Graph(graph.rowptr * times, graph.senders.repeat_interleave(times))


def forward_backward(
    leaves: dict[str, Tensor], weights: EdgeWeights, graph: Graph, scale: float
) -> dict[str, Tensor]:
    """Sums times `scale`, and gradients with cotangents that are `scale` times others."""
    inputs = {k: t.detach().clone().requires_grad_() for k, t in leaves.items()}
    named = {k: t.detach().requires_grad_() for k, t in weights._asdict().items() if t is not None}
    m, x = functional.egcl_messages(
        inputs["P"], inputs["Q"], inputs["x"], graph, weights._replace(**named), Options(),
        edge_attr=inputs.get("edge_attr"), backend="cpu",
    )  # fmt: skip
    assert x is not None
    draw = torch.Generator().manual_seed(0)
    towards = [scale * torch.rand(t.shape, generator=draw) for t in (m, x)]
    inputs |= named
    grads = torch.autograd.grad((m, x), list(inputs.values()), towards)
    found = {f"gradient of {k}": g for k, g in zip(inputs, grads, strict=True)}
    return {"M": m.detach() * scale, "X": x.detach() * scale} | found


def test_more_than_two_to_the_31_elements_of_messages() -> None:
    """Forward and backward, E = 34 million and H = 64, against every edge taken once."""
    nodes, times, hidden = 34_000, 1000, 64
    receivers = torch.arange(nodes)
    edges = torch.stack((receivers, (receivers * 7919 + 1) % nodes))
    graph = Graph.from_edge_index(edges, nodes)
    many = repeated(graph, times)
    assert many.num_edges * hidden > OVER
    leaves = {
        "P": torch.randn(nodes, hidden),
        "Q": torch.randn(nodes, hidden),
        "x": torch.randn(nodes, 3),
    }
    weights = draw_weights(hidden, 0, head=True)
    found = forward_backward(leaves, weights, many, 1 / times)
    # a sum of a thousand equal numbers may round a thousand times, always the same way
    for name, t in forward_backward(leaves, weights, graph, 1.0).items():
        assert checks.relative_error(found[name], t) < times * EPS, name


def test_more_than_two_to_the_31_elements_of_messages_of_a_complete_graph() -> None:
    """Checked at receivers before and after that point."""
    nodes, hidden = 11_600, 16
    graph = Graph.complete([nodes])
    assert graph.num_edges * hidden > OVER
    p, q, x = torch.randn(nodes, hidden), torch.randn(nodes, hidden), torch.randn(nodes, 1)
    options = Options(activation="relu", coord_agg=None)
    weights = draw_weights(hidden, 0, head=False)
    m, _ = functional.egcl_messages(p, q, x, graph, weights, options, backend="cpu")
    for receiver in (0, nodes // 2, nodes - 1):
        others = torch.arange(nodes) != receiver
        r = (x[receiver] - x[others]) ** 2
        z = (p[receiver] + q[others] + r * weights.w_r).relu() @ weights.w2.T + weights.b2
        right = z.relu().double().sum(0)
        assert checks.relative_error(m[receiver], right) < 1e-5


def test_more_than_two_to_the_31_elements_of_edge_attr() -> None:
    """E * A: the edges of the last node lie beyond that point, and are all that counts."""
    attrs, hidden, last = 64, 8, 100
    edges = OVER // attrs + last
    # pages of zeros that nobody writes to take no memory
    edge_attr = torch.from_numpy(np.zeros((edges, attrs), dtype=np.float32))
    edge_attr[-last:] = torch.randn(last, attrs)
    senders = torch.zeros(edges, dtype=torch.int32)
    senders[-last:] = torch.arange(last) % 3
    # nodes 0 to 2 send, node 1 receives what is empty
    many = Graph(torch.tensor([0, 0, edges - last, edges - last, edges]), senders)
    few = Graph(torch.tensor([0, 0, 0, 0, last]), senders[-last:].clone())
    nodes = many.num_nodes
    leaves = {
        "P": torch.randn(nodes, hidden),
        "Q": torch.randn(nodes, hidden),
        "x": torch.randn(nodes, 3),
    }
    weights = draw_weights(hidden, attrs, head=True)
    towards = torch.rand(nodes, hidden)
    towards[:-1] = 0  # nothing is asked of the others

    def run(graph: Graph, attr: Tensor) -> dict[str, Tensor]:
        inputs = {k: t.detach().requires_grad_() for k, t in leaves.items()}
        w_a = leaf(weights.w_a)
        m, x = functional.egcl_messages(
            inputs["P"], inputs["Q"], inputs["x"], graph, weights._replace(w_a=w_a), Options(),
            edge_attr=attr, backend="cpu",
        )  # fmt: skip
        assert x is not None
        grads = torch.autograd.grad(m, [*inputs.values(), w_a], towards)
        named = dict(zip((*inputs, "w_a"), grads, strict=True))
        return {"M": m.detach()[-1], "X": x.detach()[-1]} | named

    found = run(many, edge_attr)
    for name, right in run(few, edge_attr[-last:].clone()).items():
        assert checks.relative_error(found[name], right) < last * EPS, name

"""The networks respect E(n) and permutations, in float64 and in 2, 3 and 8 dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_inputs import BACKENDS, amplify
from torch import Tensor

from egnn_fast import Graph
from egnn_fast.nn import EGNN, EGNNVel

N, F, A = 9, 4, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": True},
    "unit": {"coord_norm": "unit", "coord_tanh": True},
    "norm": {"coord_norm": 1.0, "coord_agg": "sum", "coord_scale": 0.3},
}
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["list", "complete"])
def graph(request: pytest.FixtureRequest) -> Graph:
    if request.param == "complete":
        return Graph.complete([4, 5])
    receivers = torch.randint(N, (40,))
    return Graph.from_edge_index((receivers, (receivers + torch.randint(1, N, (40,))) % N), N)


def network(backend: str, kind: str, options: dict[str, Any], graph: Graph) -> Run:
    """``(h, x, v) -> (h, x)`` on fixed edges and edge attributes."""
    edge_attr = torch.rand(graph.num_edges, A).double()
    if kind == "EGNN":
        net = EGNN(F, 16, 3, n_layers=3, edge_attr_dim=A, backend=backend, **options).double()
        amplify(net)
        return lambda h, x, v: net(h, x, graph, edge_attr=edge_attr)
    carry = kind == "EGNNVel carrying"
    vel = EGNNVel(
        F, 16, n_layers=3, edge_attr_dim=A, carry_velocity=carry, backend=backend, **options
    ).double()
    amplify(vel)
    return lambda h, x, v: vel(h, x, graph, v, edge_attr=edge_attr)


def inputs(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, F).double(), torch.randn(N, dim).double(), torch.randn(N, dim).double()


def orthogonal(dim: int, determinant: int) -> Tensor:
    """A random rotation, or with determinant -1 a rotation and a reflection."""
    q, _ = torch.linalg.qr(torch.randn(dim, dim).double())
    if torch.linalg.det(q).sign() != determinant:
        q[:, 0] = -q[:, 0]
    torch.testing.assert_close(torch.linalg.det(q), torch.tensor(float(determinant)).double())
    return q


def assert_same(got: Tensor, expected: Tensor) -> None:
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 1e-11, f"relative error {error:.2e}"


@pytest.mark.parametrize("dim", [2, 3, 8])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["EGNN", "EGNNVel", "EGNNVel carrying"])
def test_rotation_reflection_translation(
    backend: str, kind: str, options: str, dim: int, graph: Graph
) -> None:
    run = network(backend, kind, OPTIONS[options], graph)
    h, x, v = inputs(dim)
    out_h, out_x = run(h, x, v)
    assert (out_x - x).abs().max() > 1e-3  # or equivariance would say nothing
    shift = 3 * torch.randn(dim).double()
    for determinant in (1, -1):
        q = orthogonal(dim, determinant)
        moved_h, moved_x = run(h, x @ q.T + shift, v @ q.T)
        assert_same(moved_h, out_h)
        assert_same(moved_x, out_x @ q.T + shift)


@pytest.mark.parametrize("dim", [2, 3, 8])
@pytest.mark.parametrize("kind", ["EGNN", "EGNNVel carrying"])
def test_gradients_rotate(backend: str, kind: str, dim: int, graph: Graph) -> None:
    run = network(backend, kind, OPTIONS["attention"], graph)
    h, x, v = inputs(dim)
    q = orthogonal(dim, -1)

    def energy_gradients(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        x, v = x.detach().requires_grad_(), v.detach().requires_grad_()
        out_h, out_x = run(h, x, v)
        energy = (out_h**2).sum() + ((out_x - out_x.mean(0)) ** 2).sum()
        return torch.autograd.grad(energy, [x] if kind == "EGNN" else [x, v])

    for plain, moved in zip(
        energy_gradients(x, v), energy_gradients(x @ q.T + 1.0, v @ q.T), strict=True
    ):
        assert_same(moved, plain @ q.T)


@pytest.mark.parametrize("dim", [2, 3, 8])
@pytest.mark.parametrize("options", OPTIONS)
def test_permutation(backend: str, options: str, dim: int) -> None:
    edges = torch.randint(N, (2, 40))
    edges[1, edges[0] == edges[1]] = (edges[0, edges[0] == edges[1]] + 1) % N
    edge_attr = torch.rand(40, A).double()
    net = EGNN(F, 16, 3, n_layers=3, edge_attr_dim=A, backend=backend, **OPTIONS[options])
    net.double()
    amplify(net)
    h, x, _ = inputs(dim)
    expected = net(h, x, edges, edge_attr=edge_attr)
    order = torch.randperm(N)  # the new node k is the old node order[k]
    place = torch.argsort(order)
    got = net(h[order], x[order], place[edges], edge_attr=edge_attr)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b[order])


def test_a_clamp_that_acts_breaks_rotation_only(backend: str) -> None:
    # the reason that there is none by default
    net = EGNN(F, 16, 3, n_layers=1, coord_clamp=1e-3, backend=backend).double()
    amplify(net)
    graph = Graph.complete([N])
    h, x, _ = inputs(3)
    q = orthogonal(3, 1)
    _, out = net(h, x, graph)
    _, turned = net(h, x @ q.T, graph)
    _, shifted = net(h, x + 1.0, graph)
    assert not torch.allclose(turned, out @ q.T, rtol=0, atol=1e-6)
    assert_same(shifted, out + 1.0)

"""What the modules do with edges: raw lists, their cache, and degenerate graphs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from nn_inputs import BACKENDS, A, D, Data, E, F, N, amplify
from torch import Tensor

import egnn_fast
from egnn_fast import Graph
from egnn_fast.graph import edge_cache, sorting
from egnn_fast.nn import EGNN, EGNNVel


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data() -> Data:
    data = Data()
    # unsorted, an edge twice, a self-loop, a node that receives nothing
    data.edges[0, data.edges[0] == 3] = 5
    data.edges[:, 7] = data.edges[:, 20]
    data.edges[:, 11] = 2
    return data


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of edges of all sorts so far."""
    counted: list[int] = []
    sort = sorting.sort_by_receiver

    def counting(edges: Tensor, num_nodes: int) -> Any:
        counted.append(edges.shape[1])
        return sort(edges, num_nodes)

    monkeypatch.setattr(sorting, "sort_by_receiver", counting)
    return counted


def network(backend: str, **options: Any) -> EGNN:
    net = EGNN(
        F, 16, 3, edge_attr_dim=A, n_layers=3, attention=True, backend=backend, **options
    ).double()
    amplify(net)
    return net


def test_raw_edges_equal_their_graph(backend: str, data: Data) -> None:
    net, mask = network(backend), torch.rand(E).double()
    forms: list[Any] = [data.edges, list(data.edges), data.edges.tolist(), data.edges.int()]
    graph = Graph.from_edge_index(data.edges, N)
    expected = net(data.h, data.x, graph, edge_attr=data.edge_attr, edge_mask=mask)
    for edges in forms:
        got = net(data.h, data.x, edges, edge_attr=data.edge_attr, edge_mask=mask)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_attributes_and_masks_follow_the_users_order(backend: str, data: Data) -> None:
    net, mask = network(backend), torch.rand(E).double()
    expected = net(data.h, data.x, data.edges, edge_attr=data.edge_attr, edge_mask=mask)
    order = torch.randperm(E)
    shuffled = {"edge_attr": data.edge_attr[order], "edge_mask": mask[order]}
    got = net(data.h, data.x, data.edges[:, order].contiguous(), **shuffled)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    wrong = net(data.h, data.x, data.edges, **shuffled)
    assert not torch.allclose(wrong[0], expected[0])


def test_masked_edges_are_absent(backend: str, data: Data) -> None:
    # with the mean, where the number of edges counts
    net, kept = network(backend), torch.arange(E) % 3 > 0
    masked = net(data.h, data.x, data.edges, edge_attr=data.edge_attr, edge_mask=kept)
    column = net(
        data.h, data.x, data.edges, edge_attr=data.edge_attr, edge_mask=kept.double().unsqueeze(1)
    )
    absent = net(data.h, data.x, data.edges[:, kept], edge_attr=data.edge_attr[kept])
    for a, b, c in zip(masked, column, absent, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_a_warm_network_does_not_sort_again(backend: str, data: Data, sorts: list[int]) -> None:
    net = network(backend)
    for edges in (data.edges, list(data.edges)):
        sorts.clear()
        for _ in range(3):
            net(data.h, data.x, edges, edge_attr=data.edge_attr)
        assert sorts == [E]
    graph = Graph.from_edge_index(data.edges, N)
    sorts.clear()
    net(data.h, data.x, graph, edge_attr=data.edge_attr)
    net(data.h, data.x, Graph.complete([N]), edge_attr=torch.rand(N * (N - 1), A).double())
    assert sorts == []


def test_lists_are_sorted_once_a_call(backend: str, data: Data, sorts: list[int]) -> None:
    network(backend)(data.h, data.x, data.edges.tolist(), edge_attr=data.edge_attr)
    assert sorts == [E]


@pytest.mark.parametrize("form", ["tensor", "pair"])
def test_edits_in_place_are_noticed(backend: str, form: str, data: Data) -> None:
    net = network(backend)
    edges: Any = data.edges if form == "tensor" else [row.clone() for row in data.edges]
    before = net(data.h, data.x, edges, edge_attr=data.edge_attr)[0]
    # the second row alone, so that both tensors of a pair are seen to be watched
    edges[1].copy_((edges[1] + 1) % N)
    after = net(data.h, data.x, edges, edge_attr=data.edge_attr)[0]
    graph = Graph.from_edge_index(edges, N)
    assert torch.equal(after, net(data.h, data.x, graph, edge_attr=data.edge_attr)[0])
    assert not torch.allclose(before, after)


def test_the_cache_lets_go_of_edges(backend: str, data: Data) -> None:
    net = network(backend)
    gc.collect()
    held = len(edge_cache._entries)
    edges = data.edges.clone()
    net(data.h, data.x, edges, edge_attr=data.edge_attr)
    assert len(edge_cache._entries) == held + 1
    del edges
    gc.collect()
    assert len(edge_cache._entries) == held


def test_a_graph_does_not_change_with_the_callers_edges(backend: str, data: Data) -> None:
    net, edges = network(backend), data.edges.clone()
    graph = Graph.from_edge_index(edges, N)
    before = net(data.h, data.x, graph, edge_attr=data.edge_attr)
    edges.zero_()
    after = net(data.h, data.x, graph, edge_attr=data.edge_attr)
    assert torch.equal(before[0], after[0])


@pytest.mark.parametrize("agg", ["mean", "sum"])
def test_isolated_nodes(backend: str, agg: str, data: Data) -> None:
    net = EGNNVel(F, 16, n_layers=2, coord_agg=agg, backend=backend).double()
    alone = ~torch.isin(torch.arange(N), data.edges[0])
    assert alone.any()
    still = torch.zeros_like(data.v)
    _, x = net(data.h, data.x, data.edges, still)
    assert torch.equal(x[alone], data.x[alone])
    assert (x[~alone] != data.x[~alone]).any()


@pytest.mark.parametrize("sizes", [[], [1], [0, 1, 0], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("implicit", [True, False], ids=["complete", "list"])
def test_graphs_without_edges(backend: str, sizes: list[int], implicit: bool) -> None:
    nodes = sum(sizes)
    net = network(backend, coord_norm=1.0)
    h = torch.randn(nodes, F).double().requires_grad_()
    x = torch.randn(nodes, D).double().requires_grad_()
    edge_attr = torch.zeros(0, A).double().requires_grad_()
    edges = Graph.complete(sizes) if implicit else torch.empty(2, 0, dtype=torch.int64)
    new_h, new_x = net(h, x, edges, edge_attr=edge_attr)
    assert (new_h.shape, new_x.shape) == ((nodes, 3), (nodes, D))
    assert torch.equal(new_x, x)
    (new_h.sum() + new_x.sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    for tensor in (h, edge_attr, *net.parameters()):
        if tensor.grad is not None:
            assert tensor.grad.isfinite().all()
    # what a node adds to itself does not need edges
    weight = net.get_parameter("gcl_0.node_mlp.2.weight")
    assert weight.grad is not None
    assert (weight.grad.abs().max() > 0) == (nodes > 0)


@pytest.mark.parametrize("coord_norm", [None, "unit", 1.0, 1e-3])
@pytest.mark.parametrize("coord_agg", ["mean", "sum"])
def test_coincident_points_are_finite_through_second_order(
    backend: str, coord_norm: str | float | None, coord_agg: str
) -> None:
    options = {"coord_norm": coord_norm, "coord_agg": coord_agg, "coord_tanh": True}
    net = EGNN(F, 8, 2, n_layers=2, attention=True, backend=backend, **options).double()  # type: ignore[arg-type]
    amplify(net)
    h = torch.randn(4, F).double().requires_grad_()
    place = torch.randn(2, D).double().repeat(2, 1)  # 0 and 2 coincide, 1 and 3 too
    x = place.requires_grad_()
    loops = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])
    edges = torch.cat((Graph.complete([4]).edge_index, loops), dim=1)
    new_h, new_x = net(h, x, edges)
    leaves = [h, x, *net.parameters()]
    loss = (new_h**2).sum() + (new_x**3).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)  # type: ignore[arg-type]
    for tensor in (new_h, new_x, *first, *second):
        assert tensor.isfinite().all()
    assert second[1].abs().max() > 0


def test_nan_passes_through(backend: str, data: Data) -> None:
    net = network(backend)
    data.x[4, 1] = float("nan")
    h, x = net(data.h, data.x, data.edges, edge_attr=data.edge_attr)
    assert h[4].isnan().all()
    assert x[4].isnan().any()
    untouched = EGNN(F, 16, 3, n_layers=1, backend=backend).double()
    h, _ = untouched(data.h, data.x, Graph.from_edge_index(torch.tensor([[4], [0]]), N))
    assert h[4].isnan().all()
    assert h[:4].isfinite().all()


def test_inference_mode_and_no_grad(backend: str, data: Data) -> None:
    net = network(backend)
    expected = net(data.h, data.x, data.edges, edge_attr=data.edge_attr)
    with torch.no_grad():
        plain = net(data.h, data.x, data.edges, edge_attr=data.edge_attr)
    with torch.inference_mode():
        edges = data.edges.clone()  # an inference tensor has no version counter
        inferred = net(data.h, data.x, edges, edge_attr=data.edge_attr)
    for a, b, c in zip(expected, plain, inferred, strict=True):
        assert not b.requires_grad
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    # what inference left in the cache serves training
    with torch.inference_mode():
        net(data.h, data.x, data.edges, edge_attr=data.edge_attr)
    again = net(data.h, data.x, data.edges, edge_attr=data.edge_attr)
    again[0].sum().backward()
    assert torch.equal(again[0], expected[0])


def test_a_modules_backend_goes_before_the_contexts(data: Data) -> None:
    net = network("reference")
    with egnn_fast.use_backend("cpu"):
        assert net.get_submodule("gcl_0").explain(data.h, data.x).backend == "reference"  # type: ignore[operator]

"""Graphs in batches, on other devices, and in modules."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from csr import check_csr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from egnn_fast import Graph, nn

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Complete ones, sorted and unsorted lists, and batches of them."""
    kind = draw(st.sampled_from(("complete", "sorted", "any", "batch")))
    if kind == "batch":
        return Graph.batch([draw(graphs()) for _ in range(draw(st.integers(1, 3)))])
    if kind == "complete":
        return Graph.complete(draw(st.lists(st.integers(0, 4), max_size=3)))
    nodes = draw(st.integers(0, 5))
    index = st.integers(0, nodes - 1)
    pairs = draw(st.lists(st.tuples(index, index), max_size=8)) if nodes else []
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return Graph.from_edge_index(edges[:, edges[0].argsort()] if kind == "sorted" else edges, nodes)


@given(st.lists(graphs(), min_size=1, max_size=5))
def test_a_batch_is_its_graphs_one_after_the_other(parts: list[Graph]) -> None:
    found = Graph.batch(parts)
    lists: list[Tensor] = []
    sizes: list[int] = []
    nodes = 0
    for part in parts:
        lists.append(part.edge_index + nodes)
        nodes += part.num_nodes
        sizes += [part.num_nodes] if part.sizes is None else part.sizes.tolist()
    edges = torch.cat(lists, dim=1)
    check_csr(found, edges, nodes)
    assert torch.equal(found.edge_index, edges)
    assert found.is_complete == all(part.is_complete for part in parts)
    assert found.sizes is not None
    assert found.sizes.dtype == torch.int64
    assert found.sizes.tolist() == sizes
    assert found.num_graphs == len(sizes)
    numbers = [k for k, size in enumerate(sizes) for _ in range(size)]
    assert found.batch_index.tolist() == numbers
    if len(parts) > 1:
        split = Graph.batch([Graph.batch(parts[:1]), Graph.batch(parts[1:])])
        assert torch.equal(split.edge_index, edges)
        assert split.sizes is not None
        assert split.sizes.tolist() == sizes


def test_sizes_of_single_graphs() -> None:
    single = Graph.from_edge_index([[0, 1], [1, 0]], 3)
    assert (single.sizes, single.num_graphs) == (None, 1)
    assert single.batch_index.tolist() == [0, 0, 0]
    complete = Graph.complete([2, 0, 3])
    assert complete.sizes is not None
    assert complete.sizes.tolist() == [2, 0, 3]
    assert complete.batch_index.tolist() == [0, 0, 2, 2, 2]


def test_what_is_no_batch_is_refused() -> None:
    graph: Any = Graph.complete([2])
    with pytest.raises(ValueError, match="graphs: expected at least one"):
        Graph.batch([])
    with pytest.raises(TypeError, match="graphs: expected Graphs, got list"):
        Graph.batch([graph, [[0], [1]]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="graphs: expected one device, got cpu, meta"):
        Graph.batch([graph, graph.to("meta")])
    with pytest.raises(ValueError, match=r"graphs: at most 2\*\*31 - 1 nodes and edges"):
        Graph.batch([Graph(graph.rowptr, first=graph.first, num_edges=2**31 - 2), graph])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["complete", "listed", "mixed"])
def test_a_network_on_a_batch_and_on_its_graphs(kind: str, backend: str) -> None:
    net = nn.EGNN(4, 8, 2, edge_attr_dim=2, n_layers=2, backend=backend).double()
    parts = [Graph.complete([3]), Graph.from_edge_index(torch.randint(5, (2, 9)), 5)]
    parts += {"complete": parts[:1], "listed": parts[1:], "mixed": []}[kind]
    parts = {"complete": parts[::2], "listed": parts[1:], "mixed": parts}[kind]
    h = [torch.randn(g.num_nodes, 4).double() for g in parts]
    x = [torch.randn(g.num_nodes, 3).double() for g in parts]
    attr = [torch.randn(g.num_edges, 2).double() for g in parts]
    graph = Graph.batch(parts)
    alone = [net(*one[:3], edge_attr=one[3]) for one in zip(h, x, parts, attr, strict=True)]
    right_h, right_x = (torch.cat(t) for t in zip(*alone, strict=True))
    # in PyTorch Geometric's batches they stay a list
    for form in (graph, parts, tuple(parts)):
        new_h, new_x = net(torch.cat(h), torch.cat(x), form, edge_attr=torch.cat(attr))
        torch.testing.assert_close(new_h, right_h, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new_x, right_x, rtol=1e-12, atol=1e-12)
    pooled = new_h.new_zeros(graph.num_graphs, 2).index_add(0, graph.batch_index, right_h)
    torch.testing.assert_close(pooled, torch.stack([t.sum(0) for t, _ in alone]))


@pytest.mark.parametrize("workers", [0, 1])
def test_pytorchs_loader_batches_graphs(workers: int) -> None:
    data: Any = [
        {"graph": Graph.complete([k + 1]), "y": float(k), "pair": (Graph.complete([1]), k)}
        for k in range(4)
    ]
    (batch,) = DataLoader(data, batch_size=4, num_workers=workers)
    assert batch["graph"].sizes.tolist() == [1, 2, 3, 4]
    assert batch["graph"].is_complete
    assert batch["pair"][0].num_nodes == 4
    assert default_collate([Graph.complete([2]), Graph.complete([3])]).num_edges == 8


# ---- devices --------------------------------------------------------------------------------

GRAPHS = {
    "listed": Graph.from_edge_index([[1, 0, 1], [0, 1, 1]], 2),
    "complete": Graph.complete([2, 3]),
    "batch": Graph.batch([Graph.complete([2]), Graph.from_edge_index([[1, 0], [0, 0]], 2)]),
}
every_graph = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)


def tensors(graph: Graph) -> list[Tensor | None]:
    return [graph.rowptr, graph.senders, graph.perm, graph.first, graph.sizes]


@every_graph
def test_moved_whole(graph: Graph) -> None:
    for moved in (
        graph.to("meta"),
        graph.to(device="meta", non_blocking=True),  # as PyTorch Geometric calls it
        graph.to(torch.device("meta"), True),
    ):
        for a, b in zip(tensors(moved), tensors(graph), strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.is_meta and a.shape == b.shape and a.dtype == b.dtype)  # type: ignore[union-attr]
        assert (moved.num_nodes, moved.num_edges) == (graph.num_nodes, graph.num_edges)
    assert graph.to("cpu", non_blocking=True) is graph
    assert graph.cpu() is graph
    assert not graph.is_pinned()


@every_graph
def test_pinned_and_on_a_gpu(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(t: Tensor) -> Tensor:
        pinned.append(t)
        return t.clone()

    def to(t: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        assert (str(device), non_blocking) == ("cuda:1", True)
        return t.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda t: True)
    found = graph.pin_memory()
    assert found is not graph
    assert found.is_pinned()
    assert len(pinned) == sum(t is not None for t in tensors(graph))
    monkeypatch.setattr(Tensor, "to", to)
    graph.cuda("cuda:1", non_blocking=True)


def test_a_missing_gpu_is_pytorchs_error() -> None:
    if torch.cuda.is_available():
        assert Graph.complete([2]).cuda().device.type == "cuda"
    else:
        with pytest.raises((RuntimeError, AssertionError)):
            Graph.complete([2]).cuda()


def of_dataclasses(batch: Any) -> Any:
    """A batch as Lightning converts it: through mappings and sequences, writing to dataclasses."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: of_dataclasses(value) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return type(batch)(of_dataclasses(value) for value in batch)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        found = copy.copy(batch)
        for field in dataclasses.fields(batch):
            setattr(found, field.name, of_dataclasses(getattr(batch, field.name)))
        return found
    return batch


@every_graph
def test_passes_through_a_change_of_precision(graph: Graph) -> None:
    found = of_dataclasses({"h": torch.randn(3), "graph": graph})
    assert found["graph"] is graph
    assert found["h"].dtype == torch.float64


@every_graph
def test_copies_keep_everything(graph: Graph) -> None:
    graph.transpose()
    file = io.BytesIO()
    torch.save({"graph": graph}, file)
    file.seek(0)
    copies = [
        copy.copy(graph),
        copy.deepcopy(graph),
        pickle.loads(pickle.dumps(graph)),
        torch.load(file, weights_only=True)["graph"],
    ]
    for other in copies:
        assert type(other) is Graph
        assert other is not graph
        for a, b in zip(tensors(other), tensors(graph), strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
        assert other.num_edges == graph.num_edges
        assert not other._cache
    assert weakref.ref(graph)() is graph


# ---- modules --------------------------------------------------------------------------------


class OnOneGraph(torch.nn.Module):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.net = nn.EGCL(4, 4, 8)
        self.edges = nn.GraphBuffer(graph)

    def forward(self, h: Tensor, x: Tensor) -> Any:
        return self.net(h, x, self.edges.graph)


@every_graph
def test_a_modules_graph_goes_with_it(graph: Graph) -> None:
    model = OnOneGraph(graph)
    assert model.edges.graph is graph
    assert repr(graph) in repr(model)
    assert not any(key.startswith("edges") for key in model.state_dict())
    model.load_state_dict(model.state_dict())
    model.double().half().double()
    assert model.edges.graph is graph
    h, x = torch.randn(graph.num_nodes, 4).double(), torch.randn(graph.num_nodes, 3).double()
    right = model(h, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.edges.graph is not graph
        assert other.edges.graph.rowptr is other.edges.rowptr
        for a, b in zip(other(h, x), right, strict=True):
            assert torch.equal(a, b)
    model.to("meta")
    assert model.edges.graph.device.type == "meta"
    assert model.edges.graph.num_edges == graph.num_edges
    assert graph.device.type == "cpu"
    assert model(h.to("meta"), x.to("meta"))[0].is_meta


def test_a_graph_buffer_takes_a_graph() -> None:
    with pytest.raises(TypeError, match="graph: expected a Graph, got list"):
        nn.GraphBuffer([[0], [1]])  # type: ignore[arg-type]


def test_a_modules_graph_compiles_whole() -> None:
    torch._dynamo.reset()
    model = OnOneGraph(GRAPHS["listed"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    h, x = torch.randn(2, 4), torch.randn(2, 3)
    for a, b in zip(compiled(h, x), model(h, x), strict=True):
        torch.testing.assert_close(a, b)


def test_a_modules_graph_survives_memory_that_is_not_filled() -> None:
    model = OnOneGraph(Graph.from_edge_index([[1, 0, 1], [0, 1, 1]], 2))
    edges = model.edges.graph.edge_index
    model.to_empty(device="cpu")
    assert torch.equal(model.edges.graph.edge_index, edges)
    assert model.edges.rowptr is model.edges.graph.rowptr

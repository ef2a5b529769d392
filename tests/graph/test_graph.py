"""Graphs: sorting, order, implicit edges, transposes, immutability, the cache of raw edge lists."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from csr import check_csr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from egnn_fast import Graph, Options, functional
from egnn_fast.checks.cases import Case
from egnn_fast.graph import edge_cache, sorting
from egnn_fast.runtime import native
from egnn_fast.weights import LayerWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def edge_lists(draw: st.DrawFn) -> tuple[Tensor, int]:
    """An edge list and its number of nodes: none, few and many edges, all at one node, sorted."""
    nodes = draw(st.integers(1, 12))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=40))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    form = draw(st.sampled_from(("any", "sorted", "hub", "strided")))
    if form == "sorted":
        edges = edges[:, edges[0].argsort(stable=True)]
    elif form == "hub":
        edges = torch.stack((torch.full_like(edges[0], nodes - 1), edges[1]))
    elif form == "strided":
        edges = torch.stack((edges, -edges), dim=-1)[..., 0]
    return edges, nodes


sizes_lists = st.lists(st.integers(0, 6), max_size=8)


@given(edge_lists())
def test_sort_is_stable_and_keeps_the_users_order(data: tuple[Tensor, int]) -> None:
    edges, nodes = data
    graph = Graph.from_edge_index(edges, nodes)
    check_csr(graph, edges, nodes)
    assert torch.equal(graph.edge_index, edges)
    assert graph.edge_index.dtype == torch.int64
    assert not graph.is_complete
    is_sorted = bool((edges[0].diff() >= 0).all())
    assert (graph.perm is None) == is_sorted


@given(edge_lists())
def test_every_form_of_an_edge_list(data: tuple[Tensor, int]) -> None:
    edges, nodes = data
    forms: list[Any] = [
        edges.int(),
        [edges[0], edges[1]],
        (edges[0].int(), edges[1].int()),
        [edges[0].tolist(), edges[1].tolist()],
    ]
    for form in forms:
        graph = Graph.from_edge_index(form, nodes)
        check_csr(graph, edges, nodes)
        assert torch.equal(graph.edge_index, edges)
    assert torch.equal(Graph.from_edge_index(edges, nodes, validate=False).edge_index, edges)


@given(edge_lists())
def test_the_native_sorter_gives_what_pytorch_gives(data: tuple[Tensor, int]) -> None:
    edges, nodes = data
    assert native.core is not None, native.load_error
    found = sorting.sort_by_receiver(edges, nodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "core", None)
        plain = sorting.sort_by_receiver(edges, nodes)
    for a, b in zip(found[:3], plain[:3], strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert found[3] == plain[3]


def test_the_native_sorter_on_many_edges() -> None:
    edges = torch.randint(1000, (2, 200_000))
    check_csr(Graph.from_edge_index(edges, 1000), edges, 1000)


@given(sizes_lists)
def test_complete_graphs_are_row_major(sizes: list[int]) -> None:
    pairs, start = [], 0
    for size in sizes:
        nodes = range(start, start + size)
        pairs += [(i, j) for i in nodes for j in nodes if i != j]
        start += size
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    for given_sizes in (sizes, torch.tensor(sizes, dtype=torch.int64), tuple(sizes)):
        graph = Graph.complete(given_sizes)
        check_csr(graph, edges, start)
        assert torch.equal(graph.edge_index, edges)
        assert graph.is_complete
        assert graph.senders is None
        assert graph.perm is None


@given(edge_lists())
def test_transpose_lists_the_edges_of_each_sender(data: tuple[Tensor, int]) -> None:
    edges, nodes = data
    graph = Graph.from_edge_index(edges, nodes)
    check_transpose(graph)
    assert graph.transpose() is graph.transpose()


@given(sizes_lists)
def test_transpose_of_complete_graphs(sizes: list[int]) -> None:
    check_transpose(Graph.complete(sizes))


def check_transpose(graph: Graph) -> None:
    colptr, order = graph.transpose()
    assert colptr.dtype == torch.int64
    assert order.dtype == torch.int32
    senders = graph.sorted_senders()
    assert colptr.shape == (graph.num_nodes + 1,)
    for j in range(graph.num_nodes):
        places = order[int(colptr[j]) : int(colptr[j + 1])].long()
        assert torch.equal(places, (senders == j).nonzero().squeeze(1))


@given(edge_lists())
def test_copies_are_equal(data: tuple[Tensor, int]) -> None:
    edges, nodes = data
    graph = Graph.from_edge_index(edges, nodes)
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(graph)),
        copy.deepcopy(graph),
        copy.copy(graph),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        check_csr(other, edges, nodes)
        assert torch.equal(other.edge_index, edges)


def test_complete_graphs_keep_their_number_of_edges_in_copies() -> None:
    graph = Graph.complete([3, 1, 4])
    for other in (pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph), graph.to("meta")):
        assert other.num_edges == 18
        assert other.is_complete


def test_to_moves_everything_or_nothing() -> None:
    graph = Graph.from_edge_index([[1, 0, 1], [0, 1, 1]], 2)
    assert graph.to("cpu") is graph
    assert graph.to(torch.device("cpu")) is graph
    moved = graph.to("meta")
    assert moved.device == torch.device("meta")
    for part in (moved.rowptr, moved.senders, moved.perm):
        assert part is not None
        assert part.device == torch.device("meta")
    assert (moved.num_nodes, moved.num_edges) == (2, 3)
    assert graph.device == torch.device("cpu")
    assert Graph.complete([2], device="meta").device == torch.device("meta")


def test_graphs_are_immutable() -> None:
    graph = Graph.from_edge_index([[1, 0], [0, 1]], 2)
    for name in ("rowptr", "senders", "perm", "first", "num_nodes", "edge_index", "other"):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(graph, name, None)
        with pytest.raises((FrozenInstanceError, AttributeError)):
            delattr(graph, name)


def test_a_graph_does_not_follow_the_callers_tensor() -> None:
    for edges in (torch.tensor([[1, 0, 1], [0, 1, 1]]), torch.tensor([[0, 1, 1], [1, 0, 1]])):
        kept = edges.clone()
        graph = Graph.from_edge_index(edges, 2)
        edges.zero_()
        assert torch.equal(graph.edge_index, kept)


def test_repr_says_what_it_is() -> None:
    graph = Graph.from_edge_index([[1, 0], [0, 1]], 3)
    assert repr(graph) == "Graph(num_nodes=3, num_edges=2, device=cpu)"
    assert repr(Graph.complete([3])) == "Graph(complete, num_nodes=3, num_edges=6, device=cpu)"


def test_graphs_are_compared_and_hashed_by_identity() -> None:
    a, b = Graph.complete([3]), Graph.complete([3])
    assert a != b
    assert len({a, b, a}) == 2


def test_inverse_degree() -> None:
    graph = Graph.from_edge_index([[0, 0, 0, 2], [1, 2, 1, 0]], 4)
    for dtype in (torch.float32, torch.float64):
        found = graph.inverse_degree(dtype)
        assert found.dtype == dtype
        assert torch.allclose(found.flatten(), torch.tensor([1 / 3, 1, 1, 1], dtype=dtype))
        assert graph.inverse_degree(dtype) is found


# ---- raw edge lists: warm layers do not sort again, and notice edits ------------------------


@pytest.fixture
def sorts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each sort."""
    done: list[int] = []
    sort = sorting.sort_by_receiver

    def counted(edges: Tensor, nodes: int) -> Any:
        done.append(nodes)
        return sort(edges, nodes)

    monkeypatch.setattr(sorting, "sort_by_receiver", counted)
    return done


CASE = Case("cache", nodes=8, edges=30, features=3)
LEAVES = CASE.layer(torch.float32).leaves
WEIGHTS = LayerWeights(**{k: LEAVES[k] for k in LayerWeights._fields if k in LEAVES})


def run(edges: Any, nodes: int = 8) -> Tensor:
    h, _, _ = functional.egcl(LEAVES["h"][:nodes], LEAVES["x"][:nodes], edges, WEIGHTS, Options())
    return h


def test_the_same_tensor_is_sorted_once(sorts: list[int]) -> None:
    edges = CASE.edge_index()
    first = run(edges)
    for _ in range(3):
        assert torch.equal(run(edges), first)
    assert len(sorts) == 1


def test_the_same_pair_of_tensors_is_sorted_once(sorts: list[int]) -> None:
    receivers, senders = CASE.edge_index().unbind()
    first = run([receivers, senders])
    assert torch.equal(run([receivers, senders]), first)
    assert torch.equal(run((receivers, senders)), first)
    assert len(sorts) == 1
    run([receivers, senders.clone()])
    assert len(sorts) == 2


def test_edits_in_place_are_noticed(sorts: list[int]) -> None:
    edges = CASE.edge_index()
    before = run(edges)
    edges[1] = (edges[1] + 1) % 8
    after = run(edges)
    assert len(sorts) == 2
    assert not torch.equal(after, before)
    assert torch.equal(after, run(edges.clone()))
    pair = list(edges.clone().unbind())
    run(pair)
    pair[1][0] = (pair[1][0] + 1) % 8
    changed = run(pair)
    assert torch.equal(changed, run(torch.stack(pair)))
    edges[0, 0] = 8
    with pytest.raises(IndexError, match="edge_index"):
        run(edges)


def test_memory_swapped_under_a_tensor_is_noticed() -> None:
    edges = CASE.edge_index()
    run(edges)
    other = torch.stack((edges[1], edges[0])).contiguous()
    edges.data = other
    assert torch.equal(run(edges), run(other.clone()))


def test_another_number_of_nodes_is_noticed(sorts: list[int]) -> None:
    edges = CASE.edge_index() % 5
    run(edges)
    run(edges, 6)
    assert len(sorts) == 2
    with pytest.raises(IndexError, match="edge_index"):
        run(edges, 4)


def test_an_equal_tensor_is_not_the_same(sorts: list[int]) -> None:
    run(CASE.edge_index())
    run(CASE.edge_index())
    assert len(sorts) == 2


def test_inference_tensors_and_lists_are_never_stale() -> None:
    with torch.inference_mode():
        edges = CASE.edge_index()
        before = run(edges)
        edges[1] = (edges[1] + 1) % 8
        assert not torch.equal(run(edges), before)
    lists = CASE.edge_index().tolist()
    before = run(lists)
    lists[1] = [(j + 1) % 8 for j in lists[1]]
    assert not torch.equal(run(lists), before)


def test_the_cache_does_not_keep_edge_lists_alive() -> None:
    gc.collect()
    before = len(edge_cache._entries)
    edges = CASE.edge_index()
    run(edges)
    assert len(edge_cache._entries) == before + 1
    del edges
    gc.collect()
    assert len(edge_cache._entries) == before


def test_a_raw_list_trains_after_inference_mode() -> None:
    edges = CASE.edge_index()
    leaves = {k: t.clone().requires_grad_() for k, t in LEAVES.items()}
    weights = LayerWeights(**{k: leaves[k] for k in LayerWeights._fields if k in leaves})
    for backend in ("cpu", "reference"):
        with torch.inference_mode():
            functional.egcl(leaves["h"], leaves["x"], edges, weights, Options(), backend=backend)
        h, _, _ = functional.egcl(
            leaves["h"], leaves["x"], edges, weights, Options(), backend=backend
        )
        h.sum().backward()
        assert leaves["h"].grad is not None


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


ROWPTR = torch.tensor([0, 1, 3])
WRONG_TENSORS: dict[str, tuple[type[Exception], tuple[Any, ...], str]] = {
    "no senders": (ValueError, (ROWPTR,), "senders: expected a tensor unless first"),
    "both": (ValueError, (ROWPTR, int32(0, 1, 0), None, int32(0, 0)), "senders: expected"),
    "end": (ValueError, (ROWPTR, int32(0, 1)), "rowptr: expected to end with 2"),
    "order": (ValueError, (torch.tensor([0, 3, 1, 3]), int32(0, 1, 0)), "rowptr: expected to"),
    "range": (IndexError, (ROWPTR, int32(0, 1, 2)), "senders: expected indices from 0 to 1"),
    "negative": (IndexError, (ROWPTR, int32(0, 1, -1)), "senders: expected indices"),
    "perm's length": (ValueError, (ROWPTR, int32(0, 1, 0), int32(0)), r"perm: expected \[3\]"),
    "perm's range": (IndexError, (ROWPTR, int32(0, 1, 0), int32(0, 1, 3)), "perm: expected"),
    "first's length": (ValueError, (ROWPTR, None, None, int32(0)), r"first: expected \[2\]"),
    "first's reach": (
        IndexError, (torch.tensor([0, 1, 2]), None, None, int32(0, 1)), "first: a component",
    ),
    "dimensions": (ValueError, (ROWPTR, int32(0, 1, 0).reshape(1, 3)), "senders: expected 1 dim"),
    "dtype": (TypeError, (ROWPTR, torch.tensor([0, 1, 0])), "senders: expected torch.int32"),
    "empty": (ValueError, (ROWPTR[:0], int32()), "rowptr: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_make_no_graph_are_refused(name: str) -> None:
    error, tensors, message = WRONG_TENSORS[name]
    with pytest.raises(error, match=message):
        Graph(*tensors)


def test_graphs_pickled_as_dataclasses_load() -> None:
    edges = torch.tensor([[1, 0, 1], [0, 1, 1]])
    graph, old = Graph.from_edge_index(edges, 2), Graph.__new__(Graph)
    fields = {name: getattr(graph, name) for name in ("rowptr", "senders", "perm", "first")}
    old.__setstate__({**fields, "_lazy": {"edge_index": edges}})
    check_csr(old, edges, 2)
    complete = Graph.__new__(Graph)
    fields = {"rowptr": torch.tensor([0, 1, 2]), "first": int32(0, 0), "senders": None}
    complete.__setstate__({**fields, "perm": None, "_lazy": {"num_edges": 2}})
    assert complete.num_edges == 2
    assert complete.is_complete

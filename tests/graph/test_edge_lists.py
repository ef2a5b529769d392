"""Raw edge lists: accepted forms, memory that may be read, and devices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from egnn_fast import Graph, nn
from egnn_fast.backends import decision
from egnn_fast.graph.edge_lists import as_count

pytestmark = pytest.mark.usefixtures("one_thread")
N, E = 8, 30


def draw() -> Tensor:
    return torch.randint(N, (2, E))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), torch.randn(N, 3)


@pytest.fixture(params=["cpu", "reference"])
def layer(request: pytest.FixtureRequest) -> nn.EGCL:
    return nn.EGCL(6, 6, 8, backend=request.param)


class Wrapper(Tensor):
    """A subclass without memory of its own, as PyTorch Geometric's EdgeIndex."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.held = inner
        found: Wrapper = made
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} was called")


class Convertible(Wrapper):
    def as_tensor(self) -> Tensor:
        return self.held


class Trivial(Tensor):
    pass


# ---- forms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_numpy_arrays(dtype: Any, layer: nn.EGCL) -> None:
    edges, (h, x) = draw(), inputs()
    array = edges.numpy().astype(dtype)
    fixed = array.copy()
    fixed.flags.writeable = False
    wide = np.repeat(array, 2, axis=1)
    forms: list[Any] = [
        array,
        list(array),
        (array[0], edges[1]),
        fixed,
        np.asfortranarray(array),
        wide[:, ::2],
        array[:, ::-1][:, ::-1],
        [[np.int64(i) for i in row] for row in array],
    ]
    right = layer(h, x, edges)[0]
    for form in forms:
        assert torch.equal(Graph.from_edge_index(form, N).edge_index, edges)
        assert torch.equal(layer(h, x, form)[0], right)


@pytest.mark.parametrize(
    "edges",
    [
        np.zeros((2, 3)),
        np.zeros((2, 3), dtype=bool),
        np.zeros((2, 3), dtype=">i8"),
        [[0.5], [1]],
        [["a"], ["b"]],
        [[True], [False]],
        "ab",
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.int64).to_sparse(),
    ],
)
def test_other_things_are_refused(edges: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="edge_index"):
        Graph.from_edge_index(edges, N)
    with pytest.raises((TypeError, ValueError), match="edge_index"):
        nn.EGCL(6, 6, 8)(*inputs(), edges)


@pytest.mark.parametrize("count", [np.int64(8), np.int32(8), np.uint8(8), torch.tensor(8)])
def test_counts_of_other_libraries(count: Any) -> None:
    assert Graph.from_edge_index(draw(), count).num_nodes == 8
    assert Graph.complete([3, count]).num_nodes == 11
    assert type(as_count("n", count)) is int


@pytest.mark.parametrize(
    "count",
    [True, np.bool_(True), 8.0, np.float64(8), torch.tensor(8.0), torch.tensor(True),
     torch.tensor([8]), "8", None],
)  # fmt: skip
def test_other_counts_are_refused(count: Any) -> None:
    with pytest.raises(TypeError, match="num_nodes: expected an int"):
        Graph.from_edge_index(draw(), count)
    with pytest.raises(TypeError, match="sizes: expected an int"):
        Graph.complete([3, count])


def test_arrays_of_sizes() -> None:
    for sizes in (np.array([3, 4]), np.array([3, 4], dtype=np.uint8), torch.tensor([3, 4]).int()):
        assert Graph.complete(sizes).num_edges == 18
    for wrong in (np.array([3.0]), np.array([True]), np.array(3), torch.tensor([True])):
        with pytest.raises(TypeError, match="sizes: expected a 1-D tensor of integers"):
            Graph.complete(wrong)


# ---- memory that may be read ------------------------------------------------------------------


def test_subclasses(layer: nn.EGCL) -> None:
    edges, (h, x) = draw(), inputs()
    right = layer(h, x, edges.clone())[0]
    for form in (Convertible(edges), edges.as_subclass(Trivial), list(edges.as_subclass(Trivial))):
        assert torch.equal(Graph.from_edge_index(form, N).edge_index, edges)
        assert type(Graph.from_edge_index(form, N).rowptr) is Tensor
        found = layer(h, x, form)[0]
        assert type(found) is Tensor
        assert torch.equal(found, right)


def test_subclasses_without_memory_are_refused(layer: nn.EGCL) -> None:
    for form in (Wrapper(draw()), [Wrapper(draw()[0]), draw()[1]]):
        with pytest.raises(TypeError, match="edge_index: a Wrapper has no memory of its own"):
            Graph.from_edge_index(form, N)
        with pytest.raises(TypeError, match="edge_index: a Wrapper has no memory of its own"):
            layer(*inputs(), form)


def test_freed_memory_is_refused() -> None:
    edges = draw()
    edges.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="edge_index"):
        Graph.from_edge_index(edges, N)


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        layer = nn.EGCL(6, 6, 8)
        h, x = layer(*inputs(), draw())
        assert (h.shape, x.shape) == ((N, 6), (N, 3))
    outside = Graph.from_edge_index(mode.from_tensor(draw()), N)
    assert outside.rowptr.shape == (N + 1,)
    assert type(outside.rowptr) is not Tensor


def test_functionalised() -> None:
    edges = draw()

    def degree(edges: Tensor) -> Tensor:
        return Graph.from_edge_index(edges, N).degree

    found = torch.func.functionalize(degree)(edges)
    assert torch.equal(found, degree(edges))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_meta(backend: str | None) -> None:
    h, x = (t.to("meta") for t in inputs())
    shapes = nn.EGCL(6, 6, 8, backend=backend, device="meta")
    graphs: list[Any] = [draw().to("meta"), list(draw().to("meta")), draw().tolist()]
    graphs += [Graph.from_edge_index(draw(), N).to("meta"), Graph.complete([N], device="meta")]
    for graph in graphs:
        new_h, new_x = shapes(h, x, graph)
        assert (new_h.shape, new_x.shape) == (h.shape, x.shape)
        assert new_h.is_meta


@pytest.mark.parametrize("form", [lambda e: e, list])
def test_edges_on_another_device(form: Callable[[Tensor], Any], layer: nn.EGCL) -> None:
    edges = form(draw().to("meta"))
    with pytest.raises(ValueError, match="edge_index: expected device cpu as h has, got meta"):
        layer(*inputs(), edges)
    with pytest.raises(ValueError, match="graph: expected device cpu as h has, got meta"):
        layer(*inputs(), Graph.complete([N + 1], device="meta"))


def test_a_default_device_changes_nothing(layer: nn.EGCL) -> None:
    edges, (h, x) = draw(), inputs()
    lists, right = edges.tolist(), layer(h, x, edges.clone())[0]
    with torch.device("meta"):
        for graph in (Graph.from_edge_index(e, N) for e in (edges, lists, edges.numpy())):
            assert graph.device.type == "cpu"
            assert torch.equal(graph.edge_index, edges)
            assert torch.equal(layer(h, x, graph)[0], right)
        for form in (edges, lists):
            assert torch.equal(layer(h, x, form)[0], right)
        complete = Graph.complete([3, 5])
        assert complete.device.type == "cpu"
        assert complete.batch_index.tolist() == [0] * 3 + [1] * 5
        assert Graph.batch([complete, graph]).num_nodes == 16
        assert graph.transpose()[0].device.type == "cpu"
        assert not graph.inverse_degree(torch.float32).is_meta
    assert torch.equal(complete.edge_index, Graph.complete([3, 5]).edge_index)


# ---- other devices ------------------------------------------------------------------------


def test_on_other_devices_lists_are_sorted_each_time_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from egnn_fast import arguments

    class OnGPU:
        device = torch.device("cuda", 0)
        shape = (N, 6)

    made = Graph.complete([N])
    object.__setattr__(made, "__class__", type("GraphOnGPU", (Graph,), {"device": OnGPU.device}))
    monkeypatch.setattr(arguments, "as_edge_index", lambda edges, device: edges)
    monkeypatch.setattr(arguments, "graph_of", lambda edges, count: made)
    monkeypatch.setattr(decision, "_warned", set())
    h: Any = OnGPU()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            arguments.resolve_graph([[0], [1]], h)
    (only,) = warned
    assert "edge_index: on cuda an edge list is sorted at each call" in str(only.message)


def test_sorting_while_a_cuda_graph_is_captured_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    edges: Any = OnGPU()
    with pytest.raises(RuntimeError, match=r"edge_index: .* captured; build a Graph"):
        Graph._sorted(edges, N, True)

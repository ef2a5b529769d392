"""What graphs cache: only what ordinary calls computed, from the tensors that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import INTERPRETED_BACKENDS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from egnn_fast import Graph, nn
from egnn_fast.backends.triton import partition
from egnn_fast.graph import cache
from egnn_fast.runtime.eager import is_plain

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPHS: dict[str, Callable[[], Graph]] = {
    "listed": lambda: Graph.from_edge_index(torch.randint(6, (2, 20)), 6),
    "sorted": lambda: Graph.from_edge_index([[0, 1, 1], [2, 0, 2]], 3),
    "complete": lambda: Graph.complete([2, 3]),
}


def fill(graph: Graph) -> list[Any]:
    """All values that a graph may cache."""
    found: list[Any] = [
        graph.edge_index,
        graph.shared_edge_index(),
        *graph.transpose(),
        graph.batch_index,
        graph.num_edges,
    ]
    found += [graph.inverse_degree(t) for t in (torch.float32, torch.float64, torch.bfloat16)]
    return found


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def by_make_fx(graph: Graph) -> None:
    def f(x: Tensor) -> Tensor:
        fill(graph)
        return x.sin()

    make_fx(f)(torch.ones(3))


def by_grad(graph: Graph) -> None:
    def f(x: Tensor) -> Tensor:
        fill(graph)
        return x.sin().sum()

    grad(f)(torch.ones(3))
    grad(grad(lambda x: f(x)))(torch.ones(()))


def by_vmap(graph: Graph) -> None:
    def f(x: Tensor) -> Tensor:
        fill(graph)
        return x.sin()

    vmap(f)(torch.ones(3))


def by_functionalize(graph: Graph) -> None:
    def f(x: Tensor) -> Tensor:
        fill(graph)
        return x.sin()

    torch.func.functionalize(f)(torch.ones(3))


def by_mode(mode: Callable[[], Any]) -> Callable[[Graph], None]:
    def run(graph: Graph) -> None:
        with mode():
            fill(graph)

    return run


def by_fake(graph: Graph) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph.inverse_degree(torch.float32)
        graph.shared_edge_index()
        assert graph.batch_index.shape == (graph.num_nodes,)


def by_fake_tensors(graph: Graph) -> None:
    """No mode is active, only the tensors are fake."""
    mode = FakeTensorMode()
    fake = Graph(*(None if t is None else mode.from_tensor(t) for t in graph._tensors()))  # type: ignore[arg-type]
    fake.inverse_degree(torch.float32)
    assert not fake._cache


def by_jit(graph: Graph) -> None:
    def f(x: Tensor) -> Tensor:
        fill(graph)
        return x.sin()

    torch.jit.trace(f, torch.ones(3), check_trace=False)


STRANGERS = {
    "make_fx": by_make_fx,
    "grad": by_grad,
    "vmap": by_vmap,
    "functionalize": by_functionalize,
    "dispatch mode": by_mode(Watching),
    "function mode": by_mode(Listening),
    "fake mode": by_fake,
    "fake tensors": by_fake_tensors,
    "jit": by_jit,
}


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.filterwarnings("ignore")
def test_transforms_leave_nothing_in_a_graph(
    stranger: Callable[[Graph], None], make: Callable[[], Graph]
) -> None:
    graph = make()
    stranger(graph)
    assert not graph._cache
    right = fill(graph)
    assert graph._cache
    assert all(is_plain(t) for t in right if isinstance(t, Tensor))
    kept = {key: value for key, (value, _) in graph._cache.items()}
    stranger(graph)
    assert {key: value for key, (value, _) in graph._cache.items()} == kept


CALLERS: dict[str, Callable[[], Any]] = {
    "plain": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


CALLERS["default dtype"] = default_dtype


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_cached_values_are_of_no_mode(make: Callable[[], Graph], caller: Callable[[], Any]) -> None:
    graph = make()
    right = fill(Graph(*graph._tensors()))  # a complete one reads its number of edges itself
    with caller():
        inside = fill(graph)
        built = Graph.batch([graph, Graph.complete([3])])
    for found in (inside, fill(graph)):
        for a, b in zip(found, right, strict=True):
            if isinstance(b, Tensor):
                assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
                assert torch.equal(a, b)
                assert not a.is_inference() or a is inside[0]  # edge_index is the caller's copy
            else:
                assert a == b
    assert not any(t.is_inference() for t in built._tensors() if t is not None)


# ---- CUDA: streams and captures, without a GPU ------------------------------------------------


class Stream:
    """What these tests need of a stream."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.waited: list[object] = []

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    state: dict[str, Any] = {"stream": Stream(), "capturing": False, "recorded": []}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(Tensor, "record_stream", lambda t, s: state["recorded"].append((t, s)))
    return state


def test_a_capture_caches_nothing(gpu: dict[str, Any]) -> None:
    values: cache.Values = {}
    gpu["capturing"] = True
    cache.cached(values, "a", lambda: torch.ones(2), torch.device("cuda"))
    assert not values
    gpu["capturing"] = False
    first = cache.cached(values, "a", lambda: torch.ones(2), torch.device("cuda"))
    gpu["capturing"] = True
    assert cache.cached(values, "a", lambda: torch.ones(2), torch.device("cuda")) is first


def test_another_stream_waits_for_what_is_kept(gpu: dict[str, Any]) -> None:
    values: cache.Values = {}

    def get() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = cache.cached(
            values, "a", lambda: (torch.ones(2), torch.ones(3)), torch.device("cuda")
        )
        return found

    parts = get()
    get()
    assert not gpu["recorded"]
    other = gpu["stream"] = Stream()
    assert get() is parts
    assert len(other.waited) == 1
    assert [(t is part, s) for (t, s), part in zip(gpu["recorded"], parts, strict=True)] == [
        (True, other), (True, other),
    ]  # fmt: skip


# ---- orders by sender, which belong to the senders -------------------------------------------


def two_graphs() -> tuple[Graph, Graph]:
    """The same degrees, other senders; one rowptr."""
    nodes = 6
    receivers = torch.arange(nodes).repeat_interleave(5)
    one, other = (torch.randint(nodes, receivers.shape) for _ in range(2))
    graph = Graph.from_edge_index(torch.stack((receivers, one)), nodes)
    return graph, Graph(graph.rowptr, other.int())


def test_graphs_that_share_rowptr_have_their_own_senders() -> None:
    graph, other = two_graphs()
    complete = Graph.complete([6])
    shared = Graph(complete.rowptr, graph.senders)
    for g in (graph, other, graph, complete, shared, complete):
        edges, key = g.num_edges, (4, 3)
        found = partition.cached_by_sender(g.rowptr, g.senders, g.first, 0, edges, *key)
        right = partition.by_sender(g.rowptr, g.senders, g.first, 0, edges, *key)
        assert torch.equal(found.order, right.order)
        assert torch.equal(found.keys, right.keys)


@pytest.mark.skipif(not INTERPRETED_BACKENDS, reason="Triton's wheels are for Linux alone")
def test_graphs_that_share_rowptr_have_their_own_gradients() -> None:
    h, x = torch.randn(6, 4), torch.randn(6, 3)
    layer, right = (nn.EGCL(4, 4, 8, backend=b) for b in ("triton", "reference"))
    right.load_state_dict(layer.state_dict())
    torch.use_deterministic_algorithms(True)
    try:
        for graph in two_graphs():
            found = []
            for each in (layer, right):
                leaf = x.clone().requires_grad_()
                each(h, leaf, graph)[0].square().sum().backward()
                found.append(leaf.grad)
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)

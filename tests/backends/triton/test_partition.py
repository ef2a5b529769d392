"""How edges are cut into blocks and dealt to programs: each edge once, in receiver order."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from cases import INTERPRETED_BACKENDS
from torch import Tensor

from egnn_fast import Graph
from egnn_fast.backends.triton import partition
from egnn_fast.backends.triton.partition import Partition, by_receiver, by_sender
from egnn_fast.graph import cache
from egnn_fast.graph.cache import cached_for

pytestmark = pytest.mark.usefixtures("one_thread")


def graph_of(degrees: list[int], senders: int = 0) -> Graph:
    """Receivers of these degrees; senders drawn at random."""
    nodes = max(len(degrees), senders)
    receiver = torch.repeat_interleave(torch.tensor(degrees, dtype=torch.int64))
    return Graph.from_edge_index(
        torch.stack((receiver, torch.randint(nodes, receiver.shape))), nodes
    )


GRAPHS = {
    "one edge": graph_of([0, 1, 0]),
    "rows without edges": graph_of([0, 0, 3, 0, 5, 0, 0, 0, 2, 0]),
    "a hub among others": graph_of([2, 1, 90, 0, 1, 3, 0]),
    "equal": graph_of([4] * 16),
    "one row": graph_of([64], senders=9),
    "complete": Graph.complete([5, 5, 5]),
    "complete, ragged": Graph.complete([1, 12, 0, 2, 7, 1, 3]),
}
every_graph = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)


def receivers_of(graph: Graph) -> list[int]:
    """The receiver of each edge in the graph's order."""
    return torch.repeat_interleave(graph.rowptr.diff()).tolist()


def senders_of(graph: Graph) -> list[int]:
    """The sender of each edge in the graph's order."""
    found = graph.edge_index[1]
    return (found if graph.perm is None else found[graph.perm.long()]).tolist()


def ranges(edges: int) -> list[tuple[int, int]]:
    """All edges, and parts that begin and end within rows."""
    return [(0, edges), *((b, e) for b, e in ((0, 7), (3, edges), (5, 40)) if b < e <= edges)]


def runs(blocks: int, programs: int) -> list[range]:
    """The blocks of each program, dealt evenly, the first ones with one more."""
    each, over = divmod(blocks, programs)
    sizes = [each + (program < over) for program in range(programs)]
    return [range(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(programs)]


def check(part: Partition, keys: list[int], size: int, most: int) -> None:
    """The partition of a run of edges whose rows are ``keys``."""
    blocks = [keys[k : k + size] for k in range(0, len(keys), size)]
    assert part.blocks == len(blocks)
    assert part.programs == min(len(blocks), most)
    assert part.rows.tolist() == [[block[0], block[-1]] for block in blocks]
    dealt = runs(part.blocks, part.programs)
    assert [k for run in dealt for k in run] == list(range(part.blocks))
    assert part.slots.tolist() == [
        row for run in dealt for row in (blocks[run[0]][0], blocks[run[-1]][-1])
    ]
    assert part.slots.diff().ge(0).all()
    for tensor in (part.rows, part.slots):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


@every_graph
@pytest.mark.parametrize("most", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_by_receiver(size: int, most: int, graph: Graph) -> None:
    keys = receivers_of(graph)
    for begin, end in ranges(graph.num_edges):
        check(by_receiver(graph.rowptr, begin, end, size, most), keys[begin:end], size, most)


@every_graph
def test_receivers(graph: Graph) -> None:
    found = partition.receivers_of(graph.rowptr, graph.num_edges)
    assert found.tolist() == receivers_of(graph)
    assert found.dtype == torch.int32


@every_graph
@pytest.mark.parametrize("most", [1, 3, 1000])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_by_sender(size: int, most: int, graph: Graph) -> None:
    senders = senders_of(graph)
    for begin, end in ranges(graph.num_edges):
        order, keys, part = by_sender(
            graph.rowptr, graph.senders, graph.first, begin, end, size, most
        )
        expected = sorted(range(end - begin), key=lambda k, b=begin: (senders[b + k], k))  # type: ignore[misc]
        assert order.tolist() == expected
        assert keys.tolist() == [senders[begin + k] for k in expected]
        assert order.dtype == keys.dtype == torch.int32
        check(part, keys.tolist(), size, most)


@every_graph
@pytest.mark.skipif(not INTERPRETED_BACKENDS, reason="Triton's wheels are for Linux alone")
def test_the_kernels_find_each_edge_once(graph: Graph) -> None:
    """The kernels' side of it: which edges a program takes, with their receivers and senders."""
    import triton_kernels

    edges, size = graph.num_edges, 16
    for programs, (begin, end) in itertools.product((1, 3), ranges(edges)):
        part = by_receiver(graph.rowptr, begin, end, size, programs)
        found = torch.zeros((3, edges), dtype=torch.int32)
        ends = torch.zeros(2 * part.programs, dtype=torch.int32)
        triton_kernels.list_edges(graph, part, begin, end, size, found, ends)
        times, receivers, senders = found.tolist()
        assert times == [int(begin <= e < end) for e in range(edges)]
        assert receivers[begin:end] == receivers_of(graph)[begin:end]
        assert senders[begin:end] == senders_of(graph)[begin:end]
        assert ends.tolist() == part.slots.tolist()


def counted() -> tuple[list[int], Any]:
    calls: list[int] = []

    def make() -> Tensor:
        calls.append(1)
        return torch.ones(2)

    return calls, make


def test_what_was_computed_is_kept_by_tensor_and_key() -> None:
    calls, make = counted()
    tensor, other = torch.arange(3), torch.arange(3)
    first = cached_for(tensor, "a", make)
    assert cached_for(tensor, "a", make) is first
    assert len(calls) == 1
    assert cached_for(tensor, "b", make) is not first
    assert cached_for(other, "a", make) is not first
    assert len(calls) == 3


def test_an_edited_tensor_is_computed_anew() -> None:
    calls, make = counted()
    tensor = torch.arange(3)
    cached_for(tensor, "a", make)
    tensor.add_(1)
    cached_for(tensor, "a", make)
    assert len(calls) == 2
    tensor.data = torch.arange(4)  # no new version, but other memory
    cached_for(tensor, "a", make)
    assert len(calls) == 3


def test_an_edited_rowptr_is_cut_anew() -> None:
    rowptr = torch.tensor([0, 2, 4])

    def part() -> Partition:
        found: Partition = cached_for(rowptr, (0, 4, 2, 1), lambda: by_receiver(rowptr, 0, 4, 2, 1))
        return found

    assert part() is part()
    assert part().rows.tolist() == [[0, 0], [1, 1]]
    rowptr[1] = 1
    assert part().rows.tolist() == [[0, 1], [1, 1]]


def test_nothing_outlives_its_tensor() -> None:
    tensor = torch.arange(3)
    before = len(cache._of_tensors)
    cached_for(tensor, "a", lambda: torch.ones(2))
    assert len(cache._of_tensors) == before + 1
    del tensor
    gc.collect()
    assert len(cache._of_tensors) == before


def test_what_inference_mode_computed_serves_training() -> None:
    """Saved for a backward, an inference tensor would be refused."""
    tensor = torch.arange(3)
    with torch.inference_mode():
        found = cached_for(tensor, "a", lambda: torch.ones(2))
        inside = torch.arange(3)
        assert cached_for(inside, "a", lambda: 1) == 1
    assert not found.is_inference()
    assert cached_for(tensor, "a", lambda: torch.zeros(2)) is found

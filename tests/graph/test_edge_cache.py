"""Graphs of raw edge lists are cached, and every edit of a list is noticed."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from egnn_fast import Graph, nn
from egnn_fast.graph import edge_cache, sorting
from egnn_fast.graph.edge_cache import graph_of
from egnn_fast.runtime import native

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_thread")]
N, E = 8, 30


def draw() -> Tensor:
    return torch.randint(N, (2, E))


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6), torch.randn(N, 3)


@pytest.fixture(params=["cpu", "reference"])
def layer(request: pytest.FixtureRequest) -> nn.EGCL:
    return nn.EGCL(6, 6, 8, backend=request.param)


class Trivial(Tensor):
    pass


def by_data(edges: Tensor) -> None:
    edges.data.copy_(edges.flip(0))


def by_numpy(edges: Tensor) -> None:
    edges.numpy()[0, 0] ^= 1


def by_dlpack(edges: Tensor) -> None:
    torch.utils.dlpack.from_dlpack(edges.detach())[1, -1] ^= 1


def by_address(edges: Tensor) -> None:
    """As communication libraries write."""
    new = edges.flip(1).contiguous()
    ctypes.memmove(edges.data_ptr(), new.data_ptr(), new.nbytes)


def by_storage(edges: Tensor) -> None:
    edges.data = edges.flip(0).clone()


@pytest.mark.parametrize("write", [by_data, by_numpy, by_dlpack, by_address, by_storage])
@pytest.mark.parametrize("inference", [False, True])
def test_content_written_in_any_way_is_noticed(
    write: Callable[[Tensor], None], inference: bool, layer: nn.EGCL
) -> None:
    h, x = inputs()
    with torch.inference_mode(inference), torch.no_grad():
        edges = draw()
        layer(h, x, edges)
        write(edges)
        right = layer(h, x, Graph.from_edge_index(edges, N))
        assert torch.equal(layer(h, x, edges)[0], right[0])


def test_shared_memory_is_noticed() -> None:
    edges = draw().share_memory_()
    before = graph_of(edges, N)
    other = edges.detach().view(-1)
    other.data[:E] = other.data[:E].flip(0)
    assert graph_of(edges, N) is not before
    assert torch.equal(graph_of(edges, N).edge_index, edges)


LAYOUTS: dict[str, Callable[[], Any]] = {
    "int64": draw,
    "int32": lambda: draw().int(),
    "listed in pairs": lambda: draw().T.contiguous().T,
    "strided": lambda: torch.stack((draw(), draw()), dim=-1)[..., 0],
    "offset": lambda: torch.randint(N, (3 * E,))[E - 1 : -1].view(2, -1),
    "expanded": lambda: torch.randint(N, (2, 1)).expand(2, E),
    "subclass": lambda: draw().as_subclass(Trivial),
    "two tensors": lambda: [draw()[0], draw()[1]],
    "two strided ones": lambda: list(draw().T.contiguous().T),
    "no edges": lambda: torch.empty(2, 0, dtype=torch.int64),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_cached_and_checked(make: Callable[[], Any]) -> None:
    edges = make()
    graph = graph_of(edges, N)
    assert graph_of(edges, N) is graph
    last = edges[1] if isinstance(edges, list) else edges
    if last.numel() == 0:
        return
    with torch._C.DisableTorchFunctionSubclass():
        entry = last.as_strided((1,), (1,), last.storage_offset())
        entry.data.bitwise_xor_(1)
    assert graph_of(edges, N) is not graph
    plain = [torch.as_tensor(row.tolist()) for row in edges]
    assert torch.equal(graph_of(edges, N).edge_index, torch.stack(plain))


def test_a_pair_is_not_found_after_its_second_tensor_is_freed() -> None:
    receivers, senders = draw().unbind()
    graph = graph_of([receivers, senders.clone()], N)
    gc.collect()
    assert graph_of([receivers, senders.clone()], N) is not graph


def test_without_the_extension_nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "core", None)
    edges = draw()
    graph = graph_of(edges, N)
    edges.data.copy_(edges.flip(0))
    assert torch.equal(graph_of(edges, N).edge_index, edges)
    assert not torch.equal(graph.edge_index, edges)


def test_a_graph_dies_with_its_edges() -> None:
    edges = draw()
    graph = weakref.ref(graph_of(edges, N))
    assert graph() is not None
    del edges
    gc.collect()
    assert graph() is None


def checksum(data: bytes, threads: int = 1, offset: int = 0) -> int:
    assert native.core is not None
    memory = ctypes.create_string_buffer(b"x" * offset + data)
    found: int = native.core.checksum(ctypes.addressof(memory) + offset, len(data), threads)
    return found


def test_checksums_tell_contents_apart() -> None:
    data = np.random.default_rng(0).bytes(700)
    seen = {checksum(b"")}
    for length in range(1, 300):  # every remainder
        seen |= {checksum(data[:length]), checksum(bytes(length))}
    assert len(seen) == 599
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    for k in range(len(bits)):
        bits[k] ^= 1
        seen.add(checksum(np.packbits(bits).tobytes()))
        bits[k] ^= 1
    seen.add(checksum(data))
    words = [data[k : k + 8] for k in range(0, 696, 8)]
    for k in range(len(words) - 1):
        swapped = [*words[:k], words[k + 1], words[k], *words[k + 2 :]]
        seen.add(checksum(b"".join(swapped)))
    assert len(seen) == 599 + len(bits) + 1 + len(words) - 1


def test_checksums_are_the_same_on_any_number_of_threads_and_at_any_address() -> None:
    data = np.random.default_rng(1).bytes(3_000_001)
    right = checksum(data)
    assert all(checksum(data, threads) == right for threads in (2, 3, 7))
    assert all(checksum(data, 2, offset) == right for offset in (1, 3, 4))
    assert checksum(data[:-1] + bytes([data[-1] ^ 1]), 2) != right
    part = 1 << 18
    assert checksum(data[part : 2 * part] + data[:part] + data[2 * part :], 2) != right


def _child(edges: Tensor, results: Any) -> None:
    results.put(graph_of(edges, 1000).num_edges)


@pytest.mark.alone
def test_a_forked_child_checks_large_lists_too() -> None:
    torch.set_num_threads(2)
    edges = torch.randint(1000, (2, 200_000))
    graph_of(edges, 1000)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=_child, args=(edges, results))
    child.start()
    try:
        assert results.get(timeout=60) == 200_000
    finally:
        child.kill()
        child.join()


def test_lists_on_another_device_are_never_cached() -> None:
    edges = draw().to("meta")
    held = len(edge_cache._entries)
    assert graph_of(edges, N) is not graph_of(edges, N)
    assert len(edge_cache._entries) == held
    assert sorting.sort_in_trace(edges, N)[0].is_meta

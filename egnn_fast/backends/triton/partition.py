"""How a graph's edges are cut into blocks, and these dealt to programs of the GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from egnn_fast.graph.cache import cached_for
from egnn_fast.kernels.records import Chunk


class Partition(NamedTuple):
    """Blocks of edges in receiver order.

    Attributes
    ----------
    blocks : int
        Their number.
    programs : int
        Programs that share them, each a run of blocks.
    rows : Tensor [blocks, 2], int32
        Rows (receivers) of each block's first and last edge.
    slots : Tensor [2 programs], int32
        Rows of each program's first and last edge.
    """

    blocks: int
    programs: int
    rows: Tensor
    slots: Tensor

    def chunk(self, begin: int, end: int) -> Chunk:
        """The launch over the edges from ``begin`` to ``end``, which are those of the blocks."""
        return Chunk(begin, end, self.blocks, self.programs)


def by_receiver(rowptr: Tensor, begin: int, end: int, size: int, most: int) -> Partition:
    """The edges from ``begin`` to ``end`` in blocks of ``size``, for at most ``most`` programs.

    Like all here it does not wait for the device.
    """

    def receivers(edges: Tensor) -> Tensor:
        return torch.searchsorted(rowptr, edges, right=True) - 1

    return _partition(receivers, begin, end, size, most, rowptr.device)


def receivers_of(rowptr: Tensor, num_edges: int) -> Tensor:
    """The receiver of each edge, ``[E]`` in int32."""
    nodes = torch.arange(rowptr.shape[0] - 1, dtype=torch.int32, device=rowptr.device)
    return nodes.repeat_interleave(rowptr.diff(), output_size=num_edges)


class SenderOrder(NamedTuple):
    """A run of edges by sender.

    Attributes
    ----------
    order : Tensor [edges], int32
        Their positions in the run, sorted by sender and then by position.
    keys : Tensor [edges], int32
        The senders in this order.
    part : Partition
        Its rows are senders.
    """

    order: Tensor
    keys: Tensor
    part: Partition


def cached_by_sender(
    rowptr: Tensor, senders: Tensor | None, first: Tensor | None, begin: int, end: int,
    size: int, most: int,
) -> SenderOrder:  # fmt: skip
    """:func:`by_sender`, cached with the tensor that it depends on."""
    graph, key = (rowptr, senders, first), (begin, end, size, most)
    # depends on the listed senders alone; in complete graphs on rowptr, which gives their sizes
    cached: SenderOrder = cached_for(
        rowptr if senders is None else senders, ("by sender", *key), lambda: by_sender(*graph, *key)
    )
    return cached


def by_sender(
    rowptr: Tensor, senders: Tensor | None, first: Tensor | None, begin: int, end: int,
    size: int, most: int,
) -> SenderOrder:  # fmt: skip
    """The edges from ``begin`` to ``end`` by sender."""
    if senders is not None:
        sender = senders[begin:end]
    else:
        assert first is not None
        edges = torch.arange(begin, end, device=rowptr.device)
        receiver = torch.searchsorted(rowptr, edges, right=True) - 1
        sender = first[receiver] + (edges - rowptr[receiver])
        sender = (sender + (sender >= receiver)).to(torch.int32)
    keys, order = torch.sort(sender, stable=True)
    part = _partition(lambda position: keys[position], 0, end - begin, size, most, rowptr.device)
    return SenderOrder(order.to(torch.int32), keys, part)


def _partition(
    row_of: Callable[[Tensor], Tensor], begin: int, end: int, size: int, most: int,
    device: torch.device,
) -> Partition:  # fmt: skip
    blocks = -(-(end - begin) // size)
    programs = min(blocks, most)
    start = torch.arange(begin, end, size, device=device)
    edges = torch.stack((start, (start + (size - 1)).clamp(max=end - 1)), dim=1)
    rows = row_of(edges).to(torch.int32)
    # as run_of_blocks deals them: the first programs take one more
    each, over = divmod(blocks, programs)
    turn = torch.arange(programs, device=device)
    head = turn * each + turn.clamp(max=over)
    tail = head + each + (turn < over).long() - 1
    slots = torch.stack((rows[head, 0], rows[tail, 1]), dim=1)
    return Partition(blocks, programs, rows, slots.reshape(-1))

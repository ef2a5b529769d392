"""How a graph's edges are cut into blocks, and these dealt to programs: what GPU kernels read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


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


# of a tensor that a graph keeps: what was computed from it, by key; alive as long as it is
_kept = WeakTensorKeyDictionary()


def kept(tensor: Tensor, key: Any, make: Callable[[], Any]) -> Any:
    """``make()``, computed once for this tensor (as long as it is not written to) and key.

    Anew while a CUDA graph is captured, if it was not before: what a capture records has no values
    until the graph runs. What another stream made is waited for.
    """
    found = _of(tensor)
    on_gpu = tensor.is_cuda
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if key not in found:
        with torch.inference_mode(False):
            value = make()
        if capturing:
            return value
        found[key] = (value, _Made() if on_gpu else None)
    value, made = found[key]
    if made is not None and not capturing:  # before a capture the whole device is waited for
        made.await_by_current_stream(value)
    return value


class _Made:
    """When and on which stream something was computed."""

    def __init__(self) -> None:
        self.stream = torch.cuda.current_stream()
        self.event = self.stream.record_event()

    def await_by_current_stream(self, value: Any) -> None:
        """Let the current stream wait for it, and its memory for the current stream."""
        current = torch.cuda.current_stream()
        if current == self.stream:
            return
        current.wait_event(self.event)
        for t in _tensors(value):
            t.record_stream(current)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def know(tensor: Tensor, key: Any, value: Any) -> None:
    """Let ``kept`` find a value that is known already."""
    _of(tensor).setdefault(key, (value, None))


def _of(tensor: Tensor) -> dict[Any, Any]:
    state = (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
    entry = _kept.get(tensor)
    if entry is None or entry[0] != state:
        entry = (state, {})
        _kept[tensor] = entry
    values: dict[Any, Any] = entry[1]
    return values


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
        Their places in the run, sorted by sender and then by place.
    keys : Tensor [edges], int32
        The senders in this order.
    part : Partition
        Its rows are senders.
    """

    order: Tensor
    keys: Tensor
    part: Partition


def by_sender(
    rowptr: Tensor, senders: Tensor | None, first: Tensor | None, begin: int, end: int,
    size: int, most: int,
) -> SenderOrder:  # fmt: skip
    """The edges from ``begin`` to ``end`` by sender."""
    if senders is not None:
        found = senders[begin:end]
    else:
        assert first is not None
        edges = torch.arange(begin, end, device=rowptr.device)
        receiver = torch.searchsorted(rowptr, edges, right=True) - 1
        found = first[receiver] + (edges - rowptr[receiver])
        found = (found + (found >= receiver)).to(torch.int32)
    keys, order = torch.sort(found, stable=True)
    part = _partition(lambda place: keys[place], 0, end - begin, size, most, rowptr.device)
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

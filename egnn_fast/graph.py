"""Graphs as the kernels read them: receiver-sorted CSR, or implicit complete components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from egnn_fast import _sorting

EdgeIndexLike = Tensor | Sequence[Any]
INT32_MAX = 2**31 - 1


def _lasting() -> torch.inference_mode:
    """What a graph keeps must serve training too, whatever the mode that first asked for it."""
    return torch.inference_mode(False)


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """An immutable directed graph, ordered by receiver.

    Build it with :meth:`from_edge_index` or :meth:`complete`. ``edge_attr`` and masks that go
    with it are in the *user's* edge order, that of :attr:`edge_index`.

    Attributes
    ----------
    rowptr : Tensor [N + 1], int64
        Edges ``rowptr[i]`` to ``rowptr[i + 1]`` are received by node i.
    senders : Tensor [E], int32, or None
        Sender of each edge in receiver order; None for a complete graph.
    perm : Tensor [E], int32, or None
        The user's number of each edge in receiver order; None where both orders agree.
    first : Tensor [N], int32, or None
        Complete graphs only: the first node of each node's component.
    """

    rowptr: Tensor
    senders: Tensor | None = None
    perm: Tensor | None = None
    first: Tensor | None = None
    _lazy: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    @_lasting()
    def from_edge_index(
        cls, edge_index: EdgeIndexLike, num_nodes: int, *, validate: bool = True
    ) -> Graph:
        """Sort an edge list by receiver, stably.

        Parameters
        ----------
        edge_index : Tensor [2, E], int64 or int32, or a pair of tensors or lists
            Row 0 the receivers i, row 1 the senders j. Any order, repeated edges allowed.
        num_nodes : int
            N; every index lies in [0, N).
        validate : bool
            Whether to check the range of the indices; turn it off only for indices known good.

        Raises
        ------
        TypeError, ValueError
            ``edge_index`` or ``num_nodes`` has the wrong type or shape.
        IndexError
            An index is negative or not below ``num_nodes``.
        """
        edges = as_edge_index(edge_index)
        check_count("num_nodes", num_nodes)
        check_edge_count(edges)
        if validate:
            check_index_range(edges, num_nodes)
        rowptr, senders, perm, is_sorted = _sorting.sort_by_receiver(edges, num_nodes)
        # the graph must not change when the caller's tensor does
        return cls(rowptr=rowptr, senders=senders, perm=None if is_sorted else perm)

    @classmethod
    @_lasting()
    def complete(cls, sizes: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> Graph:
        """All ordered pairs (i, j), i != j, within each component; no edge list is stored.

        Parameters
        ----------
        sizes : sequence of int or Tensor [B]
            Nodes of each component; components are numbered one after the other.
        device : torch.device or str
            Where the graph lies.

        Edges are row-major: by component, then receiver, then sender.
        """
        if isinstance(sizes, Tensor) and (sizes.is_floating_point() or sizes.dim() != 1):
            raise TypeError(
                f"sizes: expected a 1-D tensor of integers, got {sizes.dtype} {tuple(sizes.shape)}"
            )
        values = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
        for size in values:
            check_count("sizes", size)
        count = torch.tensor(values, dtype=torch.int64)
        nodes, edges = int(count.sum()), int((count * (count - 1)).sum())
        if max(nodes, edges) > INT32_MAX:
            raise ValueError(f"sizes: at most 2**31 - 1 nodes and edges, got {nodes} and {edges}")
        start = count.cumsum(0) - count
        first = torch.repeat_interleave(start, count)
        degree = torch.repeat_interleave((count - 1).clamp(min=0), count)
        return cls(
            rowptr=_prefix_sum(degree).to(device),
            first=first.to(device=device, dtype=torch.int32),
            _lazy={"num_edges": edges},
        )

    @_lasting()
    def to(self, device: torch.device | str) -> Graph:
        """The same graph on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        moved = [
            None if t is None else t.to(device)
            for t in (self.rowptr, self.senders, self.perm, self.first)
        ]
        assert moved[0] is not None
        kept = {"num_edges": self._lazy["num_edges"]} if "num_edges" in self._lazy else {}
        return Graph(moved[0], moved[1], moved[2], moved[3], _lazy=kept)

    @property
    def device(self) -> torch.device:
        """Where the graph lies."""
        return self.rowptr.device

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.rowptr.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """E."""
        if self.senders is not None:
            return self.senders.shape[0]
        return int(self._cached("num_edges", lambda: int(self.rowptr[-1])))

    @property
    def is_complete(self) -> bool:
        """Whether the edges are implicit."""
        return self.senders is None

    @property
    def degree(self) -> Tensor:
        """Edges received by each node: ``[N]``, int64."""
        return self.rowptr.diff()

    @property
    def edge_index(self) -> Tensor:
        """The edges ``[2, E]``, int64, in the user's order; the caller's own copy."""
        return self.shared_edge_index().clone()

    def shared_edge_index(self) -> Tensor:
        """The same, kept after the first call; not to be written to."""
        return self._cached("edge_index", self._edge_index)

    def parts(self) -> tuple[int, int, tuple[Tensor | None, ...]]:
        """``(N, E, (rowptr, senders, perm, first))``, dense; kept after the first call."""
        return self._cached(
            "parts",
            lambda: (
                self.num_nodes,
                self.num_edges,
                tuple(
                    None if t is None else t.contiguous()
                    for t in (self.rowptr, self.senders, self.perm, self.first)
                ),
            ),
        )

    @property
    def receivers(self) -> Tensor:
        """Receiver of each edge in receiver order: ``[E]``, int64."""
        nodes = torch.arange(self.num_nodes, device=self.device)
        return torch.repeat_interleave(nodes, self.degree, output_size=self.num_edges)

    def transpose(self) -> tuple[Tensor, Tensor]:
        """The edges by sender: ``(colptr [N + 1] int64, order [E] int32)``; built once.

        ``order[colptr[j] : colptr[j + 1]]`` are the places, in receiver order and ascending, of
        the edges that node j sends.
        """
        return self._cached("transpose", self._transpose)

    def inverse_degree(self, dtype: torch.dtype) -> Tensor:
        """1 / max(degree, 1): ``[N]``; kept after the first call."""
        return self._cached(
            ("inverse_degree", dtype),
            lambda: self.degree.clamp(min=1).to(dtype).reciprocal(),
        )

    def sorted_senders(self) -> Tensor:
        """Sender of each edge in receiver order: ``[E]``, int64."""
        if self.senders is not None:
            return self.senders.long()
        assert self.first is not None
        receiver = self.receivers
        place = torch.arange(self.num_edges, device=self.device) - self.rowptr[receiver]
        sender = self.first.long()[receiver] + place
        return sender + (sender >= receiver)

    def _edge_index(self) -> Tensor:
        ordered = torch.stack((self.receivers, self.sorted_senders()))
        if self.perm is None:
            return ordered
        edges = torch.empty_like(ordered)
        edges[:, self.perm.long()] = ordered
        return edges

    def _transpose(self) -> tuple[Tensor, Tensor]:
        senders = self.sorted_senders()
        order = torch.sort(senders, stable=True).indices.to(torch.int32)
        return _prefix_sum(torch.bincount(senders, minlength=self.num_nodes)), order

    def _cached(self, key: Any, make: Any) -> Any:
        # a traced region must not read or write what depends on the calls before it
        if torch.compiler.is_compiling():
            return make()
        if key not in self._lazy:
            with _lasting():
                self._lazy[key] = make()
        return self._lazy[key]

    def __repr__(self) -> str:
        kind = "complete, " if self.is_complete else ""
        sizes = f"num_nodes={self.num_nodes}, num_edges={self.num_edges}"
        return f"Graph({kind}{sizes}, device={self.device})"


def as_edge_index(edge_index: EdgeIndexLike) -> Tensor:
    """An edge list of any accepted form as one int64 tensor ``[2, E]``."""
    if not isinstance(edge_index, Tensor):
        if not isinstance(edge_index, Sequence) or len(edge_index) != 2:
            raise TypeError(
                "edge_index: expected a Graph, a tensor [2, E] or a pair (receivers, senders), "
                f"got {type(edge_index).__name__}"
            )
        rows = [torch.as_tensor(row) for row in edge_index]
        # an empty list has no dtype of its own
        rows = [row.long() if row.numel() == 0 else row for row in rows]
        if rows[0].shape != rows[1].shape or rows[0].dim() != 1:
            raise ValueError(
                "edge_index: receivers and senders must be 1-D of one length, "
                f"got {tuple(rows[0].shape)} and {tuple(rows[1].shape)}"
            )
        if rows[0].device != rows[1].device:
            raise ValueError(
                f"edge_index: receivers lie on {rows[0].device}, senders on {rows[1].device}"
            )
        edge_index = torch.stack(rows)
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index: expected int64 or int32, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index: expected shape [2, E], got {list(edge_index.shape)}")
    return edge_index.long()


def check_index_range(edges: Tensor, num_nodes: int) -> None:
    """Raise IndexError unless every entry of ``edges [2, E]`` lies in [0, num_nodes)."""
    if edges.shape[1] == 0:
        return
    low, high = _sorting.index_range(edges)
    if low < 0:
        raise IndexError(f"edge_index: indices must not be negative, got {low}")
    if high >= num_nodes:
        raise IndexError(f"edge_index: indices must be below num_nodes = {num_nodes}, got {high}")


def check_edge_count(edges: Tensor) -> None:
    """Raise ValueError unless 32 bits suffice to number the edges."""
    if edges.shape[1] > INT32_MAX:
        raise ValueError(f"edge_index: at most 2**31 - 1 edges, got {edges.shape[1]}")


def check_count(name: str, value: object) -> None:
    """Raise unless ``value`` is a whole number from 0 to 2**31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if not 0 <= value <= INT32_MAX:
        raise ValueError(f"{name}: expected 0 to 2**31 - 1, got {value}")


def _prefix_sum(counts: Tensor) -> Tensor:
    out = counts.new_zeros(counts.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=out[1:])
    return out

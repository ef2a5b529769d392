"""Graphs as the kernels read them: receiver-sorted CSR, or implicit complete components.

Private name of PyTorch used here: ``torch._C._are_functorch_transforms_active``, as in
:mod:`egnn_fast.runtime.eager`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from egnn_fast.graph import batching, cache, sorting
from egnn_fast.graph.edge_lists import (
    EdgeIndexLike,
    as_count,
    as_counts,
    as_edge_index,
    check_edge_count,
    check_totals,
)
from egnn_fast.graph.registration import register
from egnn_fast.graph.validation import DTYPES, check_tensors
from egnn_fast.runtime.eager import is_plain, tracing

TENSORS = tuple(DTYPES)  # names of a Graph's tensors, in the constructor's order


class Graph:
    """An immutable directed graph with its edges sorted by receiver.

    Build it with :meth:`from_edge_index`, :meth:`complete` or :meth:`batch`. Pass ``edge_attr`` and
    edge masks in the *user's* edge order, that of :attr:`edge_index`.

    A Graph can be copied, pickled and saved, and moved like a tensor (:meth:`to`,
    :meth:`pin_memory`); :class:`egnn_fast.nn.GraphBuffer` moves it with a module. PyTorch's
    ``DataLoader`` batches Graphs. PyTorch Geometric's loaders turn the Graphs in ``Data`` objects
    into a list. Layers accept this list and batch it at each call; ``Graph.batch(data.graph)``
    batches it once. For a dataset of Graphs use PyTorch's loader: PyTorch Geometric's loaders do
    not accept it.

    Attributes
    ----------
    rowptr : Tensor [N + 1], int64
        Node i receives the edges ``rowptr[i]`` to ``rowptr[i + 1] - 1``.
    senders : Tensor [E], int32, or None
        Sender of each edge in receiver order; None for a complete graph.
    perm : Tensor [E], int32, or None
        The position in the user's order of each edge in receiver order; None if both orders
        are the same.
    first : Tensor [N], int32, or None
        Complete graphs only: the first node of each node's component.
    sizes : Tensor [B], int64, or None
        Nodes of each graph in a batch, and of each component of :meth:`complete`; see
        :attr:`batch_index`. None for a single graph.

    Raises
    ------
    TypeError, ValueError, IndexError
        The constructor's tensors do not make a graph; the message names the wrong one.
    """

    rowptr: Tensor
    senders: Tensor | None
    perm: Tensor | None
    first: Tensor | None
    sizes: Tensor | None
    _num_edges: int | None
    _cache: cache.Values

    def __init__(
        self,
        rowptr: Tensor,
        senders: Tensor | None = None,
        perm: Tensor | None = None,
        first: Tensor | None = None,
        sizes: Tensor | None = None,
        num_edges: int | None = None,
    ) -> None:
        # num_edges is for complete graphs; if it is None, it is read from rowptr when needed
        tensors = (rowptr, senders, perm, first, sizes)
        check_tensors(dict(zip(TENSORS, tensors, strict=True)))
        self._set(*tensors, num_edges)

    def _set(self, *values: Any) -> None:
        for name, value in zip((*TENSORS, "_num_edges", "_cache"), (*values, {}), strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def trusted(cls, *values: Any) -> Graph:
        """A Graph from all six arguments of the constructor, which are not checked."""
        graph = cls.__new__(cls)
        graph._set(*values)
        return graph

    def __setstate__(self, state: dict[str, Any]) -> None:
        # for Graphs pickled by earlier versions, where Graph was a dataclass
        tensors = [state.get(name) for name in TENSORS]
        self._set(*tensors, state.get("_lazy", {}).get("num_edges"))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Graph is immutable: {name!r} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Graph is immutable: {name!r} cannot be deleted")

    def __reduce__(self) -> tuple[type[Graph], tuple[Any, ...]]:
        return Graph, (*self._tensors(), self._num_edges)

    @classmethod
    def from_edge_index(
        cls, edge_index: EdgeIndexLike, num_nodes: int, *, validate: bool = True
    ) -> Graph:
        """Sort an edge list by receiver, stably.

        Parameters
        ----------
        edge_index : Tensor or NumPy array [2, E], int64 or int32, or a pair of those or of lists
            Row 0 holds the receivers i, row 1 the senders j, in any order; edges may repeat. The
            graph is on the device of the tensors; for arrays and lists, on the CPU.
        num_nodes : int
            N; every index lies in [0, N). A NumPy integer or a 0-dim tensor is accepted.
        validate : bool
            Whether to check the range of the indices. With False, indices out of range are
            undefined behaviour.

        Raises
        ------
        TypeError, ValueError
            ``edge_index`` or ``num_nodes`` has the wrong type or shape.
        IndexError
            An index is negative or not below ``num_nodes``.
        RuntimeError
            The edges are on a GPU and a CUDA graph is being captured.
        """
        edges = as_edge_index(edge_index)
        num_nodes = as_count("num_nodes", num_nodes)
        if tracing() or edges.is_meta or not is_plain(edges):
            # recorded as an operator, which checks the edges when it runs
            return cls(*sorting.sort_in_trace(edges, num_nodes))
        with cache.leave_inference_mode():
            return cls._sorted(edges, num_nodes, validate)

    @classmethod
    def _sorted(cls, edges: Tensor, num_nodes: int, validate: bool) -> Graph:
        if edges.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "edge_index: edges cannot be sorted while a CUDA graph is captured; "
                "build a Graph before the capture"
            )
        check_edge_count(edges)
        if validate:
            sorting.check_index_range(edges, num_nodes)
        rowptr, senders, perm, is_sorted = sorting.sort_by_receiver(edges, num_nodes)
        # senders is a copy: the graph must not change when the caller's tensor does
        return cls.trusted(rowptr, senders, None if is_sorted else perm, None, None, None)

    @classmethod
    def complete(
        cls,
        sizes: Sequence[int] | Tensor | np.ndarray[Any, Any],
        device: torch.device | str = "cpu",
    ) -> Graph:
        """All ordered pairs (i, j), i != j, within each component; no edge list is stored.

        Parameters
        ----------
        sizes : sequence of int, or Tensor or NumPy array [B] of integers
            Nodes of each component; components are numbered one after the other.
        device : torch.device or str
            The graph's device.

        Edges are ordered by component, then by receiver, then by sender.

        Raises
        ------
        TypeError, ValueError
            ``sizes`` are not counts, or there are more than 2**31 - 1 nodes or edges.
        """
        counts = as_counts("sizes", sizes)
        if tracing():
            return cls._complete(counts, device)
        with cache.leave_inference_mode():
            return cls._complete(counts, device)

    @classmethod
    def _complete(cls, counts: list[int], device: torch.device | str) -> Graph:
        nodes, edges = sum(counts), sum(n * (n - 1) for n in counts)
        check_totals("sizes", nodes, edges)
        count = torch.tensor(counts, dtype=torch.int64, device="cpu")
        first = torch.repeat_interleave(count.cumsum(0) - count, count, output_size=nodes)
        degree = torch.repeat_interleave((count - 1).clamp(min=0), count, output_size=nodes)
        return cls(
            rowptr=sorting.prefix_sum(degree).to(device),
            first=first.to(device=device, dtype=torch.int32),
            sizes=count.to(device),
            num_edges=edges,
        )

    @classmethod
    def batch(cls, graphs: Iterable[Graph]) -> Graph:
        """Several graphs as one: the nodes and edges of one graph follow those of another.

        Concatenate edge attributes and masks in the same order. A batch of complete graphs is
        complete. :attr:`sizes` is the number of nodes of each graph (a batch among ``graphs``
        counts as its graphs). :attr:`batch_index` is the graph of each node, for pooling::

            h.new_zeros(graph.num_graphs, h.shape[1]).index_add(0, graph.batch_index, h)

        Raises
        ------
        TypeError, ValueError
            An element is not a Graph, ``graphs`` is empty, the Graphs are on several devices, or
            they have more than 2**31 - 1 nodes or edges.
        """
        members = list(graphs)
        for graph in members:
            if not isinstance(graph, Graph):
                raise TypeError(f"graphs: expected Graphs, got {type(graph).__name__}")
        if not members:
            raise ValueError("graphs: expected at least one Graph")
        if any(graph.device != members[0].device for graph in members):
            devices = sorted({str(graph.device) for graph in members})
            raise ValueError(f"graphs: expected one device, got {', '.join(devices)}")
        if tracing():
            return cls(*batching.joined(members))
        with cache.leave_inference_mode():
            return cls.trusted(*batching.joined(members))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Graph:
        """The graph on another device; ``self`` if it is there already.

        Parameters
        ----------
        device : torch.device, str or int
            The new device. A dtype is not accepted: indices keep theirs.
        non_blocking : bool
            Whether to copy from pinned memory to a GPU without waiting; see ``Tensor.to``.
        """
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def cpu(self) -> Graph:
        """The graph on the CPU."""
        return self.to("cpu")

    def cuda(
        self, device: torch.device | str | int | None = None, non_blocking: bool = False
    ) -> Graph:
        """The graph on a GPU, the current one by default."""
        return self.to("cuda" if device is None else device, non_blocking)

    def pin_memory(self) -> Graph:
        """The graph in page-locked memory, from which GPUs copy without waiting."""
        return self._map(lambda t: t.pin_memory())

    def is_pinned(self) -> bool:
        """Whether the graph is in page-locked memory."""
        return self.rowptr.is_pinned()

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the graph's memory until the stream has done its work so far.

        See ``Tensor.record_stream``.
        """
        for t in self._tensors():
            if t is not None:
                t.record_stream(stream)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Graph:
        """The graph of ``function`` of each tensor; ``self`` if that returns the same tensors."""
        old = self._tensors()
        with cache.leave_inference_mode():
            new = [None if t is None else function(t) for t in old]
        if all(a is b for a, b in zip(old, new, strict=True)):
            return self
        return Graph.trusted(*new, self._num_edges)

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.rowptr, self.senders, self.perm, self.first, self.sizes

    @property
    def device(self) -> torch.device:
        """The device of the graph's tensors."""
        return self.rowptr.device

    @property
    def num_nodes(self) -> int:
        """N, the number of nodes."""
        return self.rowptr.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """E, the number of edges.

        The first read synchronises if the constructor built a complete graph on a GPU.
        """
        if self.senders is not None:
            return self.senders.shape[0]
        if self._num_edges is not None:
            return self._num_edges
        return int(self._cached("num_edges", lambda: int(self.rowptr[-1])))

    @property
    def num_graphs(self) -> int:
        """B: the number of graphs in a batch or of components of :meth:`complete`, else 1."""
        return 1 if self.sizes is None else self.sizes.shape[0]

    @property
    def batch_index(self) -> Tensor:
        """Index of each node's graph: ``[N]``, int64, ascending. Cached: do not write to it."""
        return self._cached("batch_index", self._batch_index)

    @property
    def is_complete(self) -> bool:
        """Whether the edges are implicit: all pairs of nodes in each component."""
        return self.senders is None

    @property
    def degree(self) -> Tensor:
        """Number of edges that each node receives: ``[N]``, int64."""
        return self.rowptr.diff()

    @property
    def edge_index(self) -> Tensor:
        """The edges in the user's order: ``[2, E]``, int64. A copy that may be written to."""
        return self.shared_edge_index().clone()

    def shared_edge_index(self) -> Tensor:
        """:attr:`edge_index` without the copy. Cached: do not write to it."""
        return self._cached("edge_index", self._edge_index)

    @property
    def receivers(self) -> Tensor:
        """Receiver of each edge in receiver order: ``[E]``, int64."""
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # vmap has no rule for repeat_interleave
            starts = self.rowptr[1:-1]
            marks = self.rowptr.new_zeros(self.num_edges + 1)
            return marks.scatter_add(0, starts, torch.ones_like(starts)).cumsum(0)[:-1]
        nodes = torch.arange(self.num_nodes, device=self.device)
        return torch.repeat_interleave(nodes, self.degree, output_size=self.num_edges)

    def transpose(self) -> tuple[Tensor, Tensor]:
        """The edges by sender: ``(colptr [N + 1] int64, order [E] int32)``, cached.

        ``order[colptr[j] : colptr[j + 1]]`` are the positions in receiver order, ascending, of the
        edges that node j sends.
        """
        return self._cached("transpose", self._transpose)

    def inverse_degree(self, dtype: torch.dtype) -> Tensor:
        """1 / max(degree, 1): ``[N]`` in ``dtype``, cached."""
        return self._cached(
            ("inverse_degree", dtype),
            # not reciprocal(): its result on a GPU has the dtype that autocast chooses
            lambda: torch.ones_like(self.degree, dtype=dtype) / self.degree.clamp(min=1).to(dtype),
        )

    def sorted_senders(self) -> Tensor:
        """Sender of each edge in receiver order: ``[E]``, int64."""
        if self.senders is not None:
            return self.senders.long()
        assert self.first is not None
        receiver = self.receivers
        # the k-th edge of a node comes from the k-th other node of its component
        k = torch.arange(self.num_edges, device=self.device) - self.rowptr[receiver]
        sender = self.first.long()[receiver] + k
        return sender + (sender >= receiver)

    def _edge_index(self) -> Tensor:
        ordered = torch.stack((self.receivers, self.sorted_senders()))
        if self.perm is None:
            return ordered
        return ordered.scatter(1, self.perm.long().expand_as(ordered), ordered)

    def _transpose(self) -> tuple[Tensor, Tensor]:
        senders = self.sorted_senders()
        order = torch.sort(senders, stable=True).indices.to(torch.int32)
        return sorting.prefix_sum(torch.bincount(senders, minlength=self.num_nodes)), order

    def _batch_index(self) -> Tensor:
        if self.sizes is None:
            return self.rowptr.new_zeros(self.num_nodes)
        numbers = torch.arange(self.sizes.shape[0], device=self.device)
        return torch.repeat_interleave(numbers, self.sizes, output_size=self.num_nodes)

    def _cached(self, key: Any, make: Callable[[], Any]) -> Any:
        return cache.cached(self._cache, key, make, self.device)

    def __repr__(self) -> str:
        kind = "complete, " if self.is_complete else ""
        sizes = f"num_nodes={self.num_nodes}, num_edges={self.num_edges}"
        return f"Graph({kind}{sizes}, device={self.device})"


register(Graph)

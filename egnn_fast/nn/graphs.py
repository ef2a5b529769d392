"""A graph as a part of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from egnn_fast.graph.graph import TENSORS, Graph


class GraphBuffer(nn.Module):
    """A Graph that moves between devices with its parent module, as a buffer does.

    Assign it to an attribute of a module and pass its :attr:`graph` to the layers::

        self.edges = GraphBuffer(Graph.complete([20]))
        ...
        h, x = self.egnn(h, x, self.edges.graph)

    ``module.to("cuda")`` then moves the graph too; ``module.double()`` does not change its indices.
    Copies and pickles of the module contain the graph, its state_dict does not.

    Parameters
    ----------
    graph : Graph
        The graph.

    Raises
    ------
    TypeError
        ``graph`` is not a Graph.
    """

    graph: Graph

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        if not isinstance(graph, Graph):
            raise TypeError(f"graph: expected a Graph, got {type(graph).__name__}")
        self.graph = graph
        for name in TENSORS:
            self.register_buffer(name, getattr(graph, name), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphBuffer:
        super()._apply(fn, recurse)
        rowptr: Any = self._buffers["rowptr"]
        # use only the device of fn's result: its memory may be uninitialised (to_empty)
        self.graph = self.graph.to(rowptr.device)
        for name in TENSORS:
            self._buffers[name] = getattr(self.graph, name)
        return self

    def extra_repr(self) -> str:
        """The graph's repr."""
        return repr(self.graph)

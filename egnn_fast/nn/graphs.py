"""A graph that belongs to a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from egnn_fast.graph.graph import TENSORS, Graph


class GraphBuffer(nn.Module):
    """A Graph that moves with the module that holds it, as a buffer does.

    Assign it to an attribute and pass its :attr:`graph` to the layers::

        self.edges = GraphBuffer(Graph.complete([20]))
        ...
        h, x = self.egnn(h, x, self.edges.graph)

    Then ``module.to("cuda")`` moves the graph; ``module.double()`` leaves its indices as they are.
    It is copied and pickled with the module, but is not in the state_dict, as it is not trained.

    Parameters
    ----------
    graph : Graph
        The graph.

    Raises
    ------
    TypeError
        ``graph`` is no Graph.
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
        # take the device alone from what fn returned: its memory may be unfilled (to_empty)
        self.graph = self.graph.to(rowptr.device)
        for name in TENSORS:
            self._buffers[name] = getattr(self.graph, name)
        return self

    def extra_repr(self) -> str:
        """The graph, in the module's description."""
        return repr(self.graph)

"""The Graph that layers take: receiver-sorted CSR, its edge lists, and what is cached of them."""

from egnn_fast.graph.edge_lists import INT32_MAX, EdgeIndexLike
from egnn_fast.graph.graph import Graph

__all__ = ["INT32_MAX", "EdgeIndexLike", "Graph"]

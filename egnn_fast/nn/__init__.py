"""E(n)-equivariant layers and networks as modules, in one clean dialect."""

from __future__ import annotations

from egnn_fast.nn.cuda_graphs import GraphedNetwork, graphed
from egnn_fast.nn.graphs import GraphBuffer
from egnn_fast.nn.layers import EGCL, EGCLBase, EGCLVel, explain
from egnn_fast.nn.networks import EGNN, EGNNVel

__all__ = [
    "EGCL",
    "EGCLVel",
    "EGNN",
    "EGNNVel",
    "EGCLBase",
    "GraphBuffer",
    "GraphedNetwork",
    "graphed",
    "explain",
]

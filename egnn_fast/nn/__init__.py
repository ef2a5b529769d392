"""E(n)-equivariant layers and networks as modules.

Their arguments have the names of this package; :mod:`egnn_fast.compat` has the official names.
"""

from __future__ import annotations

from egnn_fast.nn.cuda_graphs import GraphedNetwork, graphed
from egnn_fast.nn.explanation import explain
from egnn_fast.nn.graphs import GraphBuffer
from egnn_fast.nn.layers import EGCL, EGCLBase, EGCLVel
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

"""E(n)-equivariant graph networks with fused kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from egnn_fast.backends import BackendError, info, use_backend
from egnn_fast.functional import egcl, egcl_messages
from egnn_fast.graph import Graph
from egnn_fast.options import EdgeWeights, LayerWeights, Options

if TYPE_CHECKING:
    from egnn_fast import compat, nn
    from egnn_fast.nn import explain

__version__ = "0.1.0"

__all__ = [
    "Graph",
    "Options",
    "EdgeWeights",
    "LayerWeights",
    "egcl",
    "egcl_messages",
    "use_backend",
    "info",
    "explain",
    "BackendError",
    "nn",
    "compat",
]


def __getattr__(name: str) -> Any:
    # loaded at first use, so that importing the package stays light
    if name in ("nn", "compat"):
        return import_module(f"egnn_fast.{name}")
    if name == "explain":
        return import_module("egnn_fast.nn").explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

"""E(n)-equivariant graph networks with fused kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egnn_fast import compat, nn
    from egnn_fast.backends import BackendError, info, use_backend
    from egnn_fast.functional import egcl, egcl_messages
    from egnn_fast.graph import Graph
    from egnn_fast.nn import explain
    from egnn_fast.operators.budget import set_activation_budget
    from egnn_fast.operators.precision import approximate_activations
    from egnn_fast.options import Options
    from egnn_fast.weights import EdgeWeights, LayerWeights

__version__ = "0.1.0"

__all__ = [
    "Graph",
    "Options",
    "EdgeWeights",
    "LayerWeights",
    "egcl",
    "egcl_messages",
    "use_backend",
    "set_activation_budget",
    "approximate_activations",
    "info",
    "explain",
    "BackendError",
    "nn",
    "compat",
]


# The module that defines each name. Modules are imported at first use, so that the command line
# starts without importing PyTorch.
_MODULES = {
    "Graph": "graph",
    "Options": "options",
    "EdgeWeights": "weights",
    "LayerWeights": "weights",
    "egcl": "functional",
    "egcl_messages": "functional",
    "use_backend": "backends",
    "set_activation_budget": "operators.budget",
    "approximate_activations": "operators.precision",
    "info": "backends",
    "BackendError": "backends",
    "explain": "nn",
}


def __getattr__(name: str) -> Any:
    if name in ("nn", "compat"):
        return import_module(f"egnn_fast.{name}")
    if name in _MODULES:
        value = getattr(import_module(f"egnn_fast.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

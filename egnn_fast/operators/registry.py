"""The modules in which the operators find the kernels of each backend.

Each has functions ``messages``, ``messages_backward``, ``layer`` and ``layer_backward``, with the
arguments and results of the operator of the same name (:mod:`egnn_fast.operators.signature`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# names: operators import no backend, and a backend is imported when it is first used
_MODULES = {"cpu": "egnn_fast.backends.cpu", "triton": "egnn_fast.backends.triton"}


def kernels_of(backend: str) -> ModuleType:
    """The module with a backend's kernels.

    Raises
    ------
    ValueError
        No backend of this name has kernels.
    """
    name = _MODULES.get(backend)
    if name is None:
        raise ValueError(f"backend: {backend!r} has no kernels")
    return import_module(name)

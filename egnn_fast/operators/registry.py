"""Where the operators find a backend's kernels; the backends register themselves.

The module of a backend has ``messages``, ``messages_backward``, ``layer`` and ``layer_backward``,
each with the operator's arguments (:mod:`egnn_fast.operators.signature`) and its results.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_modules: dict[str, ModuleType | str] = {}


def register(backend: str, module: str) -> None:
    """Name the module with a backend's kernels; it is imported when they are first needed."""
    _modules[backend] = module


def kernels_of(backend: str) -> ModuleType:
    """The module with a backend's kernels.

    Raises
    ------
    ValueError
        There is none.
    """
    module = _modules.get(backend)
    if module is None:
        raise ValueError(f"backend: {backend!r} has no kernels")
    if isinstance(module, str):
        module = _modules[backend] = import_module(module)
    return module

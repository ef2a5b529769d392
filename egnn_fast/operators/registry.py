"""The modules in which the operators find the kernels of each backend.

:mod:`egnn_fast.backends` registers them. Each has functions ``messages``, ``messages_backward``,
``layer`` and ``layer_backward``, with the arguments and results of the operator of the same name
(:mod:`egnn_fast.operators.signature`).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_modules: dict[str, ModuleType | str] = {}


def register(backend: str, module: str) -> None:
    """Set the name of the module with a backend's kernels; it is imported at first use."""
    _modules[backend] = module


def kernels_of(backend: str) -> ModuleType:
    """The module with a backend's kernels.

    Raises
    ------
    ValueError
        No module is registered for it.
    """
    module = _modules.get(backend)
    if module is None:
        raise ValueError(f"backend: {backend!r} has no kernels")
    if isinstance(module, str):
        module = _modules[backend] = import_module(module)
    return module

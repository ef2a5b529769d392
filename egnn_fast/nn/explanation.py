"""Explain which backend would run a module's layers."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from egnn_fast.backends import Explanation
from egnn_fast.nn import _modules
from egnn_fast.nn.layers import EGCLBase


def explain(module: nn.Module, h: Tensor, x: Tensor) -> Explanation:
    """Which backend and instruction set would run a module's layers on such tensors, and why.

    Parameters
    ----------
    module : torch.nn.Module
        A layer of this package, or a module that contains some. The first layer with a modified
        submodule is explained; if there is none, the first layer.
    h : Tensor [N, any]
        Node features, of any width.
    x : Tensor [N, D]
        Coordinates.

    Raises
    ------
    TypeError
        The module contains no layer of this package.
    BackendError
        The layer's backend was named and cannot run the call.
    """
    layers = [(k, part) for k, part in module.named_modules() if isinstance(part, EGCLBase)]
    for name, layer in layers:
        if _modules.first_change(layer) is not None:
            explanation = layer.explain(h, x)
            reason = explanation.reason
            return replace(explanation, reason=f"{name}.{reason}" if name else reason)
    if layers:
        return layers[0][1].explain(h, x)
    raise TypeError(f"module: {type(module).__name__} contains no layer of egnn_fast")

"""A layer's options as an immutable record: all of its settings that are not tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from egnn_fast.argument_names import suggest_own_name

ACTIVATIONS = ("silu", "relu", "leaky_relu")
COORD_AGGS = ("mean", "sum", None)
UNIT_NORM_EPS = 1e-8

Activation = Callable[[Tensor], Tensor]


@suggest_own_name
@dataclass(frozen=True)
class Options:
    """The settings of a layer that are not tensors.

    Symbols as in CONTRIBUTING.md, "The algorithm".

    Parameters
    ----------
    activation : {"silu", "relu", "leaky_relu"}
        The non-linearity of every MLP of the layer.
    negative_slope : float
        Slope of ``leaky_relu`` below zero; unused by the others.
    attention : bool
        Multiply every message by ``sigmoid(w_g . n_ij + b_g)`` (the paper's eq. 8, inferred
        edges).
    coord_norm : None, "unit" or float
        Divisor rho of the coordinate difference ``d = x_i - x_j``. None: 1. "unit":
        ``|d| + 1e-8``, without a gradient. A number k > 0: ``|d| + k``, with its gradient.
    coord_tanh : bool
        Apply tanh to the coordinate head's output.
    coord_agg : {"mean", "sum", None}
        How a receiver's coordinate updates are aggregated. With ``None`` the layer has no
        coordinate head and does not change the coordinates.
    coord_scale : float
        Factor c on the aggregated coordinate update.
    coord_clamp : float or None
        Clamp each component of an edge's coordinate update to ± this value. Where the clamp
        acts, the layer is not rotation equivariant.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or value; the message names it.
    """

    activation: str = "silu"
    negative_slope: float = 0.01
    attention: bool = False
    coord_norm: str | float | None = None
    coord_tanh: bool = False
    coord_agg: str | None = "mean"
    coord_scale: float = 1.0
    coord_clamp: float | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {self.activation!r}")
        for name in ("attention", "coord_tanh"):
            # a frozen dataclass forbids plain assignment
            if not isinstance(getattr(self, name), bool):
                object.__setattr__(self, name, as_bool(name, getattr(self, name)))
        for name in ("negative_slope", "coord_scale"):
            _check_number(name, getattr(self, name))
        if self.coord_agg not in COORD_AGGS:
            raise ValueError(
                f"coord_agg: expected 'mean', 'sum' or None (no coordinate update), "
                f"got {self.coord_agg!r}"
            )
        if self.coord_norm is not None and self.coord_norm != "unit":
            if isinstance(self.coord_norm, str):
                raise ValueError(
                    f"coord_norm: expected None, 'unit' or a positive number, "
                    f"got {self.coord_norm!r}"
                )
            _check_number("coord_norm", self.coord_norm, positive=True)
        if self.coord_clamp is not None:
            _check_number("coord_clamp", self.coord_clamp, positive=True)

    @property
    def updates_coords(self) -> bool:
        """Whether the layer has a coordinate head."""
        return self.coord_agg is not None

    def activation_fn(self) -> Activation:
        """The activation as a PyTorch function on tensors of any shape, differentiable."""
        if self.activation == "silu":
            return F.silu
        if self.activation == "relu":
            return F.relu
        slope = self.negative_slope
        return lambda z: F.leaky_relu(z, slope)


def as_bool(name: str, value: object) -> bool:
    """Convert a bool, a NumPy bool, 0 or 1 to bool: command lines and configurations have all.

    Raises
    ------
    TypeError
        ``value`` is anything else.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name}: expected a bool, got {value!r}")


def _check_number(name: str, value: object, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if math.isnan(value) or math.isinf(value) or (positive and value <= 0):
        kind = "a positive finite number" if positive else "a finite number"
        raise ValueError(f"{name}: expected {kind}, got {value!r}")


def __getattr__(name: str) -> Any:
    """The records of weights, which stood in this file: pickles name them so."""
    if name in ("EdgeWeights", "LayerWeights"):
        return getattr(import_module("egnn_fast.weights"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

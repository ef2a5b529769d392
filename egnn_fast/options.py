"""What a layer is made of: its options and its weights, as plain immutable records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from egnn_fast.argument_names import hinted

ACTIVATIONS = ("silu", "relu", "leaky_relu")
COORD_AGGS = ("mean", "sum", None)
UNIT_NORM_EPS = 1e-8
# the tensors of a layer beside its weights, in the order in which its operator takes them
LAYER_INPUTS = ("h", "x", "v", "edge_attr", "edge_mask", "node_attr", "coord_weight")

Activation = Callable[[Tensor], Tensor]


@hinted
@dataclass(frozen=True)
class Options:
    """Everything about a layer that is not a tensor.

    Parameters
    ----------
    activation : {"silu", "relu", "leaky_relu"}
        The non-linearity of every MLP of the layer.
    negative_slope : float
        Slope of ``leaky_relu`` below zero; unused by the others.
    attention : bool
        Gate every message by ``sigmoid(w_g . n_ij + b_g)`` (the paper's eq. 8, inferred edges).
    coord_norm : None, "unit" or float
        Divisor of the coordinate difference: none; ``|d| + 1e-8``, detached; or ``|d| + k``.
    coord_tanh : bool
        Bound the coordinate head's output by tanh.
    coord_agg : {"mean", "sum", None}
        How coordinate updates are aggregated; ``None`` leaves the coordinates alone.
    coord_scale : float
        Factor on the aggregated coordinate update.
    coord_clamp : float or None
        Bound on each component of an edge's coordinate update. It breaks rotation
        equivariance where it acts.

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
            # object's, because the dataclass is frozen
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
        """The activation as a differentiable PyTorch function."""
        if self.activation == "silu":
            return F.silu
        if self.activation == "relu":
            return F.relu
        slope = self.negative_slope
        return lambda z: F.leaky_relu(z, slope)


def as_bool(name: str, value: object) -> bool:
    """A bool for a bool, 0, 1 or a NumPy bool, as command lines and configurations give it.

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


class EdgeWeights(NamedTuple):
    """Weights of the edge pass, the first linear already split (CONTRIBUTING.md, "The algorithm").

    With H hidden and A edge-attribute features, in ``torch.nn.Linear`` layout:
    ``w_r [H]``, ``w_a [H, A]`` or None, ``w2 [H, H]``, ``b2 [H]``; with attention ``w_g [H]``,
    ``b_g [1]``; with a coordinate head ``w3 [H, H]``, ``b3 [H]``, ``w_x [H]``.
    """

    w_r: Tensor
    w_a: Tensor | None
    w2: Tensor
    b2: Tensor
    w_g: Tensor | None = None
    b_g: Tensor | None = None
    w3: Tensor | None = None
    b3: Tensor | None = None
    w_x: Tensor | None = None


class LayerWeights(NamedTuple):
    """All weights of one layer in ``torch.nn.Linear`` layout, the first linear unsplit.

    With F input, H hidden, O output, A edge-attribute and B node-attribute features:
    ``edge_w1 [H, 2F + 1 + A]`` (columns: receiver, sender, squared distance, attributes),
    ``edge_b1 [H]``, ``edge_w2 [H, H]``, ``edge_b2 [H]``, ``node_w1 [H, F + H + B]``,
    ``node_b1 [H]``, ``node_w2 [O, H]``, ``node_b2 [O]``; with attention ``att_w [1, H]``,
    ``att_b [1]``; with a coordinate head ``coord_w1 [H, H]``, ``coord_b1 [H]``,
    ``coord_w2 [1, H]``; with velocity ``vel_w1 [H, F]``, ``vel_b1 [H]``, ``vel_w2 [1, H]``,
    ``vel_b2 [1]``.
    """

    edge_w1: Tensor
    edge_b1: Tensor
    edge_w2: Tensor
    edge_b2: Tensor
    node_w1: Tensor
    node_b1: Tensor
    node_w2: Tensor
    node_b2: Tensor
    att_w: Tensor | None = None
    att_b: Tensor | None = None
    coord_w1: Tensor | None = None
    coord_b1: Tensor | None = None
    coord_w2: Tensor | None = None
    vel_w1: Tensor | None = None
    vel_b1: Tensor | None = None
    vel_w2: Tensor | None = None
    vel_b2: Tensor | None = None

    def split(self, in_features: int) -> tuple[Tensor, Tensor, EdgeWeights]:
        """Split the first linear: ``(w_pq [2H, F], b_pq [2H], edge weights)``.

        ``h @ w_pq.T + b_pq`` holds P (with the bias) and Q side by side.
        """
        hidden, width = self.edge_w1.shape
        attrs = width - 2 * in_features - 1
        w_i, w_j, w_r, w_a = self.edge_w1.split((in_features, in_features, 1, attrs), dim=1)
        edge = self.edge_weights(w_r.squeeze(1), w_a if attrs else None)
        return torch.cat((w_i, w_j)), F.pad(self.edge_b1, (0, hidden)), edge

    def edge_weights(self, w_r: Tensor, w_a: Tensor | None) -> EdgeWeights:
        """The edge pass's weights, given the first linear's columns."""
        return EdgeWeights(
            w_r=w_r,
            w_a=w_a,
            w2=self.edge_w2,
            b2=self.edge_b2,
            w_g=None if self.att_w is None else self.att_w.squeeze(0),
            b_g=self.att_b,
            w3=self.coord_w1,
            b3=self.coord_b1,
            w_x=None if self.coord_w2 is None else self.coord_w2.squeeze(0),
        )

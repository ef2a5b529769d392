"""A layer's weights as immutable records, and the split of the edge MLP's first linear."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class EdgeWeights(NamedTuple):
    """Weights of the edge pass after the split of W1 (CONTRIBUTING.md, "The algorithm").

    P and Q are computed from the rest of W1. With H hidden and A edge-attribute features, in
    ``torch.nn.Linear`` layout:
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
    """All weights of one layer in ``torch.nn.Linear`` layout, with W1 in one piece.

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
        """Split W1 into node-level and edge-level parts.

        Parameters
        ----------
        in_features : int
            F.

        Returns
        -------
        (w_pq, b_pq, edge_weights)
            ``w_pq [2H, F]`` and ``b_pq [2H]`` give ``h @ w_pq.T + b_pq``, which is P (with the
            bias b1) and Q side by side, ``[N, 2H]``. The rest is an :class:`EdgeWeights`.
        """
        hidden, width = self.edge_w1.shape
        attrs = width - 2 * in_features - 1
        w_i, w_j, w_r, w_a = self.edge_w1.split((in_features, in_features, 1, attrs), dim=1)
        edge = self.edge_weights(w_r.squeeze(1), w_a if attrs else None)
        return torch.cat((w_i, w_j)), F.pad(self.edge_b1, (0, hidden)), edge

    def edge_weights(self, w_r: Tensor, w_a: Tensor | None) -> EdgeWeights:
        """The edge pass's weights, with W1's columns ``w_r [H]`` and ``w_a [H, A]`` or None."""
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

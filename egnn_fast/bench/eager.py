"""The layer as the official code computes it, on the submodules of a layer of this package.

The first linear is applied to the concatenation, sums are ``scatter_add_``, and the mean counts the
edges at each call. This is a baseline for time only, and has only the options that the benchmarks
use. The definition of right results is :mod:`egnn_fast.reference`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from egnn_fast.graph import Graph
from egnn_fast.nn.layers import EGCLBase
from egnn_fast.reference import segment_sum


class OfficialLayer(nn.Module):
    """The official ``E_GCL``, without normalised differences, masks and node attributes.

    Parameters
    ----------
    layer : EGCLBase
        The layer whose submodules it runs; they are shared, not copied.
    edges : Tensor [2, E]
        Receivers and senders.
    order : Tensor [E], optional
        If ``edges`` are shuffled: the index of each in the user's order, to which ``edge_attr``
        belongs.

    Raises
    ------
    ValueError
        The layer has an option that is not supported here.
    """

    def __init__(self, layer: EGCLBase, edges: Tensor, order: Tensor | None = None) -> None:
        super().__init__()
        self.edges, self.order = edges, order
        options = layer.options
        if options.coord_norm is not None or options.coord_agg == "sum":
            raise ValueError("layer: the benchmarks' eager layer knows plain differences and means")
        self.clamp, self.residual = options.coord_clamp, layer.residual
        parts = layer._modules
        self.edge_mlp: Any = parts["edge_mlp"]
        self.node_mlp: Any = parts["node_mlp"]
        self.att_mlp: Any = parts.get("att_mlp")
        self.coord_mlp: Any = parts.get("coord_mlp")
        self.coord_mlp_vel: Any = parts.get("coord_mlp_vel")

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        graph: Graph,
        v: Tensor | None = None,
        *,
        edge_attr: Tensor | None = None,
        node_attr: None = None,
        edge_mask: None = None,
        node_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`egnn_fast.nn.EGCLVel.forward`, but ``graph`` is ignored: ``edges`` are used."""
        row, col = self.edges
        difference = x[row] - x[col]
        radial = torch.sum(difference**2, 1, keepdim=True)
        inputs = [h[row], h[col], radial]
        if edge_attr is not None:
            inputs.append(edge_attr if self.order is None else edge_attr[self.order])
        message = self.edge_mlp(torch.cat(inputs, dim=1))
        if self.att_mlp is not None:
            message = message * self.att_mlp(message)
        moved = x
        if self.coord_mlp is not None:
            shift = difference * self.coord_mlp(message)
            if self.clamp is not None:
                shift = torch.clamp(shift, -self.clamp, self.clamp)
            moved = x + _segment_mean(shift, row, len(x))
        if self.coord_mlp_vel is not None and v is not None:
            moved = moved + self.coord_mlp_vel(h) * v
        aggregated = segment_sum(message, row, len(h))
        update = self.node_mlp(torch.cat([h, aggregated], dim=1))
        return (h + update if self.residual else update), moved


def official(module: nn.Module, edges: Tensor, order: Tensor | None = None) -> nn.Module:
    """A copy of a layer or network, with each layer replaced by an :class:`OfficialLayer`.

    For ``edges [2, E]`` and ``order [E]`` see :class:`OfficialLayer`.
    """
    module = copy.deepcopy(module)
    if isinstance(module, EGCLBase):
        return OfficialLayer(module, edges, order)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, EGCLBase):
                parent.add_module(name, OfficialLayer(child, edges, order))
    return module


def _segment_mean(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Mean of the rows of ``values [E, K]`` that share an index: ``[segments, K]``."""
    count = segment_sum(torch.ones_like(values), index, segments)
    return segment_sum(values, index, segments) / count.clamp(min=1)

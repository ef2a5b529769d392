"""Code that the modules share: the layer with the official forward, and checks of arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from egnn_fast import reference
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import check_activation, check_sizes
from egnn_fast.nn.layers import EGCLBase

# the bound at which the official gcl and n-body layers clamp an edge's coordinate update
CLAMP = 100.0
# methods that the official layers' forward calls; the layers here have none of them
METHODS = ("edge_model", "node_model", "coord_model", "coord2radial")


class OfficialLayer(EGCLBase):
    """Layer with the official forward: ``(h, edge_index, coord, ...) -> (h, coord, edge_attr)``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError if a subclass overrides one of METHODS but not forward."""
        super().__init_subclass__(**kwargs)
        unused = [name for name in METHODS if name in vars(cls)]
        if unused and cls.forward.__module__.startswith("egnn_fast."):
            raise TypeError(
                f"{cls.__name__}.{unused[0]}: forward does not call it: a layer is one call; "
                "override forward too, or replace the submodules edge_mlp, coord_mlp, ..."
            )

    def forward(
        self,
        h: Tensor,
        edge_index: Graph | EdgeIndexLike,
        coord: Tensor,
        edge_attr: Tensor | None = None,
        node_attr: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the layer.

        Parameters
        ----------
        h : Tensor [N, input_nf]
            Node features.
        edge_index : Graph, Tensor [2, E] or pair of tensors or lists
            Receivers and senders.
        coord : Tensor [N, D]
            Coordinates; not written to.
        edge_attr : Tensor [E, edges_in_d], optional
            Edge attributes.
        node_attr : Tensor [N, nodes_att_dim], optional
            Node attributes.

        Returns
        -------
        (h, coord, edge_attr)
            New features ``[N, output_nf]``, new coordinates ``[N, D]``, and ``edge_attr``
            unchanged.

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
        """
        new_h, new_x, _ = self._run(h, coord, edge_index, edge_attr=edge_attr, node_attr=node_attr)
        return new_h, new_x, edge_attr


def check_layer(
    act_fn: object,
    residual_name: str,
    residual: bool,
    *,
    input_nf: int,
    output_nf: int,
    hidden_nf: int,
    **attributes: int,
) -> None:
    """Check a layer's arguments under their official names.

    ``residual_name`` is the official name of ``residual``; ``attributes`` are the widths of edge
    and node attributes.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """
    check_sizes(1, input_nf=input_nf, output_nf=output_nf, hidden_nf=hidden_nf)
    check_sizes(0, **attributes)
    check_activation("act_fn", act_fn)
    if residual and input_nf != output_nf:
        raise ValueError(
            f"{residual_name}: needs input_nf = output_nf, got {input_nf} and {output_nf}"
        )


def add_layers(network: nn.Module, n_layers: int, layer: Any, *args: Any, **kwargs: Any) -> None:
    """Add ``gcl_0``, ``gcl_1``, ..., each built as ``layer(*args, **kwargs)``."""
    for i in range(n_layers):
        network.add_module(f"gcl_{i}", layer(*args, **kwargs))


def unsorted_segment_sum(data: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum the rows of ``data [E, K]`` that share a segment: ``[num_segments, K]``."""
    return reference.segment_sum(data, segment_ids, num_segments)


def unsorted_segment_mean(data: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Mean of the rows of ``data [E, K]`` that share a segment: ``[num_segments, K]``.

    Empty segments give 0.
    """
    count = torch.bincount(segment_ids, minlength=num_segments).clamp(min=1)
    return unsorted_segment_sum(data, segment_ids, num_segments) / count.unsqueeze(1).to(data.dtype)

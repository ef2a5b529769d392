"""``models.egnn_clean.egnn_clean``: the official EGNN, by default with SiLU and residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from egnn_fast.argument_names import suggest_own_name
from egnn_fast.compat._official import (
    OfficialLayer,
    add_layers,
    check_layer,
    unsorted_segment_mean,
    unsorted_segment_sum,
)
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import check_sizes
from egnn_fast.nn.networks import enter, layers_of

__all__ = [
    "E_GCL",
    "EGNN",
    "unsorted_segment_sum",
    "unsorted_segment_mean",
    "get_edges",
    "get_edges_batch",
]


@suggest_own_name
class E_GCL(OfficialLayer):
    """The official ``E_GCL`` of ``models.egnn_clean`` (eqs. 3 to 6; 8 with attention).

    Parameters
    ----------
    input_nf, output_nf, hidden_nf : int
        Widths of h before and after the layer, and of its MLPs.
    edges_in_d : int
        Width of ``edge_attr``.
    act_fn : torch.nn.Module, optional
        ``nn.SiLU()`` by default.
    residual, attention, tanh : bool
        Add h to the output; gate the messages; apply tanh to the coordinate head's output.
    normalize : bool
        Divide ``x_i - x_j`` by its length + 1e-8, without a gradient through the divisor.
    coords_agg : {"mean", "sum"}
        How coordinate updates are aggregated.
    nodes_att_dim : int
        Width of ``node_attr``. Not in the official class, in which ``node_attr`` crashes.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    def __init__(
        self,
        input_nf: int,
        output_nf: int,
        hidden_nf: int,
        edges_in_d: int = 0,
        act_fn: nn.Module | None = None,
        residual: bool = True,
        attention: bool = False,
        normalize: bool = False,
        coords_agg: str = "mean",
        tanh: bool = False,
        *,
        nodes_att_dim: int = 0,
        backend: str | None = None,
    ) -> None:
        check_layer(
            act_fn,
            "residual",
            residual,
            input_nf=input_nf,
            output_nf=output_nf,
            hidden_nf=hidden_nf,
            edges_in_d=edges_in_d,
            nodes_att_dim=nodes_att_dim,
        )
        if coords_agg not in ("mean", "sum"):
            raise ValueError(f"coords_agg: expected 'mean' or 'sum', got {coords_agg!r}")
        super().__init__(
            input_nf,
            output_nf,
            hidden_nf,
            edge_attr_dim=edges_in_d,
            node_attr_dim=nodes_att_dim,
            activation=act_fn,
            residual=bool(residual),
            attention=bool(attention),
            coord_norm="unit" if normalize else None,
            coord_tanh=bool(tanh),
            coord_agg=coords_agg,
            backend=backend,
        )


@suggest_own_name
class EGNN(nn.Module):
    """The official ``EGNN``: embedding, ``n_layers`` layers, output embedding.

    Parameters
    ----------
    in_node_nf, hidden_nf, out_node_nf : int
        Widths of h at the input, between the layers and at the output.
    in_edge_nf : int
        Width of ``edge_attr``.
    device : torch.device or str
        Device to which the parameters are moved after their initialisation.
    n_layers : int
        Number of layers.
    act_fn, residual, attention, normalize, tanh, backend
        See :class:`E_GCL`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    def __init__(
        self,
        in_node_nf: int,
        hidden_nf: int,
        out_node_nf: int,
        in_edge_nf: int = 0,
        device: torch.device | str = "cpu",
        act_fn: nn.Module | None = None,
        n_layers: int = 4,
        residual: bool = True,
        attention: bool = False,
        normalize: bool = False,
        tanh: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, in_node_nf=in_node_nf, hidden_nf=hidden_nf, out_node_nf=out_node_nf)
        check_sizes(1, n_layers=n_layers)
        check_sizes(0, in_edge_nf=in_edge_nf)
        self.hidden_nf = hidden_nf
        self.device = device
        self.n_layers = n_layers
        self.embedding_in = nn.Linear(in_node_nf, hidden_nf)
        self.embedding_out = nn.Linear(hidden_nf, out_node_nf)
        add_layers(
            self,
            n_layers,
            E_GCL,
            hidden_nf,
            hidden_nf,
            hidden_nf,
            edges_in_d=in_edge_nf,
            act_fn=act_fn,
            residual=residual,
            attention=attention,
            normalize=normalize,
            tanh=tanh,
            backend=backend,
        )
        self.to(device)

    def forward(
        self, h: Tensor, x: Tensor, edges: Graph | EdgeIndexLike, edge_attr: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the network; arguments as for :meth:`E_GCL.forward`.

        Returns features ``[N, out_node_nf]`` and coordinates ``[N, D]``.
        """
        h, graph = enter(self.embedding_in, h, x, edges)
        for gcl in layers_of(self, self.n_layers):
            h, x, _ = gcl(h, graph, x, edge_attr=edge_attr)
        return self.embedding_out(h), x


def get_edges(n_nodes: int) -> list[list[int]]:
    """Receivers and senders of the complete graph on ``n_nodes`` nodes, in receiver order."""
    return Graph.complete([n_nodes]).edge_index.tolist()


def get_edges_batch(n_nodes: int, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Edges of ``batch_size`` complete graphs: ``[receivers, senders]``, and ones ``[E, 1]``."""
    edges = Graph.complete([n_nodes] * batch_size).edge_index
    return list(edges), torch.ones(edges.shape[1], 1, device="cpu")

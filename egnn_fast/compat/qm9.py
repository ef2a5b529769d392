"""``qm9.models``: the official layer and network for molecules in padded batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from egnn_fast import arguments
from egnn_fast.argument_names import suggest_own_name
from egnn_fast.compat._official import add_layers
from egnn_fast.compat.gcl import E_GCL
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import check_sizes, mlp
from egnn_fast.nn.networks import enter, layers_of

__all__ = ["E_GCL_mask", "EGNN"]


@suggest_own_name
class E_GCL_mask(E_GCL):
    """The official ``E_GCL_mask``: it masks messages and does not change the coordinates.

    Parameters
    ----------
    nodes_attr_dim : int
        Width of ``node_attr``.
    coords_weight : float
        Without effect, as in the official code.
    input_nf, output_nf, hidden_nf, edges_in_d, act_fn, recurrent, attention, backend
        See :class:`egnn_fast.compat.gcl.E_GCL`.
    """

    def __init__(
        self,
        input_nf: int,
        output_nf: int,
        hidden_nf: int,
        edges_in_d: int = 0,
        nodes_attr_dim: int = 0,
        act_fn: nn.Module | None = None,
        recurrent: bool = True,
        coords_weight: float = 1.0,
        attention: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        check_sizes(0, nodes_attr_dim=nodes_attr_dim)
        act_fn = nn.ReLU() if act_fn is None else act_fn
        super().__init__(
            input_nf,
            output_nf,
            hidden_nf,
            edges_in_d=edges_in_d,
            nodes_att_dim=nodes_attr_dim,
            act_fn=act_fn,
            recurrent=recurrent,
            coords_weight=coords_weight,
            attention=attention,
            backend=backend,
        )
        # As in the official class, the head is deleted after its weights were drawn. Otherwise a
        # seed would give other weights.
        del self.coord_mlp
        self.options = replace(self.options, coord_agg=None)
        # the official state_dict has the activation's parameters, if any, under this name too
        self.act_fn = act_fn

    def forward(  # type: ignore[override]  # the official class has other arguments than its base
        self,
        h: Tensor,
        edge_index: Graph | EdgeIndexLike,
        coord: Tensor,
        node_mask: Tensor | None,
        edge_mask: Tensor | None,
        edge_attr: Tensor | None = None,
        node_attr: Tensor | None = None,
        n_nodes: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the layer as :meth:`E_GCL.forward` does, with messages times ``edge_mask [E, 1]``.

        Returns new features, and ``coord`` and ``edge_attr`` unchanged. ``node_mask`` and
        ``n_nodes`` are ignored, as in the official code.
        """
        new_h, _, _ = self._run(
            h, coord, edge_index, edge_attr=edge_attr, node_attr=node_attr, edge_mask=edge_mask
        )
        return new_h, coord, edge_attr


@suggest_own_name
class EGNN(nn.Module):
    """The official QM9 ``EGNN``: it predicts one number for each molecule.

    Parameters
    ----------
    in_node_nf, in_edge_nf, hidden_nf : int
        Widths of h at the input, of ``edge_attr`` and of h between the layers.
    device : torch.device or str
        Device to which the parameters are moved after their initialisation.
    act_fn : torch.nn.Module, optional
        ``nn.SiLU()`` by default.
    n_layers : int
        Number of layers.
    coords_weight : float
        Without effect, as in the official code.
    attention : bool
        Gate the messages (eq. 8).
    node_attr : bool or int
        Whether each layer's node MLP also takes the input features.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    def __init__(
        self,
        in_node_nf: int,
        in_edge_nf: int,
        hidden_nf: int,
        device: torch.device | str = "cpu",
        act_fn: nn.Module | None = None,
        n_layers: int = 4,
        coords_weight: float = 1.0,
        attention: bool = False,
        node_attr: bool | int = 1,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, in_node_nf=in_node_nf, hidden_nf=hidden_nf, n_layers=n_layers)
        check_sizes(0, in_edge_nf=in_edge_nf)
        self.hidden_nf = hidden_nf
        self.device = device
        self.n_layers = n_layers
        self.node_attr = node_attr
        act_fn = nn.SiLU() if act_fn is None else act_fn
        self.embedding = nn.Linear(in_node_nf, hidden_nf)
        add_layers(
            self,
            n_layers,
            E_GCL_mask,
            hidden_nf,
            hidden_nf,
            hidden_nf,
            edges_in_d=in_edge_nf,
            nodes_attr_dim=in_node_nf if node_attr else 0,
            act_fn=act_fn,
            coords_weight=coords_weight,
            attention=attention,
            backend=backend,
        )
        self.node_dec = mlp(hidden_nf, hidden_nf, hidden_nf, act_fn, {})
        self.graph_dec = mlp(hidden_nf, hidden_nf, 1, act_fn, {})
        self.to(device)

    def forward(
        self,
        h0: Tensor,
        x: Tensor,
        edges: Graph | EdgeIndexLike,
        edge_attr: Tensor | None,
        node_mask: Tensor,
        edge_mask: Tensor | None,
        n_nodes: int,
    ) -> Tensor:
        """Predict one number for each molecule.

        Parameters
        ----------
        h0 : Tensor [B * n_nodes, in_node_nf]
            Node features, molecules padded to ``n_nodes`` atoms.
        x : Tensor [B * n_nodes, D]
            Coordinates.
        edges : Graph, Tensor [2, E] or pair of tensors or lists
            Receivers and senders.
        edge_attr : Tensor [E, in_edge_nf] or None
            Edge attributes.
        node_mask : Tensor [B * n_nodes, 1]
            Factor on each node's features before the sum over a molecule.
        edge_mask : Tensor [E, 1] or None
            Factor on each message.
        n_nodes : int
            Atoms of a molecule, padding included.

        Returns
        -------
        Tensor [B]
            B is the number of molecules.

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
        """
        h, graph = enter(self.embedding, h0, x, edges)
        check_sizes(1, n_nodes=n_nodes)
        if h.shape[0] % n_nodes:
            raise ValueError(f"n_nodes: {n_nodes} does not divide the {h.shape[0]} nodes")
        nodes = arguments.as_mask("node_mask", node_mask, h.shape[0], x)
        node_attr = h0 if self.node_attr else None
        for gcl in layers_of(self, self.n_layers):
            h, _, _ = gcl(
                h, graph, x, node_mask, edge_mask, edge_attr=edge_attr, node_attr=node_attr
            )
        h = self.node_dec(h)
        if nodes is not None:
            h = h * nodes.unsqueeze(1)
        h = h.view(h.shape[0] // n_nodes, n_nodes, self.hidden_nf).sum(dim=1)
        return self.graph_dec(h).squeeze(1)

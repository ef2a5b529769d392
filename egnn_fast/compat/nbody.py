"""``n_body_system.model``: the official networks for particle systems."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from egnn_fast.argument_names import suggest_own_name
from egnn_fast.compat._official import add_layers
from egnn_fast.compat.gcl import E_GCL, E_GCL_vel
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import check_sizes
from egnn_fast.nn.networks import enter, layers_of

__all__ = ["EGNN", "EGNN_vel"]

# negative slope of LeakyReLU, the official default activation of EGNN; EGNN_vel's is SiLU
_EGNN_SLOPE = 0.2


@suggest_own_name
class EGNN(nn.Module):
    """The official n-body ``EGNN``, without velocities. It returns coordinates only.

    Parameters
    ----------
    in_node_nf, in_edge_nf, hidden_nf : int
        Widths of h at the input, of ``edge_attr`` and of h between the layers.
    device : torch.device or str
        Device to which the parameters are moved after their initialisation.
    act_fn : torch.nn.Module, optional
        ``nn.LeakyReLU(0.2)`` by default.
    n_layers : int
        Number of layers.
    coords_weight : float
        Factor on each coordinate update.
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
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, in_node_nf=in_node_nf, hidden_nf=hidden_nf, n_layers=n_layers)
        check_sizes(0, in_edge_nf=in_edge_nf)
        self.hidden_nf = hidden_nf
        self.device = device
        self.n_layers = n_layers
        self.embedding = nn.Linear(in_node_nf, hidden_nf)
        add_layers(
            self,
            n_layers,
            E_GCL,
            hidden_nf,
            hidden_nf,
            hidden_nf,
            edges_in_d=in_edge_nf,
            act_fn=nn.LeakyReLU(_EGNN_SLOPE) if act_fn is None else act_fn,
            coords_weight=coords_weight,
            backend=backend,
        )
        self.to(device)

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        edges: Graph | EdgeIndexLike,
        edge_attr: Tensor | None,
        vel: Tensor | None = None,
    ) -> Tensor:
        """Run the network and return new coordinates ``[N, D]``.

        Arguments are those of :meth:`E_GCL.forward`. ``vel`` is ignored, as in the official code.
        """
        h, graph = enter(self.embedding, h, x, edges)
        for gcl in layers_of(self, self.n_layers):
            h, x, _ = gcl(h, graph, x, edge_attr=edge_attr)
        return x


@suggest_own_name
class EGNN_vel(nn.Module):
    """The official ``EGNN_vel`` of the paper's n-body experiment. It returns coordinates only.

    Parameters
    ----------
    in_node_nf, in_edge_nf, hidden_nf, device, n_layers, coords_weight, backend
        See :class:`EGNN`.
    act_fn : torch.nn.Module, optional
        ``nn.SiLU()`` by default.
    recurrent, norm_diff, tanh : bool
        See :class:`egnn_fast.compat.gcl.E_GCL`. The official training script sets ``recurrent``.

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
        recurrent: bool = False,
        norm_diff: bool = False,
        tanh: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, in_node_nf=in_node_nf, hidden_nf=hidden_nf, n_layers=n_layers)
        check_sizes(0, in_edge_nf=in_edge_nf)
        self.hidden_nf = hidden_nf
        self.device = device
        self.n_layers = n_layers
        self.embedding = nn.Linear(in_node_nf, hidden_nf)
        add_layers(
            self,
            n_layers,
            E_GCL_vel,
            hidden_nf,
            hidden_nf,
            hidden_nf,
            edges_in_d=in_edge_nf,
            act_fn=nn.SiLU() if act_fn is None else act_fn,
            recurrent=recurrent,
            coords_weight=coords_weight,
            norm_diff=norm_diff,
            tanh=tanh,
            backend=backend,
        )
        self.to(device)

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        edges: Graph | EdgeIndexLike,
        vel: Tensor,
        edge_attr: Tensor | None,
    ) -> Tensor:
        """Run the network and return new coordinates ``[N, D]``.

        Arguments are those of :meth:`E_GCL_vel.forward`; ``vel [N, D]`` are the initial velocities.
        """
        h, graph = enter(self.embedding, h, x, edges)
        for gcl in layers_of(self, self.n_layers):
            h, x, _ = gcl(h, graph, x, vel, edge_attr=edge_attr)
        return x

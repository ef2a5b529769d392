"""``models.ae``: the official graph autoencoder on EGNN layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from egnn_fast import arguments
from egnn_fast.argument_names import suggest_own_name
from egnn_fast.compat.gcl import E_GCL
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import check_sizes
from egnn_fast.nn.networks import layers_of

__all__ = ["AE_EGNN"]


@suggest_own_name
class AE_EGNN(nn.Module):
    """The official ``AE_EGNN``: it embeds nodes, and decodes distances to an adjacency matrix.

    The embedding z ``[N, K]`` starts from noise. The decoder is ``sigmoid(w |z_i - z_j|^2 + b)``
    (the paper's eq. 9, up to the signs of w and b). ``w`` and ``b`` are parameters on every device.
    In the official code they are parameters on the CPU only, so its checkpoints from a GPU lack
    them: load those with ``strict=False``.

    Parameters
    ----------
    hidden_nf : int
        Width of h between the layers.
    K : int
        Dimension of the coordinates, D elsewhere.
    device : torch.device or str
        Device to which the parameters are moved after their initialisation.
    act_fn : torch.nn.Module, optional
        ``nn.SiLU()`` by default.
    n_layers : int
        Number of layers.
    reg : float
        After each layer the coordinates are multiplied by ``1 - reg``.
    clamp : bool
        Without effect, as in the official code; see :class:`egnn_fast.compat.gcl.E_GCL`.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    def __init__(
        self,
        hidden_nf: int,
        K: int = 8,
        device: torch.device | str = "cpu",
        act_fn: nn.Module | None = None,
        n_layers: int = 4,
        reg: float = 1e-3,
        clamp: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(1, hidden_nf=hidden_nf, K=K, n_layers=n_layers)
        self.hidden_nf = hidden_nf
        self.K = K
        self.device = device
        self.n_layers = n_layers
        self.reg = reg
        act_fn = nn.SiLU() if act_fn is None else act_fn
        for i in range(n_layers):
            gcl = E_GCL(
                hidden_nf if i else 1,
                hidden_nf,
                hidden_nf,
                edges_in_d=1,
                act_fn=act_fn,
                recurrent=i > 0,
                clamp=clamp,
                backend=backend,
            )
            self.add_module(f"gcl_{i}", gcl)
        self.w = nn.Parameter(torch.full((1,), -0.1))
        self.b = nn.Parameter(torch.ones(1))
        self.to(device)

    def encode(
        self,
        h: Tensor,
        edges: Graph | EdgeIndexLike,
        edge_attr: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> Tensor:
        """Embed the nodes of a graph.

        Parameters
        ----------
        h : Tensor [N, 1]
            Node features.
        edges : Graph, Tensor [2, E] or pair of tensors or lists
            Receivers and senders.
        edge_attr : Tensor [E, 1]
            Edge attributes.
        x0 : Tensor [N, K], optional
            The initial coordinates. By default noise from PyTorch's CPU generator, as in the
            official code.

        Returns
        -------
        Tensor [N, K]
            The embedding.

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
        """
        arguments.check_float("h", h, 2)
        if x0 is None:
            # default dtype and CPU generator, so that a seed gives the official noise
            x0 = torch.randn(h.shape[0], self.K, device="cpu").to(h)
        arguments.check_nodes(h, x0)
        arguments.check_shape("x0", x0, (h.shape[0], self.K))
        graph = arguments.resolve_graph(edges, h)
        x = x0
        for gcl in layers_of(self, self.n_layers):
            h, x, _ = gcl(h, graph, x, edge_attr=edge_attr)
            x = x - self.reg * x
        return x

    def decode(self, x: Tensor) -> Tensor:
        """The adjacency matrix ``[N, N]`` of embedded nodes ``x [N, K]``, diagonal 0 (eq. 9)."""
        return self.decode_from_x(x, C=self.w, b=self.b)

    def decode_from_x(
        self,
        x: Tensor,
        linear_layer: nn.Module | None = None,
        C: Tensor | float = 10,
        b: Tensor | float = -1,
        remove_diagonal: bool = True,
    ) -> Tensor:
        """``sigmoid(C |x_i - x_j|^2 + b)``, or ``sigmoid(linear_layer((x_i - x_j)^2))``.

        Parameters
        ----------
        x : Tensor [N, K]
            Embedded nodes.
        linear_layer : torch.nn.Module, optional
            Maps the K squared components of a difference to one number.
        C, b : Tensor or float
            Scale and offset, used without a linear layer.
        remove_diagonal : bool
            Whether to set the diagonal to 0.

        Returns
        -------
        Tensor [N, N]
        """
        squares = (x.unsqueeze(0) - x.unsqueeze(1)) ** 2
        if linear_layer is None:
            logits = C * squares.sum(dim=2) + b
        else:
            logits = linear_layer(squares).squeeze(2)
        adjacency = torch.sigmoid(logits)
        if not remove_diagonal:
            return adjacency
        return adjacency * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device))

    def forward(
        self,
        nodes: Tensor,
        edges: Graph | EdgeIndexLike,
        edge_attr: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(adjacency [N, N], embedding [N, K])``; arguments as for :meth:`encode`."""
        x = self.encode(nodes, edges, edge_attr, x0)
        return self.decode(x), x

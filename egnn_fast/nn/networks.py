"""Networks of E(n)-equivariant layers between linear embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from egnn_fast import arguments
from egnn_fast.argument_names import hinted
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import LayerArgs, check_sizes
from egnn_fast.nn.layers import EGCL, EGCLVel
from egnn_fast.options import as_bool
from egnn_fast.runtime.eager import refuse_jit_trace, without_default_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


@hinted
class EGNN(nn.Module):
    """Embedding, ``n_layers`` layers :class:`EGCL`, output embedding.

    Parameters are named officially: ``embedding_in``, ``gcl_{i}``, ``embedding_out``.

    Parameters
    ----------
    in_features, hidden_features, out_features : int
        Widths of h at the input, between the layers and at the output.
    n_layers : int
        Number of layers L.
    edge_attr_dim, node_attr_dim, activation, residual, attention, coord_norm, coord_tanh, \
coord_agg, coord_scale, coord_clamp, backend, device, dtype
        Of every layer; see :class:`EGCLBase`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        n_layers: int = 4,
        **layer: Unpack[LayerArgs],
    ) -> None:
        super().__init__()
        check_sizes(
            1,
            in_features=in_features,
            hidden_features=hidden_features,
            out_features=out_features,
            n_layers=n_layers,
        )
        self.n_layers = n_layers
        factory: dict[str, Any] = {"device": layer.get("device"), "dtype": layer.get("dtype")}
        self.embedding_in = nn.Linear(in_features, hidden_features, **factory)
        self.embedding_out = nn.Linear(hidden_features, out_features, **factory)
        for i in range(n_layers):
            self.add_module(
                f"gcl_{i}", EGCL(hidden_features, hidden_features, hidden_features, **layer)
            )

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        graph: Graph | EdgeIndexLike,
        *,
        edge_attr: Tensor | None = None,
        node_attr: Tensor | None = None,
        edge_mask: Tensor | None = None,
        node_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the network; arguments as for :meth:`EGCL.forward`.

        Returns
        -------
        h : Tensor [N, out_features]
            Zero where ``node_mask`` is.
        x : Tensor [N, D]
        """
        h, graph = enter(self.embedding_in, h, x, graph)
        for gcl in layers_of(self, self.n_layers):
            h, x = gcl(
                h,
                x,
                graph,
                edge_attr=edge_attr,
                node_attr=node_attr,
                edge_mask=edge_mask,
                node_mask=node_mask,
            )
        h = self.embedding_out(h)
        mask = arguments.as_mask("node_mask", node_mask, h.shape[0], x)
        return h if mask is None else h * mask.unsqueeze(1).to(h.dtype), x


@hinted
class EGNNVel(nn.Module):
    """Embedding and ``n_layers`` layers :class:`EGCLVel`, for systems with velocities.

    Parameters are named officially: ``embedding``, ``gcl_{i}``; and ``embedding_out`` if wanted.

    Parameters
    ----------
    in_features, hidden_features : int
        Widths of h at the input and between the layers.
    out_features : int, optional
        Width of h at the output; None leaves it as the last layer gives it.
    n_layers : int
        Number of layers L.
    carry_velocity : bool
        Whether each layer passes the step it made on as the velocity. Without it each layer is
        given the initial one, as in the paper's eq. 7.
    edge_attr_dim, node_attr_dim, activation, residual, attention, coord_norm, coord_tanh, \
coord_agg, coord_scale, coord_clamp, backend, device, dtype
        Of every layer; see :class:`EGCLBase`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        n_layers: int = 4,
        carry_velocity: bool = False,
        **layer: Unpack[LayerArgs],
    ) -> None:
        super().__init__()
        check_sizes(1, in_features=in_features, hidden_features=hidden_features, n_layers=n_layers)
        self.n_layers = n_layers
        self.carry_velocity = as_bool("carry_velocity", carry_velocity)
        factory: dict[str, Any] = {"device": layer.get("device"), "dtype": layer.get("dtype")}
        self.embedding = nn.Linear(in_features, hidden_features, **factory)
        for i in range(n_layers):
            gcl = EGCLVel(
                hidden_features,
                hidden_features,
                hidden_features,
                carry_velocity=carry_velocity,
                **layer,
            )
            self.add_module(f"gcl_{i}", gcl)
        self.embedding_out: nn.Linear | None = None
        if out_features is not None:
            check_sizes(1, out_features=out_features)
            self.embedding_out = nn.Linear(hidden_features, out_features, **factory)

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        graph: Graph | EdgeIndexLike,
        v: Tensor,
        *,
        edge_attr: Tensor | None = None,
        node_attr: Tensor | None = None,
        edge_mask: Tensor | None = None,
        node_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the network; ``v [N, D]`` are the initial velocities, the rest as for ``EGCL``.

        Returns
        -------
        h : Tensor [N, out_features or hidden_features]
            Zero where ``node_mask`` is.
        x : Tensor [N, D]
        """
        h, graph = enter(self.embedding, h, x, graph)
        for gcl in layers_of(self, self.n_layers):
            h, x, *step = gcl(
                h,
                x,
                graph,
                v,
                edge_attr=edge_attr,
                node_attr=node_attr,
                edge_mask=edge_mask,
                node_mask=node_mask,
            )
            if step:
                v = step[0]
        if self.embedding_out is None:
            return h, x
        h = self.embedding_out(h)
        mask = arguments.as_mask("node_mask", node_mask, h.shape[0], x)
        return h if mask is None else h * mask.unsqueeze(1).to(h.dtype), x


def enter(
    embedding: nn.Module, h: Tensor, x: Tensor, graph: Graph | EdgeIndexLike
) -> tuple[Tensor, Graph]:
    """Check what enters a network, embed h, and make a raw edge list a Graph for all layers."""
    refuse_jit_trace()
    # what replaced the Linear (quantised, an adapter) need not have a weight
    plain = type(embedding).forward is nn.Linear.forward
    _check_entry(h, x, embedding.weight if plain else getattr(embedding, "in_features", None))
    return embedding(h), _resolve_graph(graph, h)


_resolve_graph = without_default_device(arguments.resolve_graph)


@without_default_device
def _check_entry(h: Tensor, x: Tensor, weight: Any) -> None:
    """``weight`` is the embedding's, or the number of features that it takes, if that is known."""
    arguments.check_nodes(h, x)
    features = weight
    if isinstance(weight, Tensor):
        features = weight.shape[1]
        arguments.check_like("h", h, weight, "the network")
    if isinstance(features, int) and h.shape[1] != features:
        raise ValueError(f"h: expected [N, {features}], got {list(h.shape)}")


def layers_of(network: nn.Module, n_layers: int) -> Iterator[Any]:
    """The layers ``gcl_0``, ``gcl_1``, ... of a network."""
    return (network._modules[f"gcl_{i}"] for i in range(n_layers))

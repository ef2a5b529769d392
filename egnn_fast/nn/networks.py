"""Networks: a linear embedding, E(n)-equivariant layers, and a linear output embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from egnn_fast import arguments
from egnn_fast.argument_names import suggest_own_name
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn._parts import check_sizes
from egnn_fast.nn.layers import EGCL, EGCLVel, LayerArgs
from egnn_fast.options import as_bool
from egnn_fast.runtime.eager import refuse_jit_trace, without_default_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


@suggest_own_name
class EGNN(nn.Module):
    """Embedding, ``n_layers`` layers :class:`EGCL`, output embedding (Satorras et al. 2021).

    The submodules have the official names: ``embedding_in``, ``gcl_{i}``, ``embedding_out``.

    Parameters
    ----------
    in_features, hidden_features, out_features : int
        Widths of h at the input, between the layers and at the output.
    n_layers : int
        Number of layers L.
    **layer : optional
        The keyword arguments of every layer; see :class:`EGCLBase`.

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
            New features, multiplied by ``node_mask``.
        x : Tensor [N, D]
            New coordinates.

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
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


@suggest_own_name
class EGNNVel(nn.Module):
    """Embedding and ``n_layers`` layers :class:`EGCLVel`, for systems with velocities.

    The submodules have the official names ``embedding`` and ``gcl_{i}``. With ``out_features``
    there is an ``embedding_out`` too.

    Parameters
    ----------
    in_features, hidden_features : int
        Widths of h at the input and between the layers.
    out_features : int, optional
        Width of h at the output. With None there is no output embedding.
    n_layers : int
        Number of layers L.
    carry_velocity : bool
        If True, the step that x made in a layer is the velocity of the next layer. If False, every
        layer takes the initial velocity, as in the paper's eq. 7.
    **layer : optional
        The keyword arguments of every layer; see :class:`EGCLBase`.

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
        """Run the network.

        ``v [N, D]`` are the initial velocities; other arguments as for :meth:`EGCL.forward`.

        Returns
        -------
        h : Tensor [N, out_features or hidden_features]
            New features, multiplied by ``node_mask``.
        x : Tensor [N, D]
            New coordinates.

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
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
    """Check a network's inputs, embed ``h [N, F]``, and turn a raw edge list into a Graph.

    Done once, so that not every layer has to turn the edge list into a Graph.
    """
    refuse_jit_trace()
    # a quantised Linear or an adapter, put in the Linear's place, may have no weight
    if type(embedding).forward is nn.Linear.forward:
        _check_inputs(h, x, embedding.weight)
    else:
        _check_inputs(h, x, getattr(embedding, "in_features", None))
    return embedding(h), _resolve_graph(graph, h)


_resolve_graph = without_default_device(arguments.resolve_graph)


@without_default_device
def _check_inputs(h: Tensor, x: Tensor, expected: Any) -> None:
    """Raise unless ``h [N, F]`` and ``x [N, D]`` match each other and the embedding.

    ``expected`` is the embedding's weight ``[H, F]``, or F, or None if F is unknown.
    """
    arguments.check_nodes(h, x)
    features = expected
    if isinstance(expected, Tensor):
        features = expected.shape[1]
        arguments.check_like("h", h, expected, "the network")
    if isinstance(features, int) and h.shape[1] != features:
        raise ValueError(f"h: expected [N, {features}], got {list(h.shape)}")


def layers_of(network: nn.Module, n_layers: int) -> Iterator[Any]:
    """The layers ``gcl_0``, ``gcl_1``, ... of a network."""
    return (network._modules[f"gcl_{i}"] for i in range(n_layers))

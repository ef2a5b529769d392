"""``models.gcl``: the layers of the official experiments.

By default they have ReLU. They aggregate coordinate updates by the mean and clamp them at 100.
"""

from __future__ import annotations

from torch import Tensor, nn

from egnn_fast.argument_names import suggest_own_name
from egnn_fast.compat._official import (
    CLAMP,
    OfficialLayer,
    check_layer,
    unsorted_segment_mean,
    unsorted_segment_sum,
)
from egnn_fast.graph import EdgeIndexLike, Graph

__all__ = ["E_GCL", "E_GCL_vel", "unsorted_segment_sum", "unsorted_segment_mean"]


@suggest_own_name
class E_GCL(OfficialLayer):
    """The official ``E_GCL`` of ``models.gcl``.

    Parameters
    ----------
    input_nf, output_nf, hidden_nf : int
        Widths of h before and after the layer, and of its MLPs.
    edges_in_d, nodes_att_dim : int
        Widths of ``edge_attr`` and ``node_attr``.
    act_fn : torch.nn.Module, optional
        ``nn.ReLU()`` by default.
    recurrent, attention, tanh : bool
        Add h to the output; gate the messages; apply tanh to the coordinate head's output.
    coords_weight : float
        Factor on the coordinate update.
    clamp : bool
        Without effect, as in the official code: coordinate updates are always clamped at 100.
    norm_diff : bool
        Divide ``x_i - x_j`` by its length + 1.
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
        nodes_att_dim: int = 0,
        act_fn: nn.Module | None = None,
        recurrent: bool = True,
        coords_weight: float = 1.0,
        attention: bool = False,
        clamp: bool = False,
        norm_diff: bool = False,
        tanh: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        check_layer(
            act_fn,
            "recurrent",
            recurrent,
            input_nf=input_nf,
            output_nf=output_nf,
            hidden_nf=hidden_nf,
            edges_in_d=edges_in_d,
            nodes_att_dim=nodes_att_dim,
        )
        super().__init__(
            input_nf,
            output_nf,
            hidden_nf,
            edge_attr_dim=edges_in_d,
            node_attr_dim=nodes_att_dim,
            activation=nn.ReLU() if act_fn is None else act_fn,
            residual=bool(recurrent),
            attention=bool(attention),
            coord_norm=1.0 if norm_diff else None,
            coord_tanh=bool(tanh),
            coord_scale=coords_weight,
            coord_clamp=CLAMP,
            backend=backend,
        )


@suggest_own_name
class E_GCL_vel(E_GCL):
    """The official ``E_GCL_vel``: the coordinates also move by ``phi_v(h) vel``.

    Parameters are those of :class:`E_GCL`, except ``clamp``.
    """

    def __init__(
        self,
        input_nf: int,
        output_nf: int,
        hidden_nf: int,
        edges_in_d: int = 0,
        nodes_att_dim: int = 0,
        act_fn: nn.Module | None = None,
        recurrent: bool = True,
        coords_weight: float = 1.0,
        attention: bool = False,
        norm_diff: bool = False,
        tanh: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            input_nf,
            output_nf,
            hidden_nf,
            edges_in_d=edges_in_d,
            nodes_att_dim=nodes_att_dim,
            act_fn=act_fn,
            recurrent=recurrent,
            coords_weight=coords_weight,
            attention=attention,
            norm_diff=norm_diff,
            tanh=tanh,
            backend=backend,
        )
        self._add_velocity_mlp()

    def forward(  # type: ignore[override]  # as in the official code, vel comes before edge_attr
        self,
        h: Tensor,
        edge_index: Graph | EdgeIndexLike,
        coord: Tensor,
        vel: Tensor,
        edge_attr: Tensor | None = None,
        node_attr: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the layer as :meth:`E_GCL.forward` does, with velocities ``vel [N, D]``."""
        new_h, new_x, _ = self._run(
            h, coord, edge_index, vel, edge_attr=edge_attr, node_attr=node_attr
        )
        return new_h, new_x, edge_attr

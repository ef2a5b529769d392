"""One E(n)-equivariant graph convolution as a module, without and with velocities."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from egnn_fast import functional
from egnn_fast.argument_names import hinted
from egnn_fast.backends import Explanation, check_name
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn import _modules
from egnn_fast.nn._parts import (
    LayerArgs,
    check_activation,
    check_sizes,
    coord_mlp,
    fused_activation,
    mlp,
)
from egnn_fast.options import Options, as_bool
from egnn_fast.weights import LayerWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


@hinted
class EGCLBase(nn.Module):
    """The parameters and options of a layer; what every layer class is built on.

    The parameters bear the official names: ``edge_mlp.{0,2}``, ``node_mlp.{0,2}``,
    ``coord_mlp.{0,2}``, ``att_mlp.0`` and ``coord_mlp_vel.{0,2}``. They are drawn in the official
    order, so one seed gives the official initial weights bit for bit. A call reads the weights from
    the submodules and runs the whole layer. If these are not as they were built (replaced, wrapped,
    added, removed, with hooks or another ``forward``), it calls them as they are, in plain PyTorch,
    on every backend, with one warning. Then the submodules decide the activation, tanh and biases,
    and the options the rest. PyTorch's own reparametrisations
    (``parametrize``, ``weight_norm``, ``spectral_norm``, ``prune``) stay fused.

    Parameters
    ----------
    in_features, out_features, hidden_features : int
        Widths F of h before and O after the layer, and H of the MLPs.
    edge_attr_dim, node_attr_dim : int
        Widths A and B of ``edge_attr`` and ``node_attr``; 0 means that there are none.
    activation : torch.nn.Module, optional
        Non-linearity of every MLP, ``nn.SiLU()`` by default. SiLU, ReLU and LeakyReLU run fused;
        with any other module the layer runs in plain PyTorch, with one warning.
    residual : bool
        Add h to the node MLP's output; needs F = O.
    attention, coord_norm, coord_tanh, coord_agg, coord_scale, coord_clamp
        See :class:`egnn_fast.Options`.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """

    options: Options

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int,
        *,
        edge_attr_dim: int = 0,
        node_attr_dim: int = 0,
        activation: nn.Module | None = None,
        residual: bool = True,
        attention: bool = False,
        coord_norm: str | float | None = None,
        coord_tanh: bool = False,
        coord_agg: str | None = "mean",
        coord_scale: float = 1.0,
        coord_clamp: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            1,
            in_features=in_features,
            out_features=out_features,
            hidden_features=hidden_features,
        )
        check_sizes(0, edge_attr_dim=edge_attr_dim, node_attr_dim=node_attr_dim)
        check_activation("activation", activation)
        residual = as_bool("residual", residual)
        if residual and in_features != out_features:
            raise ValueError(
                f"residual: needs in_features = out_features, got {in_features} and {out_features}"
            )
        act = nn.SiLU() if activation is None else activation
        fused = fused_activation(act)
        self.options = Options(
            **(fused or {}),
            attention=attention,
            coord_norm=coord_norm,
            coord_tanh=coord_tanh,
            coord_agg=coord_agg,
            coord_scale=coord_scale,
            coord_clamp=coord_clamp,
        )
        self.backend = None if backend is None else check_name(backend, "backend")
        self.in_features = in_features
        self.out_features = out_features
        self.hidden_features = hidden_features
        self.edge_attr_dim = edge_attr_dim
        self.node_attr_dim = node_attr_dim
        self.residual = residual

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = 2 * in_features + 1 + edge_attr_dim
        self.edge_mlp = mlp(width, hidden_features, hidden_features, act, factory).append(act)
        width = in_features + hidden_features + node_attr_dim
        self.node_mlp = mlp(width, hidden_features, out_features, act, factory)
        if self.options.updates_coords:
            self.coord_mlp = coord_mlp(hidden_features, act, self.options.coord_tanh, factory)
        if self.options.attention:
            self.att_mlp = nn.Sequential(nn.Linear(hidden_features, 1, **factory), nn.Sigmoid())

    def _add_velocity_mlp(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        act: Any = self.edge_mlp[1]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.coord_mlp_vel = mlp(self.in_features, self.hidden_features, 1, act, factory)

    def weights(self) -> LayerWeights:
        """The parameters as :func:`egnn_fast.functional.egcl` takes them, not copied.

        Raises
        ------
        ValueError
            A submodule other than an activation is not as it was built.
        """
        found = _modules.read(self)
        if found is not None:
            return found
        for change, is_activation in _modules.changes(self):
            if not is_activation:
                raise ValueError(f"weights: do not say what the layer computes: {change}")
        return _modules.reparametrised(self)

    def explain(self, h: Tensor, x: Tensor) -> Explanation:
        """Which backend and instruction set would run the layer on these tensors, and why.

        The reason names a submodule that is not as it was built.
        """
        return functional.explain(
            h,
            x,
            hidden=self.hidden_features,
            options=self.options,
            changed=_modules.first_change(self),
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Widths, and what differs from the defaults."""
        shown = [f"{self.in_features}, {self.out_features}, {self.hidden_features}"]
        shown += [
            f"{name}={getattr(self, name)}"
            for name in ("edge_attr_dim", "node_attr_dim")
            if getattr(self, name)
        ]
        if not self.residual:
            shown.append("residual=False")
        default = Options()
        for name in ("attention", "coord_norm", "coord_tanh", "coord_agg", "coord_scale"):
            if getattr(self.options, name) != getattr(default, name):
                shown.append(f"{name}={getattr(self.options, name)!r}")
        if self.options.coord_clamp is not None:
            shown.append(f"coord_clamp={self.options.coord_clamp}")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)

    def _run(
        self,
        h: Tensor,
        x: Tensor,
        graph: Graph | EdgeIndexLike,
        v: Tensor | None = None,
        *,
        edge_attr: Tensor | None = None,
        node_attr: Tensor | None = None,
        edge_mask: Tensor | None = None,
        node_mask: Tensor | None = None,
        carry_velocity: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        given: dict[str, Any] = {
            "edge_attr": edge_attr,
            "node_attr": node_attr,
            "edge_mask": edge_mask,
            "node_mask": node_mask,
            "v": v,
            "residual": self.residual,
            "carry_velocity": carry_velocity,
            "backend": self.backend,
        }
        weights = _modules.read(self)
        if weights is None:
            change = _modules.first_change(self)
            if change is not None:
                return self._run_modules(h, x, graph, change, **given)
            weights = _modules.reparametrised(self)
        return functional.egcl(h, x, graph, weights, self.options, **given)

    def _run_modules(
        self, h: Tensor, x: Tensor, graph: Graph | EdgeIndexLike, change: str, **given: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The layer in plain PyTorch, through its modules as they are."""
        _modules.check_dtype(self, h)
        widths = (self.in_features, self.hidden_features, self.edge_attr_dim, self.node_attr_dim)
        maps = _modules.maps_of(self)
        return functional.egcl_by_maps(h, x, graph, maps, self.options, widths, change, **given)


class EGCL(EGCLBase):
    """E(n)-equivariant graph convolution (Satorras et al. 2021, eqs. 3 to 6; 8 with attention).

    Parameters, names of the weights and errors: see :class:`EGCLBase`.
    """

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
        """Run the layer.

        Parameters
        ----------
        h : Tensor [N, F]
            Node features.
        x : Tensor [N, D]
            Coordinates.
        graph : Graph, edge_index or list of Graph
            A :class:`egnn_fast.Graph`, a tensor ``[2, E]`` or a pair of receivers and senders.
        edge_attr : Tensor [E, A], optional
            Edge attributes in the order of the edges as given.
        node_attr : Tensor [N, B], optional
            Attributes that enter the node MLP only.
        edge_mask : Tensor [E] or [E, 1], optional
            Factor on each edge's message and coordinate update; bool or floating point.
        node_mask : Tensor [N] or [N, 1], optional
            A node of mask 0 is padding.

        Returns
        -------
        h : Tensor [N, O]
        x : Tensor [N, D]

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
        """
        new_h, new_x, _ = self._run(
            h,
            x,
            graph,
            edge_attr=edge_attr,
            node_attr=node_attr,
            edge_mask=edge_mask,
            node_mask=node_mask,
        )
        return new_h, new_x


@hinted
class EGCLVel(EGCLBase):
    """The layer with velocities: x also moves by phi_v(h) v (eq. 7).

    Parameters
    ----------
    in_features, out_features, hidden_features : int
        See :class:`EGCLBase`, as for the other keyword arguments.
    carry_velocity : bool
        Whether to return the step that x made, ``phi_v(h) v + c agg``, as the velocity for the
        next layer. Without it every layer is to be given the initial velocity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int,
        *,
        carry_velocity: bool = False,
        **layer: Unpack[LayerArgs],
    ) -> None:
        super().__init__(in_features, out_features, hidden_features, **layer)
        self.carry_velocity = as_bool("carry_velocity", carry_velocity)
        self._add_velocity_mlp(layer.get("device"), layer.get("dtype"))

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
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Parameters
        ----------
        v : Tensor [N, D]
            Velocities.
        h, x, graph, edge_attr, node_attr, edge_mask, node_mask
            As for :meth:`EGCL.forward`.

        Returns
        -------
        (h, x), or (h, x, v) with ``carry_velocity``
            ``[N, O]``, ``[N, D]`` and ``[N, D]``.
        """
        new_h, new_x, step = self._run(
            h,
            x,
            graph,
            v,
            edge_attr=edge_attr,
            node_attr=node_attr,
            edge_mask=edge_mask,
            node_mask=node_mask,
            carry_velocity=self.carry_velocity,
        )
        if not self.carry_velocity:
            return new_h, new_x
        assert step is not None
        return new_h, new_x, step

    def extra_repr(self) -> str:
        """As for every layer, and ``carry_velocity``."""
        return super().extra_repr() + (", carry_velocity=True" if self.carry_velocity else "")


def explain(module: nn.Module, h: Tensor, x: Tensor) -> Explanation:
    """Which backend and instruction set would run a module's layers on such tensors, and why.

    Parameters
    ----------
    module : torch.nn.Module
        A layer of this package, or any module that contains one: of several, the first with a
        submodule that is not as it was built, else the first.
    h : Tensor [N, any]
        Node features.
    x : Tensor [N, D]
        Coordinates.

    Raises
    ------
    TypeError
        The module contains no layer of this package.
    BackendError
        A backend was named that cannot run the call.
    """
    layers = [(k, part) for k, part in module.named_modules() if isinstance(part, EGCLBase)]
    for name, layer in layers:
        if _modules.first_change(layer) is not None:
            told = layer.explain(h, x)
            return replace(told, reason=f"{name}.{told.reason}" if name else told.reason)
    if layers:
        return layers[0][1].explain(h, x)
    raise TypeError(f"module: {type(module).__name__} contains no layer of egnn_fast")

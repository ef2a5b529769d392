"""The E(n)-equivariant graph convolution as a module, without and with velocities."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from egnn_fast import functional
from egnn_fast.argument_names import suggest_own_name
from egnn_fast.backends import Explanation, check_name
from egnn_fast.graph import EdgeIndexLike, Graph
from egnn_fast.nn import _modules
from egnn_fast.nn._parts import (
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


class LayerArgs(TypedDict, total=False):
    """The keyword arguments of all layers and networks, those of ``EGCLBase.__init__``."""

    edge_attr_dim: int
    node_attr_dim: int
    activation: nn.Module | None
    residual: bool
    attention: bool
    coord_norm: str | float | None
    coord_tanh: bool
    coord_agg: str | None
    coord_scale: float
    coord_clamp: float | None
    backend: str | None
    device: torch.device | str | None
    dtype: torch.dtype | None


@suggest_own_name
class EGCLBase(nn.Module):
    """Base of all layers: their parameters and options.

    The parameters have the official names: ``edge_mlp.{0,2}``, ``node_mlp.{0,2}``,
    ``coord_mlp.{0,2}``, ``att_mlp.0`` and ``coord_mlp_vel.{0,2}``. They are drawn in the official
    order, so one seed gives the official initial weights bit for bit.

    A call reads the weights from the submodules and runs the whole layer fused. If a submodule was
    modified (replaced, wrapped, added, removed, given a hook or another ``forward``), the call runs
    the submodules themselves, in plain PyTorch, on every backend, with one warning. Then
    activation, tanh and biases are those of the submodules; ``options`` sets the rest. With
    PyTorch's own reparametrisations (``parametrize``, ``weight_norm``, ``spectral_norm``,
    ``prune``) the layer stays fused.

    Parameters
    ----------
    in_features, out_features, hidden_features : int
        Widths: F of h before the layer, O of h after it, H of the MLPs.
    edge_attr_dim, node_attr_dim : int
        Widths A of ``edge_attr`` and B of ``node_attr``; 0 for none.
    activation : torch.nn.Module, optional
        Activation of every MLP, ``nn.SiLU()`` by default. SiLU, ReLU and LeakyReLU run fused. With
        any other module the layer runs in plain PyTorch, with one warning.
    residual : bool
        Add h to the node MLP's output; needs F = O.
    attention, coord_norm, coord_tanh, coord_agg, coord_scale, coord_clamp
        See :class:`egnn_fast.Options`.
    backend : str, optional
        See :func:`egnn_fast.use_backend`.
    device, dtype
        Device and dtype of the parameters.

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
        """The parameters, not copied, as an argument for :func:`egnn_fast.functional.egcl`.

        Raises
        ------
        ValueError
            A submodule was modified that is not an activation.
        """
        weights = _modules.read(self)
        if weights is not None:
            return weights
        for change, is_activation in _modules.changes(self):
            if not is_activation:
                raise ValueError(f"weights: do not say what the layer computes: {change}")
        return _modules.reparametrised(self)

    def explain(self, h: Tensor, x: Tensor) -> Explanation:
        """Which backend and instruction set would run the layer on ``h [N, F]`` and ``x [N, D]``.

        The reason names a modified submodule, if there is one.

        Raises
        ------
        BackendError
            The layer's backend was named and cannot run the call.
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
        """Widths, and the options that differ from their defaults."""
        shown = [f"{self.in_features}, {self.out_features}, {self.hidden_features}"]
        shown += [
            f"{name}={getattr(self, name)}"
            for name in ("edge_attr_dim", "node_attr_dim")
            if getattr(self, name)
        ]
        if not self.residual:
            shown.append("residual=False")
        default = Options()
        # the modules show the activation
        names = [f.name for f in fields(default) if f.name not in ("activation", "negative_slope")]
        for name in names:
            if getattr(self.options, name) != getattr(default, name):
                shown.append(f"{name}={getattr(self.options, name)!r}")
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
        """``(h, x, v)`` of the layer; see :func:`egnn_fast.functional.egcl`."""
        keywords: dict[str, Any] = {
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
                return self._run_modules(h, x, graph, change, **keywords)
            weights = _modules.reparametrised(self)
        return functional.egcl(h, x, graph, weights, self.options, **keywords)

    def _run_modules(
        self, h: Tensor, x: Tensor, graph: Graph | EdgeIndexLike, change: str, **keywords: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the layer in plain PyTorch by calling its submodules; ``change`` is the reason."""
        _modules.check_dtype(self, h)
        widths = (self.in_features, self.hidden_features, self.edge_attr_dim, self.node_attr_dim)
        maps = _modules.maps_of(self)
        return functional.egcl_by_maps(h, x, graph, maps, self.options, widths, change, **keywords)


class EGCL(EGCLBase):
    """E(n)-equivariant graph convolution (Satorras et al. 2021, eqs. 3 to 6; 8 with attention).

    For parameters, names of the weights, and errors see :class:`EGCLBase`.
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
            A :class:`egnn_fast.Graph`, or receivers and senders as a tensor ``[2, E]`` or a pair.
        edge_attr : Tensor [E, A], optional
            Edge attributes in the user's edge order.
        node_attr : Tensor [N, B], optional
            Attributes that enter the node MLP only.
        edge_mask : Tensor [E] or [E, 1], optional
            Factor on each edge's message and coordinate update; bool or floating point.
        node_mask : Tensor [N] or [N, 1], optional
            Factor on every edge at a node and on its new features: a node of mask 0 is padding.

        Returns
        -------
        h : Tensor [N, O]
            New features.
        x : Tensor [N, D]
            New coordinates.

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


@suggest_own_name
class EGCLVel(EGCLBase):
    """The layer with velocities: x also moves by phi_v(h) v (eq. 7).

    Parameters
    ----------
    carry_velocity : bool
        Whether to return the step that x made, ``phi_v(h) v + c agg``, as the velocity for the
        next layer. If False, pass the initial velocity to every layer.
    in_features, out_features, hidden_features, **layer
        See :class:`EGCLBase`.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
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

        Raises
        ------
        TypeError, ValueError, IndexError, BackendError
            As :func:`egnn_fast.functional.egcl`.
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
        """As :meth:`EGCLBase.extra_repr`, and ``carry_velocity``."""
        return super().extra_repr() + (", carry_velocity=True" if self.carry_velocity else "")

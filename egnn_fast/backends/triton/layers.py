"""A whole layer by the Triton kernels: its nodes before and after the edge pass, and back.

Forward the nodes' MLPs are kernels of their own; backward their products are the BLAS's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from egnn_fast.backends.triton.call import Call
from egnn_fast.backends.triton.edges import launches, run_backward, run_forward
from egnn_fast.backends.triton.products import multiply
from egnn_fast.kernels.blocks import few_nodes
from egnn_fast.kernels.nodes import (
    LayerSizes,
    NodeOutputs,
    Nodes,
    NodeWeights,
    launch_project_nodes,
    launch_update_nodes,
)
from egnn_fast.operators.signature import EDGE_OPTIONS, GRAPH, LAYER, MESSAGES
from egnn_fast.weights import LayerWeights


class _Layer:
    """A call of the operator: its inputs by name, its widths, the edge pass in it."""

    def __init__(self, args: Sequence[Any]) -> None:
        call = LAYER.Arguments(*args)
        dense = (t if t is None else t.contiguous() for t in args[: LAYER.n_inputs])
        self.inputs: dict[str, Any] = dict(zip(LAYER.names, dense, strict=True))
        self.weights = LayerWeights(*(self.inputs[name] for name in LayerWeights._fields))
        self.graph = {name: getattr(call, name) for name in GRAPH}
        self.options = {each.name: getattr(call, each.name) for each in EDGE_OPTIONS}
        self.scale, self.residual, self.carry = call.coord_scale, call.residual, call.carry_velocity
        self.precision = call.precision
        self.h, self.x, self.v = (self.inputs[name] for name in ("h", "x", "v"))
        (self.nodes, self.features), self.dim = self.h.shape, self.x.shape[1]
        self.hidden, self.out = self.weights.edge_w1.shape[0], self.weights.node_w2.shape[0]
        self.has_head = self.weights.coord_w2 is not None
        self.moves = self.has_head or self.v is not None
        self.w_i, self.w_j, self.w_r, self.w_a = self.split(self.weights.edge_w1)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The first linear's columns: receiver, sender, squared distance, edge attributes."""
        f = self.features
        w_a = matrix[:, 2 * f + 1 :] if matrix.shape[1] > 2 * f + 1 else None
        return matrix[:, :f], matrix[:, f : 2 * f], matrix[:, 2 * f], w_a

    def edge_call(self, direction: str, wanted: Hashable = ()) -> Call:
        """The edge pass, whose P and Q are projected; ``wanted`` as in Call."""
        weights = self.weights.edge_weights(self.w_r, self.w_a)
        call = MESSAGES.Arguments(
            pq=None, x=self.x, edge_attr=self.inputs["edge_attr"],
            edge_mask=self.inputs["edge_mask"], **weights._asdict(), **self.graph, **self.options,
            backend="triton", precision=self.precision,
        )  # fmt: skip
        return Call(direction, call, wanted)

    def project(self, call: Call, m: Tensor | None, shift: Tensor | None) -> None:
        """P and Q for an edge pass, and 0 in its sums, if not None."""
        edge_w1, edge_b1 = self.weights.edge_w1, self.weights.edge_b1
        launch_project_nodes(
            call.plan, self.sizes(call), self.h, edge_w1, edge_b1, call.inputs.pq, m, shift
        )
        launches["nodes"] += 1

    def sizes(self, call: Call) -> LayerSizes:
        """Sizes of the layer's nodes."""
        few = few_nodes(self.nodes, call.multiprocessors)
        attr = self.inputs["node_attr"]
        attrs = 0 if attr is None else attr.shape[1]
        widths = (self.features, self.hidden, self.out, attrs)
        return LayerSizes(self.nodes, *widths, bool(self.residual), few)


def forward(args: Sequence[Any]) -> tuple[Tensor, ...]:
    """``egnn_fast::layer``: new h, x and v, M and X; no activations are saved."""
    layer = _Layer(args)
    h, x, nodes, dim = layer.h, layer.x, layer.nodes, layer.dim
    call = layer.edge_call("forward")
    m = h.new_empty((nodes, call.hidden))
    shift = x.new_empty((nodes, dim)) if layer.has_head else None
    new_h = h.new_empty((nodes, layer.out))
    new_x = x.new_empty((nodes, dim)) if layer.moves else None
    new_v = x.new_empty((nodes, dim)) if layer.carry else None
    if nodes:
        layer.project(call, m, shift)
        if call.num_edges:
            run_forward(call, m, shift)
        inputs = layer.inputs
        launch_update_nodes(
            call.plan, layer.sizes(call),
            Nodes(h, x, layer.v, inputs["node_attr"], inputs["coord_weight"]), m, shift,
            NodeWeights(*(inputs[name] for name in NodeWeights._fields)),
            NodeOutputs(new_h, new_x, new_v), call.numbers, layer.scale,
        )  # fmt: skip
        launches["nodes"] += 1
    new_x, new_v, shift = (x.new_empty((0, dim)) if t is None else t for t in (new_x, new_v, shift))
    return new_h, new_x, new_v, call.width.narrow(m, 1), shift, h.new_empty((0,))


class Backward:
    """The gradients of a layer.

    Parameters
    ----------
    cotangents : of new h, x and v; None or empty where nothing depends on them
    m, shift : the sums M and X that the forward saved
    args : the operator's inputs
    needed : which of its differentiable inputs need gradients
    """

    def __init__(
        self, cotangents: Sequence[Tensor | None], m: Tensor, shift: Tensor,
        args: Sequence[Any], needed: Sequence[bool],
    ) -> None:  # fmt: skip
        self.layer = _Layer(args)
        self.inputs = self.layer.inputs
        self.needed = dict(zip(LAYER.names, needed, strict=True))
        self.cotangents = [
            None if g is None or not g.numel() else g.contiguous() for g in cotangents
        ]
        self.g_h, self.g_x, self.g_v = self.cotangents
        self.m, self.shift = m, shift
        options = self.layer.options
        self._activation = options["activation"], options["negative_slope"]
        self.gradients: dict[str, Tensor] = {}

    def run(self) -> list[Tensor]:
        """The gradients needed, in order."""
        if self.layer.nodes:
            g_m = None if self.g_h is None else self._features(self.g_h)
            g_shift = self._moves()
            if g_m is not None or g_shift is not None:
                self._edges(g_m, g_shift)
        return [self._gradient(name, t) for name, t in self.inputs.items() if self.needed[name]]

    def _gradient(self, name: str, t: Tensor) -> Tensor:
        """An input's gradient in memory of its own, as an operator's outputs must be."""
        if name not in self.gradients:
            return torch.zeros_like(t)
        grad = self.gradients[name].to(t.dtype).reshape(t.shape).contiguous()
        whole = grad.untyped_storage().nbytes() == grad.nbytes
        shared = any(g is not None and grad.data_ptr() == g.data_ptr() for g in self.cotangents)
        return grad if whole and not shared else grad.clone()

    def _multiply(self, left: Tensor, right: Tensor) -> Tensor:
        return multiply(left, right, self.layer.precision)

    def _add(self, name: str, grad: Tensor) -> None:
        known = self.gradients.get(name)
        self.gradients[name] = grad if known is None else known + grad

    def _wants(self, *names: str) -> bool:
        return any(self.needed[name] for name in names)

    def _features(self, g_h: Tensor) -> Tensor | None:
        """Back through φ_h; returns the gradient of M if it leads anywhere."""
        layer, w = self.layer, self.layer.weights
        f, hidden = layer.features, layer.hidden
        if layer.residual and self.needed["h"]:
            self._add("h", g_h)
        attr = self.inputs["node_attr"]
        into = torch.cat([layer.h, self.m, *([] if attr is None else [attr])], dim=1)
        z = self._multiply(into, w.node_w1.t()) + w.node_b1
        if self.needed["node_w2"]:
            self._add("node_w2", self._multiply(g_h.t(), self._act(z)))
        if self.needed["node_b2"]:
            self._add("node_b2", g_h.sum(0))
        g_z = self._slope(self._multiply(g_h, w.node_w2), z)
        if self.needed["node_w1"]:
            self._add("node_w1", self._multiply(g_z.t(), into))
        if self.needed["node_b1"]:
            self._add("node_b1", g_z.sum(0))
        g_into = self._multiply(g_z, w.node_w1)
        if self.needed["h"]:
            self._add("h", g_into[:, :f])
        if self.needed["node_attr"]:
            self._add("node_attr", g_into[:, f + hidden :])
        return g_into[:, f : f + hidden]

    def _moves(self) -> Tensor | None:
        """Back through the coordinates' update; returns the gradient of X if there is one."""
        layer, w, weight = self.layer, self.layer.weights, self.inputs["coord_weight"]
        steps = [g for g in (self.g_x, self.g_v) if g is not None]
        if not steps:
            return None
        g_step = steps[0] if len(steps) == 1 else steps[0] + steps[1]
        if self.g_x is not None and self.needed["x"]:
            self._add("x", self.g_x)
        if layer.v is not None:
            self._velocity(g_step, layer.v)
        if not layer.has_head:
            return None
        if self.needed["coord_weight"]:
            self._add("coord_weight", (g_step * self.shift).sum(1) * layer.scale)
        g_shift = g_step if weight is None else g_step * weight[:, None]
        assert w.coord_w2 is not None
        return g_shift if layer.scale == 1 else g_shift * layer.scale

    def _velocity(self, g_step: Tensor, v: Tensor) -> None:
        """Back through φ_v."""
        w = self.layer.weights
        assert w.vel_w1 is not None
        assert w.vel_b1 is not None
        assert w.vel_w2 is not None
        assert w.vel_b2 is not None
        z = self._multiply(self.layer.h, w.vel_w1.t()) + w.vel_b1
        a, g_gate = self._act(z), (g_step * v).sum(1, keepdim=True)
        if self.needed["v"]:
            self._add("v", g_step * (self._multiply(a, w.vel_w2.t()) + w.vel_b2))
        if self.needed["vel_w2"]:
            self._add("vel_w2", self._multiply(g_gate.t(), a))
        if self.needed["vel_b2"]:
            self._add("vel_b2", g_gate.sum(0))
        if self._wants("h", "vel_w1", "vel_b1"):
            g_z = self._slope(g_gate * w.vel_w2, z)
            if self.needed["vel_w1"]:
                self._add("vel_w1", self._multiply(g_z.t(), self.layer.h))
            if self.needed["vel_b1"]:
                self._add("vel_b1", g_z.sum(0))
            if self.needed["h"]:
                self._add("h", self._multiply(g_z, w.vel_w1))

    def _edges(self, g_m: Tensor | None, g_shift: Tensor | None) -> None:
        """Back through the edge pass, and through P and Q."""
        layer, need = self.layer, self.needed
        for_pq = self._wants("h", "edge_w1", "edge_b1")
        of_weights = {
            "w_r": need["edge_w1"], "w_a": need["edge_w1"] and layer.w_a is not None,
            "w2": need["edge_w2"], "b2": need["edge_b2"], "w_g": need["att_w"],
            "b_g": need["att_b"], "w3": need["coord_w1"], "b3": need["coord_b1"],
            "w_x": need["coord_w2"],
        }  # fmt: skip
        if g_shift is None:
            of_weights |= dict.fromkeys(("w3", "b3", "w_x"), False)
        wanted = [for_pq, need["x"], need["edge_attr"], need["edge_mask"], *of_weights.values()]
        if not any(wanted):
            return
        call = layer.edge_call("backward", (*wanted, g_m is None, g_shift is None))
        if not call.num_edges:
            return
        layer.project(call, None, None)
        g_pq, g_x, g_attr, g_mask, *rest = run_backward(call, g_m, g_shift, wanted)
        grads = dict(zip(of_weights, rest, strict=True))
        direct = {
            "x": g_x, "edge_attr": g_attr, "edge_mask": g_mask, "edge_w2": grads["w2"],
            "edge_b2": grads["b2"], "att_w": grads["w_g"], "att_b": grads["b_g"],
            "coord_w1": grads["w3"], "coord_b1": grads["b3"], "coord_w2": grads["w_x"],
        }  # fmt: skip
        for name, grad in direct.items():
            if grad is not None and need[name]:
                self._add(name, grad)
        if g_pq is not None:
            self._project_back(g_pq, grads["w_r"], grads["w_a"])

    def _project_back(self, g_pq: Tensor, g_w_r: Tensor | None, g_w_a: Tensor | None) -> None:
        layer, hidden = self.layer, self.layer.hidden
        if self.needed["h"]:
            halves = torch.cat((layer.w_i, layer.w_j))
            self._add("h", self._multiply(g_pq, halves))
        if self.needed["edge_b1"]:
            self._add("edge_b1", g_pq[:, :hidden].sum(0))
        if self.needed["edge_w1"]:
            assert g_w_r is not None
            outer = self._multiply(g_pq.t(), layer.h)
            parts = [outer[:hidden], outer[hidden:], g_w_r.reshape(-1, 1)]
            self._add("edge_w1", torch.cat(parts if g_w_a is None else [*parts, g_w_a], dim=1))

    def _act(self, z: Tensor) -> Tensor:
        name, slope = self._activation
        if name == "silu":
            return torch.nn.functional.silu(z)
        return torch.nn.functional.leaky_relu(z, 0.0 if name == "relu" else slope)

    def _slope(self, grad: Tensor, z: Tensor) -> Tensor:
        """``grad * act'(z)``."""
        name, slope = self._activation
        aten = torch.ops.aten
        if name == "silu":
            result: Tensor = aten.silu_backward(grad, z)
        elif name == "relu":
            result = aten.threshold_backward(grad, z, 0.0)
        else:
            result = aten.leaky_relu_backward(grad, z, slope, False)
        return result

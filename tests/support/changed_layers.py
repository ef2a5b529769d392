"""Layers whose submodules were changed after construction, and the equations through these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nn_inputs import A, Data, F, N, amplify
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from egnn_fast.nn import EGCLVel
from egnn_fast.options import UNIT_NORM_EPS

H, B = 8, 2


class LoRA(nn.Module):
    """A low-rank adapter round a frozen Linear; weight and bias are those of the Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features).to(base.weight))
        self.b = nn.Parameter(torch.randn(base.out_features, 2).to(base.weight))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.base_layer(z) + z @ self.a.T @ self.b.T


def lora(name: str, place: int) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        mlp = getattr(layer, name)
        mlp[place] = LoRA(mlp[place])

    return change


def lora_everywhere(layer: Any) -> None:
    for mlp in list(layer.children()):
        for place, module in list(mlp.named_children()):
            if type(module) is nn.Linear:
                mlp[int(place)] = LoRA(module)


def other_activation(layer: Any) -> None:
    layer.edge_mlp[3] = nn.Tanh()


def other_activation_that_kernels_know(layer: Any) -> None:
    layer.node_mlp[1] = nn.ReLU()


def layer_norm(layer: Any) -> None:
    layer.edge_mlp.insert(1, nn.LayerNorm(H).double())


def appended(layer: Any) -> None:
    layer.node_mlp.append(nn.Tanh())


def no_bias(layer: Any) -> None:
    layer.edge_mlp[2].bias = None


def bias_of_the_head(layer: Any) -> None:
    layer.coord_mlp[2] = nn.Linear(H, 1).double()


def no_last_activation(layer: Any) -> None:
    del layer.edge_mlp[3]


def another_tanh(layer: Any) -> None:
    layer.coord_mlp.append(nn.Softsign())


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        found: Tensor = self.inner(z) + z[:, :1]
        return found


def other_mlp(layer: Any) -> None:
    layer.node_mlp = Residual(layer.node_mlp)


def other_class(layer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return 2 * super().forward(z)

    layer.coord_mlp[0].__class__ = Doubled


def patched_forward(layer: Any) -> None:
    linear = layer.coord_mlp_vel[0]
    linear.forward = lambda z: 3 * nn.Linear.forward(linear, z)


def hook(layer: Any) -> None:
    layer.edge_mlp[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_of_an_mlp(layer: Any) -> None:
    layer.node_mlp.register_forward_hook(lambda module, inputs, output: output + 1)


def pre_hook(layer: Any) -> None:
    layer.coord_mlp_vel[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))


def hook_beside_a_parametrization(layer: Any) -> None:
    parametrizations.weight_norm(layer.edge_mlp[2])
    hook(layer)


# what changes a layer, and the module that the warning names
CHANGES: list[tuple[Callable[[Any], None], str]] = [
    (lora("edge_mlp", 0), "edge_mlp.0 is a LoRA, not the Linear"),
    (lora("node_mlp", 2), "node_mlp.2 is a LoRA"),
    (lora("coord_mlp", 2), "coord_mlp.2 is a LoRA"),
    (lora("coord_mlp_vel", 0), "coord_mlp_vel.0 is a LoRA"),
    (lora_everywhere, "edge_mlp.0 is a LoRA"),
    (other_activation, "edge_mlp.3 is a Tanh: only SiLU, ReLU and LeakyReLU run fused"),
    (other_activation_that_kernels_know, "node_mlp.1 is a ReLU, not the SiLU"),
    (layer_norm, "edge_mlp.1 is a LayerNorm"),
    (appended, "node_mlp.3, a Tanh, was added"),
    (no_bias, "edge_mlp.2 has no bias"),
    (bias_of_the_head, "coord_mlp.2 has a bias"),
    (no_last_activation, "edge_mlp.3, a SiLU, was removed"),
    (another_tanh, "coord_mlp.3, a Softsign, was added"),
    (other_mlp, "node_mlp is a Residual, not the Sequential"),
    (other_class, "coord_mlp.0 is a Doubled"),
    (patched_forward, "coord_mlp_vel.0 has a forward of its own"),
    (hook, "edge_mlp.0 has a forward hook"),
    (hook_of_an_mlp, "node_mlp has a forward hook"),
    (pre_hook, "coord_mlp_vel.2 has a forward pre-hook"),
    (hook_beside_a_parametrization, "edge_mlp.0 has a forward hook"),
]


def build(**options: Any) -> Any:
    """A layer with every part that these options allow."""
    options = {"edge_attr_dim": A, "node_attr_dim": B, "carry_velocity": True, **options}
    layer = EGCLVel(F, F, H, **options).double()
    amplify(layer)
    return layer


def inputs(data: Data) -> dict[str, Tensor]:
    """Every argument of a layer, the floating-point ones to be differentiated."""
    given = {
        "h": data.h, "x": data.x, "v": data.v, "edge_attr": data.edge_attr,
        "node_attr": torch.randn(N, B).double(),
        "edge_mask": torch.rand(data.edges.shape[1]).double(),
        "node_mask": torch.tensor([1.0] * (N - 2) + [0.0, 1.0]).double(),
    }  # fmt: skip
    return {name: t.clone().requires_grad_() for name, t in given.items()}


def by_hand(
    layer: Any, h: Tensor, x: Tensor, edges: Tensor, v: Tensor, edge_attr: Tensor,
    node_attr: Tensor, edge_mask: Tensor, node_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Equations 3 to 8 through the layer's modules, in the official code's order."""
    row, col = edges
    mask = (edge_mask * node_mask[row] * node_mask[col]).unsqueeze(1)
    diff = x[row] - x[col]
    radial = (diff**2).sum(1, keepdim=True)
    options = layer.options
    if options.coord_norm == "unit":
        direction = diff / (radial.sqrt().detach() + UNIT_NORM_EPS)
    elif options.coord_norm is not None:
        # the norm of a self-loop has no derivative
        apart = torch.where(radial > 0, radial, 1.0).sqrt() * (radial > 0)
        direction = diff / (apart + options.coord_norm)
    else:
        direction = diff
    m = layer.edge_mlp(torch.cat((h[row], h[col], radial, edge_attr), 1))
    if options.attention:
        m = m * layer.att_mlp(m)
    m = m * mask
    total = torch.zeros(N, m.shape[1]).double().index_add(0, row, m)
    out = layer.node_mlp(torch.cat((h, total, node_attr), 1))
    step = layer.coord_mlp_vel(h) * v * node_mask.unsqueeze(1)
    if options.coord_agg is not None:
        trans = direction * layer.coord_mlp(m)
        if options.coord_clamp is not None:
            trans = trans.clamp(-options.coord_clamp, options.coord_clamp)
        agg = torch.zeros(N, 3).double().index_add(0, row, trans * mask)
        if options.coord_agg == "mean":
            count = torch.zeros(N, 1).double().index_add(0, row, mask)
            agg = agg / count.clamp(min=1)
        step = step + options.coord_scale * agg
    new_h = (h + out if layer.residual else out) * node_mask.unsqueeze(1)
    return new_h, x + step, step

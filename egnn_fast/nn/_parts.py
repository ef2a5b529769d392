"""What the layers are put together from: MLPs, the activation's name, arguments' checks."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import nn

# the official gain: a layer starts out hardly moving the coordinates
COORD_GAIN = 0.001
# the activations that kernels know, as Options names them
FUSED_ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class LayerArgs(TypedDict, total=False):
    """The keyword arguments that every layer and network shares; see :class:`EGCLBase`."""

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


def check_sizes(minimum: int, **sizes: object) -> None:
    """Raise unless every size is an int of at least ``minimum``; the message names it."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_activation(name: str, activation: object) -> None:
    """Raise unless ``activation`` is a module, or None for the default."""
    if activation is not None and not isinstance(activation, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {activation!r}")


def fused_activation(activation: nn.Module) -> dict[str, Any] | None:
    """The fields of Options that stand for an activation; None if no kernel knows it.

    A subclass may compute anything, so only the exact types count.
    """
    for name, kind in FUSED_ACTIVATIONS.items():
        if type(activation) is kind:
            fields: dict[str, Any] = {"activation": name}
            if isinstance(activation, nn.LeakyReLU):
                fields["negative_slope"] = activation.negative_slope
            return fields
    return None


def mlp(
    features: int, hidden: int, out: int, activation: nn.Module, factory: dict[str, Any]
) -> nn.Sequential:
    """Linear, activation, Linear."""
    first = nn.Linear(features, hidden, **factory)
    return nn.Sequential(first, activation, nn.Linear(hidden, out, **factory))


def coord_mlp(
    hidden: int, activation: nn.Module, tanh: bool, factory: dict[str, Any]
) -> nn.Sequential:
    """The coordinate head. Its last layer draws its weights first, as officially."""
    last = nn.Linear(hidden, 1, bias=False, **factory)
    nn.init.xavier_uniform_(last.weight, gain=COORD_GAIN)
    parts = [nn.Linear(hidden, hidden, **factory), activation, last]
    return nn.Sequential(*parts, nn.Tanh()) if tanh else nn.Sequential(*parts)

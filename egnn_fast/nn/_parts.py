"""What the layers are put together from: MLPs, the activation's name, arguments' checks."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

# the official gain: a layer starts out hardly moving the coordinates
COORD_GAIN = 0.001


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
    kind = type(activation)
    if kind is nn.SiLU:
        return {"activation": "silu"}
    if kind is nn.ReLU:
        return {"activation": "relu"}
    if kind is nn.LeakyReLU:
        slope: Any = activation.negative_slope
        return {"activation": "leaky_relu", "negative_slope": slope}
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


def linear_tensors(sequence: nn.Module, place: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a Linear in a Sequential, reparametrised ones included.

    Straight from the modules' dictionaries: attribute access through ``nn.Module`` and
    ``nn.Sequential`` would cost a small graph's layer as much as its kernel.
    """
    linear: Any = sequence._modules[place]
    if linear._forward_pre_hooks:
        _reparametrise(linear)
    found = linear._parameters
    if "weight" in found and "bias" in found:
        return found["weight"], found["bias"]
    return linear.weight, linear.bias


def _reparametrise(linear: nn.Module) -> None:
    """Run the hooks in which PyTorch's weight_norm, spectral_norm and pruning set the weight."""
    for hook in linear._forward_pre_hooks.values():
        if any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__):
            hook(linear, ())

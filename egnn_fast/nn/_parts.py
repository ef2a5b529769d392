"""Building blocks of the layers: MLPs, fused activations, checks of sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

# the official gain of the coordinate head's last layer: at first a layer hardly moves coordinates
COORD_GAIN = 0.001
# the activations that run fused, by their names in Options
FUSED_ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


def check_sizes(minimum: int, **sizes: object) -> None:
    """Raise unless every size is an int of at least ``minimum``.

    Raises
    ------
    TypeError, ValueError
        A size is no int, or too small; the message names it.
    """
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def check_activation(name: str, activation: object) -> None:
    """Raise TypeError unless ``activation`` is a module or None, which stands for the default."""
    if activation is not None and not isinstance(activation, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {activation!r}")


def fused_activation(activation: nn.Module) -> dict[str, Any] | None:
    """The fields of Options that describe an activation; None if it does not run fused.

    Only the exact types run fused: a subclass may compute anything.
    """
    for name, cls in FUSED_ACTIVATIONS.items():
        if type(activation) is cls:
            fields: dict[str, Any] = {"activation": name}
            if isinstance(activation, nn.LeakyReLU):
                fields["negative_slope"] = activation.negative_slope
            return fields
    return None


def mlp(
    features: int, hidden: int, out: int, activation: nn.Module, factory: dict[str, Any]
) -> nn.Sequential:
    """Linear, activation, Linear: rows ``[K, features]`` to ``[K, out]``.

    ``factory`` has the parameters' device and dtype.
    """
    first = nn.Linear(features, hidden, **factory)
    return nn.Sequential(first, activation, nn.Linear(hidden, out, **factory))


def coord_mlp(
    hidden: int, activation: nn.Module, tanh: bool, factory: dict[str, Any]
) -> nn.Sequential:
    """The coordinate head, ``[E, hidden]`` to ``[E, 1]``.

    The last layer's weights are drawn first, as in the official code, so that a seed gives the same
    weights.
    """
    last = nn.Linear(hidden, 1, bias=False, **factory)
    nn.init.xavier_uniform_(last.weight, gain=COORD_GAIN)
    parts = [nn.Linear(hidden, hidden, **factory), activation, last]
    return nn.Sequential(*parts, nn.Tanh()) if tanh else nn.Sequential(*parts)

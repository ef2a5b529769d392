"""Channels of padding: users have any width, the kernels take whole tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# the dimensions of a weight that are channels; of the others, their only one
_CHANNELS: dict[str, tuple[int, ...]] = {"w_a": (0,), "w2": (0, 1), "w3": (0, 1), "b_g": ()}


@dataclass(frozen=True)
class Width:
    """The channels that the user has, and those that the kernels take."""

    own: int
    wide: int

    def widen(self, t: Tensor, *axes: int) -> Tensor:
        """A tensor with more channels, all zero, in these dimensions."""
        if self.own == self.wide:
            return t
        more = [self.wide - self.own if a in axes else 0 for a in reversed(range(t.dim()))]
        return torch.nn.functional.pad(t, [n for each in more for n in (0, each)])

    def narrow(self, t: Tensor, *axes: int) -> Tensor:
        """A tensor with the user's channels alone in these dimensions; dense."""
        if self.own == self.wide:
            return t
        for axis in axes:
            t = t.narrow(axis, 0, self.own)
        return t.contiguous()

    def narrow_weight(self, name: str, grad: Tensor) -> Tensor:
        """The gradient of a weight, which may come flat."""
        axes = _CHANNELS.get(name, (0,))
        sizes = [self.wide] * len(axes) + ([-1] if name == "w_a" else [])
        return self.narrow(grad.view(sizes), *axes) if sizes else grad

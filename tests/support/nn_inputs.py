"""Inputs that the tests of the modules share."""

from __future__ import annotations

import torch
from torch import nn

BACKENDS = ("reference", "cpu")
N, E, F, D, A = 8, 30, 4, 3, 2


class Data:
    """Inputs in float64 for every kind of module."""

    def __init__(self) -> None:
        self.h = torch.randn(N, F).double()
        self.x = torch.randn(N, D).double()
        self.v = torch.randn(N, D).double()
        self.edges = torch.randint(N, (2, E))
        self.edge_attr = torch.randn(E, A).double()


def amplify(module: nn.Module) -> None:
    """Leave the tiny initial gain of the coordinate heads, which would hide errors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("coord_mlp.2.weight"):
                parameter.mul_(300)

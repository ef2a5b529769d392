"""Which way a call went, and the problems on which the tests of it run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from cases import EVERYTHING
from torch import Tensor

from egnn_fast import Graph, nn
from egnn_fast.checks.cases import Case, Problem
from egnn_fast.operators import direct
from egnn_fast.operators.autograd import Operator

T = TypeVar("T")
CASE = Case(
    "direct", nodes=6, edges=14, hidden=5, attrs=2, mask="soft", options=EVERYTHING,
    velocity=True, node_attrs=1, carry=True, features=3,
)  # fmt: skip
FACES: dict[str, Callable[..., Problem]] = {"layer": CASE.layer, "edge pass": CASE.edge_pass}


@dataclass
class Count:
    """How often calls went through the operators."""

    forward: int = 0
    backward: int = 0


@contextmanager
def through_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    count, call, backward = Count(), Operator.__call__, Operator.backward

    def counted_call(self: Operator, *args: Any) -> Any:
        count.forward += 1
        return call(self, *args)

    def counted_backward(self: Operator, *args: Any) -> Any:
        count.backward += 1
        return backward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Operator, "__call__", counted_call)
        patch.setattr(Operator, "backward", counted_backward)
        yield count


def by_operators(run: Callable[..., T], *args: Any) -> T:
    """The result of a function whose calls, forward and backward, all go through the operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "is_direct", lambda tensors: False)
        return run(*args)


def leaves_of(problem: Any, grad: bool = True) -> dict[str, Tensor]:
    return {k: t.detach().clone().requires_grad_(grad) for k, t in problem.leaves.items()}


def total(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([(t * t).sum() for t in outputs.values()]).sum()


def step(problem: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of all leaves."""
    outputs = problem.run(leaves, "cpu", 0)
    names = list(leaves)
    grads = torch.autograd.grad(total(outputs), [leaves[n] for n in names], allow_unused=True)
    found = {f"grad {n}": g for n, g in zip(names, grads, strict=True) if g is not None}
    return {**{n: t.detach() for n, t in outputs.items()}, **found}


def layer_inputs() -> tuple[nn.EGCLVel, dict[str, Any]]:
    torch.manual_seed(0)
    layer = nn.EGCLVel(4, 4, 8, edge_attr_dim=2)
    return layer, {
        "h": torch.randn(6, 4), "x": torch.randn(6, 3), "graph": Graph.complete([3, 3]),
        "v": torch.randn(6, 3), "edge_attr": torch.randn(12, 2),
    }  # fmt: skip

"""Outputs and first gradients of a problem, to be compared bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast.checks.cases import Problem


def bits(problem: Problem, backend: str = "cpu") -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    out = problem.run(leaves, backend, 0)
    draw = torch.Generator().manual_seed(0)
    towards = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in out.values()]
    grads = torch.autograd.grad(
        list(out.values()), list(leaves.values()), towards, allow_unused=True
    )
    named = {
        f"gradient of {k}": torch.zeros_like(t) if g is None else g
        for (k, t), g in zip(leaves.items(), grads, strict=True)
    }
    return {k: t.detach() for k, t in out.items()} | named


def assert_same_bits(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, t in right.items():
        assert torch.equal(found[name], t), name

"""The budget of what a layer keeps for its backward, and that keeping changes no result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERYTHING, kernel_calls
from torch import Tensor

import egnn_fast
from egnn_fast import budget, checks
from egnn_fast._cases import Case

CASE = Case(
    "budget", nodes=60, edges=700, hidden=24, attrs=2, mask="soft", options=EVERYTHING,
    velocity=True, node_attrs=1, carry=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(budget.ENV_BUDGET, raising=False)
    monkeypatch.setattr(budget, "_budget", None)


def test_default_environment_call_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget.activation_budget() == budget.DEFAULT_BUDGET == 64 * 2**20
    monkeypatch.setattr(budget, "_budget", None)
    monkeypatch.setenv(budget.ENV_BUDGET, "12345")
    assert budget.activation_budget() == 12345
    egnn_fast.set_activation_budget(7)
    assert budget.activation_budget() == 7
    with egnn_fast.set_activation_budget(0):
        assert budget.activation_budget() == 0
        with egnn_fast.set_activation_budget(9):
            assert budget.activation_budget() == 9
        assert budget.activation_budget() == 0
    assert budget.activation_budget() == 7


@pytest.mark.parametrize("text", ["much", "-1", "1.5"])
def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(budget.ENV_BUDGET, text)
    problem = CASE.layer(torch.float32)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    with pytest.raises(ValueError, match=budget.ENV_BUDGET):
        problem.run(leaves, "cpu", 0)


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_wrong_budget_is_refused_and_changes_nothing(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_bytes"):
        egnn_fast.set_activation_budget(value)
    assert budget.activation_budget() == budget.DEFAULT_BUDGET


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_kept_does_not_change_the_results(dtype: torch.dtype) -> None:
    problem = CASE.layer(dtype)
    with egnn_fast.set_activation_budget(0), kernel_calls():
        right = checks.evaluate(problem, "cpu")
    with kernel_calls():
        found = checks.evaluate(problem, "cpu")
    for order, tensors in right.items():
        for name, t in tensors.items():
            assert torch.equal(found[order][name], t), name


def kept_by(run: Callable[[], Any]) -> list[Tensor]:
    """The flat tensors, of more than a bias's size, that autograd saves meanwhile."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return [t for t in saved if t.dim() == 1 and t.is_floating_point() and len(t) > CASE.nodes * 24]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_keeps_what_fits_on_either_way(dtype: torch.dtype) -> None:
    problem = CASE.layer(dtype)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}

    def run() -> Any:
        return problem.run(leaves, "cpu", 0)

    (long,), (short,) = kept_by(run), kept_by(run)
    assert long.shape == short.shape
    assert long.dtype == short.dtype == dtype
    size = long.numel() * long.element_size()
    for limit, count in ((size, 1), (size - 1, 0), (0, 0)):
        with egnn_fast.set_activation_budget(limit):
            assert len(kept_by(run)) == count
            with torch.profiler.profile():  # the long way
                assert len(kept_by(run)) == count
    with torch.no_grad():
        assert not kept_by(run)
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    assert not kept_by(run)


def test_what_is_kept_goes_with_the_graph() -> None:
    problem = CASE.layer(torch.float32)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    alive: list[weakref.ref[Tensor]] = []

    def run() -> Tensor:
        found: list[dict[str, Tensor]] = []
        kept = kept_by(lambda: found.append(problem.run(leaves, "cpu", 0)))
        alive.extend(map(weakref.ref, kept))
        return torch.stack([t.sum() for t in found[0].values()]).sum()

    for _ in range(3):
        run().backward()
    assert len(alive) == 3
    assert all(ref() is None for ref in alive)

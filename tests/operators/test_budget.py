"""The budget of what a layer keeps for its backward, and that keeping changes no result."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import EVERYTHING, kernel_calls
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from ways import by_operators

import egnn_fast
from egnn_fast import checks
from egnn_fast.checks.cases import Case
from egnn_fast.operators import budget
from egnn_fast.runtime import native

CASE = Case(
    "budget", nodes=60, edges=700, hidden=24, attrs=2, mask="soft", options=EVERYTHING,
    velocity=True, node_attrs=1, carry=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(budget.ENV_BUDGET, raising=False)
    monkeypatch.setattr(budget, "_settings", [])
    monkeypatch.setattr(budget, "_from_outside", None)


def test_default_environment_call_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget.activation_budget() == budget.DEFAULT_BUDGET == 64 * 2**20
    monkeypatch.setattr(budget, "_from_outside", None)
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
    """The tensors without elements but with memory behind them that autograd saves meanwhile."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return [t for t in saved if t.shape == (0,) and t.untyped_storage().nbytes() > 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_keeps_what_fits_on_either_way(dtype: torch.dtype) -> None:
    problem = CASE.layer(dtype)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}

    def run() -> Any:
        return problem.run(leaves, "cpu", 0)

    (direct,), (through,) = kept_by(run), by_operators(kept_by, run)
    assert direct.dtype == through.dtype == dtype
    size = direct.untyped_storage().nbytes()
    assert size == through.untyped_storage().nbytes() > CASE.nodes * 24
    for limit, count in ((size, 1), (size - 1, 0), (0, 0)):
        with egnn_fast.set_activation_budget(limit):
            assert len(kept_by(run)) == count
            assert len(by_operators(kept_by, run)) == count
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


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("budgets", [(0, None), (None, 0)])
def test_a_checkpoint_may_be_recomputed_under_another_budget(
    budgets: tuple[int | None, int | None], through: bool
) -> None:
    problem = CASE.layer(torch.float64)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    names = list(leaves)

    def run(*tensors: Tensor) -> Tensor:
        found = problem.run(dict(zip(names, tensors, strict=True)), "cpu", 0)
        return torch.stack([t.square().sum() for t in found.values()]).sum()

    def grads() -> tuple[Tensor, ...]:
        with egnn_fast.set_activation_budget(of(budgets[0])):
            value = checkpoint(run, *leaves.values(), use_reentrant=False)
        with egnn_fast.set_activation_budget(of(budgets[1])), kernel_calls(1, 1):
            return torch.autograd.grad(value, list(leaves.values()))

    right = torch.autograd.grad(run(*leaves.values()), list(leaves.values()))
    found = by_operators(grads) if through else grads()
    assert all(map(torch.equal, found, right))


def of(limit: int | None) -> int:
    return budget.DEFAULT_BUDGET if limit is None else limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_another_instruction_set_kept_is_computed_again(dtype: torch.dtype) -> None:
    core = native.core
    assert core is not None
    problem = replace(CASE, hidden=20).layer(dtype)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}

    def grads(forward: str, backward: str, limit: int) -> tuple[Tensor, ...]:
        core.set_instruction_set(forward)
        with egnn_fast.set_activation_budget(limit):
            value = torch.stack([t.sin().sum() for t in problem.run(leaves, "cpu", 0).values()])
        core.set_instruction_set(backward)
        return torch.autograd.grad(value.sum(), list(leaves.values()))

    for forward, backward in itertools.permutations(core.supported_instruction_sets(), 2):
        found = grads(forward, backward, budget.DEFAULT_BUDGET)
        assert all(map(torch.equal, found, grads(forward, backward, 0)))


def test_blocks_may_overlap_and_be_used_again() -> None:
    first, second = egnn_fast.set_activation_budget(1), egnn_fast.set_activation_budget(2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert budget.activation_budget() == 2
    second.__exit__(None, None, None)
    assert budget.activation_budget() == budget.DEFAULT_BUDGET
    with first:
        assert budget.activation_budget() == 1
    assert budget.activation_budget() == budget.DEFAULT_BUDGET
    with first, first:
        assert budget.activation_budget() == 1
    assert budget.activation_budget() == budget.DEFAULT_BUDGET
    for number in range(5):
        egnn_fast.set_activation_budget(number)
        assert budget.activation_budget() == number
        assert len(budget._settings) <= 2

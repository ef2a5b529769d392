"""Passes whose kernel asks for more shared memory than there is; what Triton 3.6 refuses."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import INTERPRETED_BACKENDS

from egnn_fast import Options
from egnn_fast.checks import relative_error
from egnn_fast.checks.cases import Case, Problem

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.usefixtures("one_thread", "bfloat16"),
    pytest.mark.skipif(not INTERPRETED_BACKENDS, reason="Triton's wheels are for Linux alone"),
]
Tensors = dict[str, torch.Tensor]


def case_of(face: str, hidden: int = 16) -> Problem:
    case = Case("fitting", nodes=8, edges=30, hidden=hidden, features=5)
    return getattr(case, face)(torch.float32)


def gradients(problem: Problem, backend: str) -> Tensors:
    leaves = {k: t.detach().requires_grad_() for k, t in problem.leaves.items()}
    outputs = problem.run(leaves, backend, 0)
    total = torch.stack([t.square().sum() for t in outputs.values()]).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return {k: t.detach() for k, t in outputs.items()} | dict(zip(leaves, found, strict=True))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Passes of one kernel do not fit; counts by direction how often one was tried."""
    from triton.runtime.errors import OutOfResources

    from egnn_fast.backends.triton import backward, call, edges

    tried: Counter[str] = Counter()

    def refuse(direction: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            tried[direction] += 1
            raise OutOfResources(262_144, 232_448, "shared memory")

        return launch

    monkeypatch.setattr(edges, "launch_edge_forward", refuse("forward"))
    monkeypatch.setattr(backward, "launch_edge_backward", refuse("backward"))
    monkeypatch.setattr(call, "_too_large", set())
    return tried


@pytest.mark.parametrize("face", ["edge_pass", "layer"])
def test_what_does_not_fit_runs_in_stages(face: str, refused: Counter[str]) -> None:
    problem = case_of(face)
    right = gradients(problem, "reference")
    for _ in range(2):  # the second call knows
        found = gradients(problem, "triton")
        for name, expected in right.items():
            assert relative_error(found[name], expected) < 1e-5, name
        assert refused == {"forward": 1, "backward": 1}


def test_another_kind_of_call_is_tried(refused: Counter[str]) -> None:
    for hidden in (16, 32):
        gradients(case_of("edge_pass", hidden), "triton")
    assert refused == {"forward": 2, "backward": 2}


def test_other_gradients_are_tried(refused: Counter[str]) -> None:
    """They need less of a kernel."""
    problem = case_of("edge_pass")
    gradients(problem, "triton")
    leaves = {k: t.detach().requires_grad_(k == "x") for k, t in problem.leaves.items()}
    outputs = problem.run(leaves, "triton", 0)
    torch.autograd.grad(sum(t.sum() for t in outputs.values()), leaves["x"])  # type: ignore[arg-type]
    assert refused == {"forward": 1, "backward": 2}


def test_numbers_among_the_options_make_no_difference(refused: Counter[str]) -> None:
    for clamp in (1.0, 2.0, 3.0):
        case = Case("fitting", nodes=8, edges=30, options=Options(coord_clamp=clamp))
        problem = case.edge_pass(torch.float32)
        problem.run(problem.leaves, "triton", 0)
    assert refused == {"forward": 1}


def test_the_first_try_leaves_nothing(
    refused: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages begin without the memory of the kernel that did not fit."""
    from egnn_fast.backends.triton import call, staged

    made: list[Any] = []
    init, forward = call.Call.__init__, staged.forward

    def noted(self: Any, *args: Any) -> None:
        made.append(weakref.ref(self))
        init(self, *args)

    def checked(*args: Any) -> None:
        gc.collect()
        assert [reference() is not None for reference in made] == [False, True]
        forward(*args)

    monkeypatch.setattr(call.Call, "__init__", noted)
    monkeypatch.setattr(staged, "forward", checked)
    problem = case_of("edge_pass")
    with torch.no_grad():
        problem.run(problem.leaves, "triton", 0)
    assert refused == {"forward": 1}


def test_stages_that_do_not_fit_raise(
    refused: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    from egnn_fast.backends.triton import staged

    def launch(*args: Any) -> None:
        raise OutOfResources(262_144, 232_448, "shared memory")

    monkeypatch.setattr(staged, "launch_staged_first", launch)
    with pytest.raises(OutOfResources):
        gradients(case_of("edge_pass"), "triton")


@pytest.mark.parametrize("hidden", [16, 160])
def test_no_carry_holds_none(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of Triton 3.6 that returns a tuple with None does not compile."""
    from egnn_fast.kernels import rows, staged

    carry, made = rows.Carry, []

    def checked(*fields: Any) -> Any:
        assert not any(field is None for field in fields)
        made.append(fields)
        return carry(*fields)

    for module in (rows, staged):
        monkeypatch.setattr(module, "Carry", checked)
    gradients(case_of("edge_pass", hidden), "triton")
    assert made

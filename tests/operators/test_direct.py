"""Direct calls: which calls are direct, and that they give the operator's bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cases import LAYER_CASES, kernel_calls
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from ways import (
    CASE,
    FACES,
    by_operators,
    layer_inputs,
    leaves_of,
    step,
    through_operators,
    total,
)

from egnn_fast import Graph, checks, nn, use_backend
from egnn_fast.checks.cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("grad", [True, False])
def test_an_eager_call_is_direct(face: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = FACES[face](torch.float32)
    leaves = leaves_of(problem, grad)
    run = step if grad else lambda problem, leaves: problem.run(leaves, "cpu", 0)
    right = by_operators(run, problem, leaves)
    with through_operators(monkeypatch) as count:
        for _ in range(3):
            with kernel_calls(1, int(grad)):
                found = run(problem, leaves)
            assert found.keys() == right.keys()
            assert all(torch.equal(t, found[name]) for name, t in right.items())
        assert (count.forward, count.backward) == (0, 0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("face", ["layer", "edge_pass"])
def test_both_ways_give_the_same_bits(face: str, case: Case) -> None:
    problem = getattr(case, face)(torch.float32)
    leaves = leaves_of(problem)
    if "edge_mask" in leaves and case.mask == "binary":
        leaves["edge_mask"].requires_grad_(False)
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}

    def run(problem: Any, leaves: dict[str, Tensor]) -> list[Tensor | None]:
        outputs = problem.run(leaves, "cpu", 0)
        grads = torch.autograd.grad(total(outputs), list(wanted.values()), allow_unused=True)
        return [*outputs.values(), *grads]

    for a, b in zip(run(problem, leaves), by_operators(run, problem, leaves), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (b is not None and torch.equal(a, b))


def test_rows_may_change_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.EGCLVel(4, 4, 8, edge_attr_dim=2)

    def run(sizes: list[int]) -> None:
        graph = Graph.complete(sizes)
        n, e = graph.num_nodes, graph.num_edges
        h, x, v = torch.randn(n, 4), torch.randn(n, 3), torch.randn(n, 3)
        found = layer(h, x, graph, v, edge_attr=(attr := torch.randn(e, 2)))
        with use_backend("reference"):
            right = layer(h, x, graph, v, edge_attr=attr)
        grads = [
            torch.autograd.grad((a.sum() + (b * b).sum()), list(layer.parameters()))
            for a, b in (found, right)
        ]
        for a, b in zip((*found, *grads[0]), (*right, *grads[1]), strict=True):
            assert checks.relative_error(a, b) < 1e-5

    with through_operators(monkeypatch) as count:
        for sizes in ([3], [4, 2], [1], [7], [2, 1]):
            run(sizes)
        assert (count.forward, count.backward) == (0, 0)
        run([])  # a tensor without elements has no address
        assert count.forward == 1


class Plain(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class PlainFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Plain,
    "function mode": PlainFunctions,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("face", FACES)
def test_what_watches_the_program_sees_the_operators(
    face: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = FACES[face](torch.float32)
    leaves = leaves_of(problem)
    right = step(problem, leaves)
    with through_operators(monkeypatch) as count:
        with SURROUNDINGS[name]():
            found = step(problem, leaves)
        assert (count.forward, count.backward) == (1, 1)
        assert all(torch.equal(t, found[n]) for n, t in right.items())
        step(problem, leaves)
        assert count.forward == 1


@pytest.mark.parametrize("face", FACES)
def test_a_profile_of_the_backward_alone_shows_the_operator(face: str) -> None:
    problem = FACES[face](torch.float32)
    leaves = leaves_of(problem)
    step(problem, leaves)
    value = total(problem.run(leaves, "cpu", 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        value.backward()
    names = {event.key for event in profile.key_averages()}
    assert any(n.startswith("egnn_fast::") and n.endswith("_backward") for n in names)


def test_transforms_go_through_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASE.layer(torch.float64)
    leaves = leaves_of(problem)
    right = step(problem, leaves)

    def value(x: Tensor) -> Tensor:
        return total(problem.run({**leaves, "x": x}, "cpu", 0))

    with through_operators(monkeypatch) as count:
        grad = torch.func.grad(value)(leaves["x"].detach())
        assert torch.equal(grad, right["grad x"])
        torch.func.vmap(value)(torch.stack([leaves["x"].detach()] * 2))
        out, pull, *_ = torch.func.vjp(
            lambda x: problem.run({**leaves, "x": x}, "cpu", 0)["x"], leaves["x"].detach()
        )
        (rows,) = torch.func.vmap(pull)(
            torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
        )
        assert rows.shape == (out.numel(), *leaves["x"].shape)
        assert (count.forward, count.backward) == (3, 2)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaves["x"], torch.ones_like(leaves["x"]))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                value(dual)


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    ("change", "through"),
    [
        (lambda t: t.as_subclass(Subclass), True),
        (lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag, True),
        (lambda t: torch.stack([t, t], dim=-1)[..., 0], False),
    ],
    ids=["subclass", "lazily negative", "strided"],
)
@pytest.mark.parametrize("name", ["h", "x", "edge_attr", "node_w1"])
def test_what_the_kernel_cannot_read_in_place_is_right_too(
    name: str, change: Callable[[Tensor], Tensor], through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = CASE.layer(torch.float32)
    leaves = leaves_of(problem, grad=False)
    right = problem.run(leaves, "cpu", 0)
    changed = {**leaves, name: change(leaves[name])}
    assert torch.equal(changed[name].as_subclass(Tensor), leaves[name])
    with through_operators(monkeypatch) as count:
        found = problem.run(changed, "cpu", 0)
        assert count.forward == int(through)
        assert all(torch.equal(t, found[n].as_subclass(Tensor)) for n, t in right.items())


WRONG: dict[str, tuple[type[Exception], Callable[[dict[str, Any]], Any]]] = {
    "h": (TypeError, lambda a: a["h"].long()),
    "x": (ValueError, lambda a: a["x"][:-1]),
    "v": (ValueError, lambda a: a["v"][:, :2]),
    "edge_attr": (ValueError, lambda a: a["edge_attr"][1:]),
    "graph": (ValueError, lambda a: Graph.complete([3, 4])),
}
# what a raw edge list is called
NAMES = {"graph": "graph|edge_index"}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named_after_right_input_too(name: str) -> None:
    layer, args = layer_inputs()
    for _ in range(2):
        layer(**args)
    error, change = WRONG[name]
    for wrong in (change(args), None, 3, [[1.0]]):
        with pytest.raises((error, TypeError, ValueError), match=NAMES.get(name, name)):
            layer(**{**args, name: wrong})
    with pytest.raises(TypeError, match="x: expected dtype"):
        layer(**{**args, "x": args["x"].double()})


@pytest.mark.parametrize(
    ("change", "error"),
    [(lambda t: t[:-1], ValueError), (Tensor.double, TypeError), (Tensor.long, TypeError)],
)
def test_a_parameter_that_changed_under_its_name_is_refused(
    change: Callable[[Tensor], Tensor], error: type[Exception]
) -> None:
    layer, args = layer_inputs()
    for _ in range(2):
        layer(**args)
    weight: Any = layer.edge_mlp[2].bias
    weight.requires_grad_(False)
    layer(**args)
    weight.data = change(weight.data)
    with pytest.raises(error, match="edge_b2"):
        layer(**args)


def test_new_memory_under_a_parameter_is_read() -> None:
    layer, args = layer_inputs()
    for _ in range(2):
        layer(**args)
    for weight in layer.parameters():
        weight.data = torch.randn_like(weight)
    found = layer(**args)
    with use_backend("reference"):
        right = layer(**args)
    for a, b in zip(found, right, strict=True):
        assert checks.relative_error(a, b) < 1e-5


def test_the_backend_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, args = layer_inputs()
    for _ in range(2):
        layer(**args)
    with kernel_calls(0, 0):
        with use_backend("reference"):
            layer(**args)
        monkeypatch.setenv("EGNN_FAST_BACKEND", "reference")
        layer(**args)
        layer.backend = "reference"
        layer(**args)
    monkeypatch.setenv("EGNN_FAST_BACKEND", "nonsense")
    layer.backend = None
    with pytest.raises(ValueError, match="EGNN_FAST_BACKEND"):
        layer(**args)


def test_threads_call_one_layer() -> None:
    layer, args = layer_inputs()
    weights = list(layer.parameters())

    def grads() -> list[Tensor]:
        h, x = layer(**args)
        return list(torch.autograd.grad(h.sum() + (x * x).sum(), weights))

    right = grads()
    results: list[list[Tensor]] = []
    threads = [
        threading.Thread(target=lambda: results.extend(grads() for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, right, strict=True))

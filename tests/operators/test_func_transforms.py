"""torch.func: reverse mode and vmap agree with the reference, forward mode is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EVERYTHING, FUSED_BACKENDS, even_interpreted, kernel_calls, widest
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

from egnn_fast import Graph, checks, nn
from egnn_fast.checks.cases import ORDERS, Case

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)
every_face = pytest.mark.parametrize("face", ["edge_pass", "layer"])
CASE = Case(
    "func", nodes=5, edges=11, hidden=4, dim=2, attrs=1, mask="soft", options=EVERYTHING,
    velocity=True, features=3,
)  # fmt: skip
Leaves = dict[str, Tensor]


def loss_of(
    face: str, backend: str, dtype: torch.dtype | None = None, order: int = 0
) -> tuple[Callable[[Leaves], Tensor], Leaves]:
    """A scalar of all outputs of a problem, and the leaves to call it with."""
    problem = getattr(CASE, face)(dtype or widest(backend))
    problem.run(problem.leaves, "reference", order)  # what the order needs is drawn here

    def loss(leaves: Leaves) -> Tensor:
        out = problem.run(leaves, backend, order)
        return torch.stack([t.sin().sum() for t in out.values()]).sum()

    return loss, problem.leaves


def orders(dtype: torch.dtype) -> range:
    """In which the reference's own error is found; in float64 the bound is a number."""
    return range(0 if dtype == torch.float64 else ORDERS)


Transform = Callable[[Callable[[Leaves], Tensor], Leaves], Any]


def agree(transform: Transform, face: str, backend: str, backward: int | None = None) -> None:
    """A transform of the fused loss gives what it gives of the reference."""
    with kernel_calls(backward=backward, backend=backend):
        found = tree_leaves(transform(*loss_of(face, backend)))
    right = tree_leaves(transform(*loss_of(face, "reference")))
    assert len(right) > 0
    dtype = widest(backend)
    plain = [
        tree_leaves(transform(*loss_of(face, "reference", dtype, order))) for order in orders(dtype)
    ]
    for k, (a, b) in enumerate(zip(found, right, strict=True)):
        assert b.abs().max() > 0
        allowed = checks.bound(dtype, [checks.relative_error(p[k], b) for p in plain])
        assert checks.relative_error(a, b) <= allowed


@every_face
@even_interpreted
def test_grad(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        return grad(loss)(leaves), grad_and_value(loss)(leaves)

    agree(transform, face, backend)


@every_face
@even_interpreted
def test_grad_of_grad(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        def force(values: Leaves) -> Tensor:
            return grad(lambda x: loss(values | {"x": x}))(values["x"]).pow(2).sum()

        return grad(force)(leaves)

    agree(transform, face, backend)


@every_face
@even_interpreted
def test_vjp(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        value, pull = vjp(loss, leaves)[:2]
        return value, pull(torch.full_like(value, 0.3))

    agree(transform, face, backend)


@every_face
@even_interpreted
def test_jacrev(face: str, backend: str) -> None:
    def jacobian(name: str, dtype: torch.dtype, order: int = 0) -> Any:
        problem = getattr(CASE, face)(dtype)
        problem.run(problem.leaves, "reference", order)  # what the order needs is drawn here

        def outputs(x: Tensor) -> Any:
            return problem.run(problem.leaves | {"x": x}, name, order)

        return jacrev(outputs)(problem.leaves["x"])

    dtype = widest(backend)
    found, right = jacobian(backend, dtype), jacobian("reference", torch.float64)
    plain = [jacobian("reference", dtype, order) for order in orders(dtype)]
    for name, t in right.items():
        allowed = checks.bound(dtype, [checks.relative_error(p[name], t) for p in plain])
        assert checks.relative_error(found[name], t) <= allowed


@every_face
@even_interpreted
def test_second_derivatives_by_jacrev_of_grad(face: str, backend: str) -> None:
    """What to use in place of hessian, which runs forward over reverse."""

    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        def of_x(x: Tensor) -> Tensor:
            return loss(leaves | {"x": x})

        return jacrev(grad(of_x))(leaves["x"])

    agree(transform, face, backend)


def stacked(t: Tensor) -> Tensor:
    return torch.stack((t, t * 0.5 + 0.1, -t))


@every_face
@even_interpreted
@pytest.mark.parametrize("batched", ["x", "all"])
def test_vmap(batched: str, face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        names = ["x"] if batched == "x" else list(leaves)
        batch = {name: stacked(leaves[name]) for name in names}

        def one(part: Leaves) -> Tensor:
            return loss(leaves | part)

        return vmap(one)(batch)

    agree(transform, face, backend, backward=0)


@every_face
@even_interpreted
def test_vmap_along_other_dimensions(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        batch = stacked(leaves["x"]).movedim(0, -1)
        return vmap(lambda x: loss(leaves | {"x": x}), in_dims=-1)(batch)

    agree(transform, face, backend, backward=0)


@every_face
@even_interpreted
def test_vmap_of_grad_is_a_gradient_per_sample(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        return vmap(lambda x: grad(loss)(leaves | {"x": x}))(stacked(leaves["x"]))

    agree(transform, face, backend)


@every_face
@even_interpreted
def test_grad_of_vmap(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        def total(values: Leaves) -> Tensor:
            return vmap(lambda x: loss(values | {"x": x}))(stacked(values["x"])).sum()

        return grad(total)(leaves)

    agree(transform, face, backend)


@every_face
@even_interpreted
def test_vmap_of_vmap(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        inner = vmap(lambda x: loss(leaves | {"x": x}))
        return vmap(inner)(torch.stack((stacked(leaves["x"]), stacked(leaves["x"]) * 2)))

    agree(transform, face, backend, backward=0)


@every_face
@even_interpreted
def test_backward_through_vmap(face: str, backend: str) -> None:
    def transform(loss: Callable[[Leaves], Tensor], leaves: Leaves) -> Any:
        weights = {k: t.clone().requires_grad_() for k, t in leaves.items()}
        out = vmap(lambda x: loss(weights | {"x": x}))(stacked(weights["x"]))
        return torch.autograd.grad(out.sum(), list(weights.values()))

    agree(transform, face, backend)


FORWARD_MODE = r"egnn_fast: .* no forward-mode derivative .*jacrev.* backend='reference'"


@every_face
@even_interpreted
@pytest.mark.parametrize("name", ["jvp", "jacfwd", "hessian", "dual"])
def test_forward_mode_is_refused(name: str, face: str, backend: str) -> None:
    loss, leaves = loss_of(face, backend)

    def of_x(x: Tensor) -> Tensor:
        return loss(leaves | {"x": x})

    def dual(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return of_x(forward_ad.make_dual(x, x.cos()))

    modes: dict[str, Callable[[Tensor], Any]] = {
        "jvp": lambda x: jvp(of_x, (x,), (x.cos(),)),
        "jacfwd": jacfwd(of_x),
        "hessian": hessian(of_x),
        "dual": dual,
    }
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        modes[name](leaves["x"])


@every_face
def test_forward_mode_works_on_the_reference(face: str) -> None:
    loss, leaves = loss_of(face, "reference")
    x, direction = leaves["x"], leaves["x"].cos()
    found = jvp(lambda x: loss(leaves | {"x": x}), (x,), (direction,))[1]
    right = (grad(lambda x: loss(leaves | {"x": x}))(x) * direction).sum()
    assert checks.relative_error(found, right) < 1e-6


@every_face
@even_interpreted
def test_third_derivative_is_refused(face: str, backend: str) -> None:
    loss, leaves = loss_of(face, backend)

    def of_x(x: Tensor) -> Tensor:
        return loss(leaves | {"x": x})

    def once(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: grad(f)(x).sin().sum()

    with pytest.raises(NotImplementedError, match="up to the second order"):
        grad(once(once(of_x)))(leaves["x"])


@every_backend
def test_functional_call(backend: str) -> None:
    case = Case("call", nodes=6, edges=20)
    graph, leaves = case.build_graph(), case.layer(torch.float32).leaves
    found = {}
    for name in (backend, "reference"):
        torch.manual_seed(0)
        model = nn.EGNN(5, 8, 4, n_layers=2, attention=True, backend=name).double()
        parameters = {k: p.detach() * 1.5 for k, p in model.named_parameters()}

        def loss(values: Leaves, model: Any = model) -> Tensor:
            h, x = functional_call(
                model, values, (leaves["h"].double(), leaves["x"].double(), graph)
            )
            return h.pow(2).sum() + x.pow(2).sum()

        found[name] = grad(loss)(parameters)
    for key, right in found["reference"].items():
        assert checks.relative_error(found[backend][key], right) <= checks.FLOAT64_BOUND, key


@every_backend
def test_ensembles_of_models(backend: str) -> None:
    case = Case("ensemble", nodes=6, edges=20)
    graph, leaves = case.build_graph(), case.layer(torch.float64).leaves
    models = [nn.EGNN(5, 8, 4, n_layers=2, backend=backend).double() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)

    def one(parameters: Leaves, buffers: Leaves) -> Any:
        return functional_call(models[0], (parameters, buffers), (leaves["h"], leaves["x"], graph))

    h, x = vmap(one)(parameters, buffers)
    for k, model in enumerate(models):
        right = model(leaves["h"], leaves["x"], graph)
        assert checks.relative_error(h[k], right[0]) <= checks.FLOAT64_BOUND
        assert checks.relative_error(x[k], right[1]) <= checks.FLOAT64_BOUND


def by_grad(loss: Callable[..., Tensor], x: Tensor, edges: Any) -> Any:
    return grad(lambda x: loss(x, edges))(x)


def by_grad_of_all(loss: Callable[..., Tensor], x: Tensor, edges: Any) -> Any:
    return grad(loss)(x, edges)


def by_vjp(loss: Callable[..., Tensor], x: Tensor, edges: Any) -> Any:
    value, pull = vjp(lambda x: loss(x, edges), x)[:2]
    return pull(torch.ones_like(value))[0]


def by_vmap(loss: Callable[..., Tensor], x: Tensor, edges: Any) -> Any:
    return vmap(grad(loss), in_dims=(0, None))(torch.stack((-x, x)), edges)[1]


def by_jacrev(loss: Callable[..., Tensor], x: Tensor, edges: Any) -> Any:
    return jacrev(lambda x: loss(x, edges))(x)


@pytest.mark.parametrize("backend", [*FUSED_BACKENDS, "reference"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("form", ["tensor", "pair", "graph"])
@pytest.mark.parametrize("transform", [by_grad, by_grad_of_all, by_vjp, by_vmap, by_jacrev])
def test_edges_of_any_form(transform: Any, form: str, warm: bool, backend: str) -> None:
    """The same whether an ordinary call has seen them before or not."""
    model = nn.EGNN(5, 8, 4, n_layers=2, backend=backend).double()
    h, x = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    edge_index = torch.randint(6, (2, 20))
    edges: Any = {
        "tensor": edge_index, "pair": list(edge_index.clone()),
        "graph": Graph.from_edge_index(edge_index, 6),
    }[form]  # fmt: skip

    def loss(x: Tensor, edges: Any) -> Tensor:
        return model(h, x, edges)[0].sin().sum()

    if warm:
        loss(x, edges)
    found = transform(loss, x, edges)
    leaf = x.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(leaf, edge_index.clone()), leaf)
    assert checks.relative_error(found, right) <= checks.FLOAT64_BOUND
    if warm:
        assert torch.equal(loss(x, edges), loss(x, edge_index.clone()))


@pytest.mark.parametrize("backend", [*FUSED_BACKENDS, "reference"])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.filterwarnings("error")
def test_vmap_over_edge_lists(dim: int, backend: str) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=2, backend=backend).double()
    h, x = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    lists = torch.randint(6, (3, 2, 20))

    def loss(x: Tensor, edges: Tensor) -> Tensor:
        return model(h, x, edges)[0].sin().sum()

    found = vmap(grad(loss), in_dims=(None, dim))(x, lists.movedim(0, dim))
    for k, edges in enumerate(lists):
        right = grad(loss)(x, Graph.from_edge_index(edges, 6))  # type: ignore[arg-type]
        assert checks.relative_error(found[k], right) <= checks.FLOAT64_BOUND


@every_face
@even_interpreted
def test_vmap_over_nothing_is_refused(face: str, backend: str) -> None:
    loss, leaves = loss_of(face, backend)
    batch = torch.empty(0, *leaves["x"].shape, dtype=leaves["x"].dtype)
    with pytest.raises(ValueError, match="batch of at least 1"):
        vmap(lambda x: loss({**leaves, "x": x}))(batch)

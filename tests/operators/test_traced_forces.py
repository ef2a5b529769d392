"""Energy and forces traced by make_fx, compiled by torch.compile, and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import FUSED_BACKENDS
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from egnn_fast import Graph, checks, nn

pytestmark = pytest.mark.usefixtures("one_thread")
Leaves = dict[str, Tensor]
Call = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


EDGES: dict[str, Callable[[Tensor, int], Any]] = {
    "raw": lambda edges, nodes: edges,
    "two tensors": lambda edges, nodes: [edges[0].clone(), edges[1].clone()],
    "graph": Graph.from_edge_index,
    "complete": lambda edges, nodes: Graph.complete([nodes - 3, 3]),
}


MODES = ("real", "symbolic")


def inputs(make: Callable[[Tensor, int], Any], nodes: int, edges: int) -> tuple[Any, ...]:
    edge_index = torch.randint(nodes, (2, edges))
    return torch.randn(nodes, 4).double(), torch.randn(nodes, 3).double(), make(edge_index, nodes)


def energy_and_forces(model: torch.nn.Module) -> Call:
    def call(parameters: Leaves, h: Tensor, x: Tensor, edges: Any) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = functional_call(model, parameters, (h, x, edges))[0].sum()
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy, -gradient

    return call


def step(call: Call, parameters: Leaves, *args: Any) -> Leaves:
    """Energy, forces, and the gradients of a loss on both."""
    leaves = {k: p.detach().clone().requires_grad_() for k, p in parameters.items()}
    energy, forces = call(leaves, *args)
    loss = energy.square() + forces.sin().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return found | {"energy": energy.detach(), "forces": forces.detach()}


def agree(found: Leaves, right: Leaves) -> None:
    assert found.keys() == right.keys()
    for name, t in right.items():
        assert checks.relative_error(found[name], t) <= checks.FLOAT64_BOUND, name


CASES = [
    *((backend, mode, make) for backend in FUSED_BACKENDS for mode in MODES for make in EDGES),
    ("reference", "real", "raw"),
    ("reference", "symbolic", "graph"),
]


@pytest.mark.parametrize(("backend", "mode", "form"), CASES)
def test_traced_and_compiled_forces_train(backend: str, mode: Any, form: str) -> None:
    make = EDGES[form]
    # a trace of plain PyTorch detaches sigmoid's result, which its second derivative needs
    options: dict[str, Any] = {"n_layers": 1, "attention": backend != "reference"}
    model = nn.EGNN(4, 8, 1, backend=backend, **options).double()
    eager = nn.EGNN(4, 8, 1, backend="reference", **options).double()
    parameters = {k: p.detach() * 1.5 for k, p in model.named_parameters()}
    leaves = {k: p.clone().requires_grad_() for k, p in parameters.items()}
    args = inputs(make, 9, 25)
    traced = make_fx(energy_and_forces(model), tracing_mode=mode)(leaves, *args)
    sorts = [n for n in traced.graph.nodes if "sort_by_receiver" in str(n.target)]
    assert len(sorts) == (1 if form in ("raw", "two tensors") else 0)
    compiled = torch.compile(traced, fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = [(9, 25)] if mode == "real" else [(9, 25), (12, 31)]
    for nodes, edges in sizes:
        # other edges than the trace has seen
        args = inputs(make, nodes, edges)
        right = step(energy_and_forces(eager), parameters, *args)
        agree(step(traced, parameters, *args), right)
        agree(step(compiled, parameters, *args), right)
    agree(step(energy_and_forces(model), parameters, *args), right)


def test_what_is_traced_checks_its_edges() -> None:
    layer = nn.EGCL(4, 4, 8).double()
    h, x, edges = inputs(EDGES["raw"], 9, 25)
    traced = make_fx(lambda h, x, e: layer(h, x, e)[0])(h, x, edges)
    edges[1, 4] = 9
    with pytest.raises(IndexError, match="edge_index"):
        traced(h, x, edges)

"""torch.compile without graph breaks or recompiles, and torch.export, with the kernel inside."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import FUSED_BACKENDS, even_interpreted, interpreted, kernel_calls, widest
from torch import Tensor
from torch._dynamo.utils import counters
from torch.export import Dim

import egnn_fast
from egnn_fast import Graph, Options, checks, functional, nn
from egnn_fast.checks.cases import Case

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)
SIZES = ((10, 30), (12, 44), (7, 9), (100, 400))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def unsorted(edges: Tensor, nodes: int) -> Any:
    return Graph.from_edge_index(edges, nodes)


def ordered(edges: Tensor, nodes: int) -> Any:
    return Graph.from_edge_index(edges[:, edges[0].argsort()], nodes)


def warm(edges: Tensor, nodes: int) -> Any:
    graph = Graph.from_edge_index(edges, nodes)
    graph.inverse_degree(torch.float32)
    assert graph.edge_index.shape == edges.shape
    return graph


def complete(edges: Tensor, nodes: int) -> Any:
    return Graph.complete([nodes // 2, nodes - nodes // 2])


def raw(edges: Tensor, nodes: int) -> Any:
    return edges


def pair(edges: Tensor, nodes: int) -> Any:
    return [edges[0].clone(), edges[1].clone()]


INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attributes and edge mask": {"edge_attr_dim": 2, "attention": True},
    "node mask": {"node_attr_dim": 1, "coord_norm": 1.0},
}


def inputs(kind: str, make: Callable[[Tensor, int], Any], nodes: int, edges: int) -> Any:
    """Positional and keyword arguments of an EGNN with 5 features."""
    graph = make(torch.randint(nodes, (2, edges)), nodes)
    rows = graph.num_edges if isinstance(graph, Graph) else edges
    arguments: dict[str, Tensor] = {}
    if kind == "attributes and edge mask":
        arguments = {"edge_attr": torch.randn(rows, 2), "edge_mask": torch.rand(rows)}
    elif kind == "node mask":
        arguments = {"node_attr": torch.randn(nodes, 1), "node_mask": torch.rand(nodes)}
    return (torch.randn(nodes, 5), torch.randn(nodes, 3), graph), arguments


def training_step(
    call: Any, model: torch.nn.Module, args: Any, arguments: Any
) -> dict[str, Tensor]:
    """Outputs and every gradient of one step."""
    h, x, *rest = args
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = call(h, x, *rest, **arguments)
    torch.stack([t.pow(2).sum() for t in out]).sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return grads | {"x": x.grad} | {f"out {k}": t.detach() for k, t in enumerate(out)}


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, t in right.items():
        assert checks.relative_error(found[name], t) < 1e-6, name


@every_backend
@pytest.mark.parametrize(
    ("make", "kind", "dynamic"),
    [
        (unsorted, "plain", None),
        (raw, "attributes and edge mask", None),
        (complete, "node mask", None),
        (unsorted, "attributes and edge mask", True),
        (ordered, "plain", True),
        (warm, "node mask", True),
        (complete, "attributes and edge mask", True),
        (raw, "node mask", True),
        (pair, "plain", True),
    ],
)
def test_training_compiles_whole_and_once(
    make: Callable[[Tensor, int], Any], kind: str, dynamic: bool | None, backend: str
) -> None:
    compile_and_train(make, kind, dynamic, backend, SIZES)


@interpreted
@pytest.mark.parametrize(
    ("make", "kind", "dynamic"),
    [(raw, "attributes and edge mask", None), (complete, "node mask", True)],
)
def test_training_compiles_on_an_interpreted_backend(
    make: Callable[[Tensor, int], Any], kind: str, dynamic: bool, backend: str
) -> None:
    compile_and_train(make, kind, dynamic, backend, SIZES[:3])


def compile_and_train(
    make: Callable[[Tensor, int], Any],
    kind: str,
    dynamic: bool | None,
    backend: str,
    sizes: Sequence[tuple[int, int]],
) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=2, backend=backend, **INPUTS[kind])
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # by itself PyTorch takes the first sizes for constants, and learns at the second call
    free = 1 if dynamic else 2
    for k, (nodes, edges) in enumerate(sizes):
        args, arguments = inputs(kind, make, nodes, edges)
        stance = torch.compiler.set_stance("default" if k < free else "fail_on_recompile")
        with stance, kernel_calls(2, 2, backend):
            found = training_step(compiled, model, args, arguments)
        assert_equal(found, training_step(model, model, args, arguments))
    assert counters["stats"]["unique_graphs"] == free
    assert not counters["graph_break"]


@even_interpreted
def test_inductor(backend: str) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=1, attention=True, backend=backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for nodes, edges in SIZES[:2]:
        args, arguments = inputs("plain", unsorted, nodes, edges)
        with kernel_calls(1, 1, backend):
            found = training_step(compiled, model, args, arguments)
        assert_equal(found, training_step(model, model, args, arguments))
    assert counters["stats"]["unique_graphs"] == 1


@every_backend
@pytest.mark.parametrize("carry", [False, True])
def test_networks_with_velocities(carry: bool, backend: str) -> None:
    model = nn.EGNNVel(5, 8, n_layers=2, carry_velocity=carry, coord_clamp=100, backend=backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for nodes, edges in SIZES:
        args, _ = inputs("plain", unsorted, nodes, edges)
        args = (*args, torch.randn(nodes, 3))
        assert_equal(
            training_step(compiled, model, args, {}), training_step(model, model, args, {})
        )
    assert counters["stats"]["unique_graphs"] == 1


@even_interpreted
@pytest.mark.parametrize("face", ["edge_pass", "layer"])
def test_functions(face: str, backend: str) -> None:
    case = Case(
        "compile", nodes=9, edges=25, attrs=2, mask="soft", hidden=5,
        options=Options(attention=True, coord_norm="unit", coord_tanh=True, coord_clamp=0.1),
    )  # fmt: skip
    problem = getattr(case, face)(widest(backend))
    found = {}
    for name, call in (
        ("eager", problem.run),
        ("compiled", torch.compile(problem.run, fullgraph=True, backend="aot_eager")),
    ):
        leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
        out = call(leaves, backend, 0)
        grads = torch.autograd.grad(
            list(out.values()), list(leaves.values()), [t.detach().cos() for t in out.values()]
        )
        found[name] = out | dict(zip(leaves, grads, strict=True))
    assert_equal(found["compiled"], found["eager"])


@every_backend
def test_compiled_loop_with_an_optimiser_learns(backend: str) -> None:
    model = nn.EGNN(5, 8, 1, n_layers=2, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    (h, x, graph), _ = inputs("plain", unsorted, 20, 80)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = (compiled(h, x, graph)[0].sum(1) - x.norm(dim=1)).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert counters["stats"]["unique_graphs"] == 1


@every_backend
def test_a_raw_edge_index_out_of_range_is_refused_inside_too(backend: str) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=1, backend=backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    (h, x, edges), _ = inputs("plain", raw, 10, 30)
    compiled(h, x, edges)
    for wrong in (10, -1):
        edges[1, 3] = wrong
        with kernel_calls(forward=0, backward=0), pytest.raises(IndexError, match="edge_index"):
            compiled(h, x, edges)


@every_backend
def test_edge_attr_of_the_wrong_length_is_refused_inside_too(backend: str) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=1, edge_attr_dim=2, backend=backend)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for make in (complete, unsorted):
        (h, x, graph), _ = inputs("plain", make, 10, 30)
        compiled(h, x, graph, edge_attr=torch.randn(graph.num_edges, 2))
        with pytest.raises(Exception, match="edge_attr: expected a row for each"):
            compiled(h, x, graph, edge_attr=torch.randn(graph.num_edges + 1, 2))


@even_interpreted
def test_context_and_environment_choose_the_backend_of_compiled_code(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    args, _ = inputs("plain", unsorted, 10, 30)
    right = model(*args)
    for _ in range(2):
        with egnn_fast.use_backend("reference"), kernel_calls(0, 0, backend):
            found = compiled(*args)
        assert_equal({"h": found[0]}, {"h": right[0]})
        with egnn_fast.use_backend(backend), kernel_calls(1, 0, backend):
            compiled(*args)
    torch._dynamo.reset()
    monkeypatch.setenv("EGNN_FAST_BACKEND", "reference")
    with kernel_calls(0, 0, backend):
        compiled(*args)


@even_interpreted
def test_compiled_double_backward_is_refused_by_pytorch(backend: str) -> None:
    """PyTorch's own limit (pytorch#91469): an error, never a wrong number."""
    model = nn.EGNN(5, 8, 4, n_layers=1, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (h, x, graph), _ = inputs("plain", unsorted, 10, 30)
    x.requires_grad_()
    (force,) = torch.autograd.grad(compiled(h, x, graph)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        force.pow(2).sum().backward()


def from_list(h: Tensor, edges: Tensor) -> Graph:
    return Graph.from_edge_index(edges, h.shape[0])


def from_sizes(h: Tensor, edges: Tensor) -> Graph:
    return Graph.complete([h.shape[0] - 3, 3])


def from_both(h: Tensor, edges: Tensor) -> Graph:
    return Graph.batch([Graph.from_edge_index(edges, h.shape[0] - 2), Graph.complete([2])])


@every_backend
@pytest.mark.parametrize("build", [from_list, from_sizes, from_both])
def test_graphs_built_in_compiled_code(
    build: Callable[[Tensor, Tensor], Graph], backend: str
) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=2, backend=backend)

    def call(h: Tensor, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = model(h, x, build(h, edges))
        return found

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    made = torch.compile(build, fullgraph=True, dynamic=True, backend="aot_eager")
    for k, (nodes, edges) in enumerate(SIZES):
        args = (torch.randn(nodes, 5), torch.randn(nodes, 3), torch.randint(nodes - 2, (2, edges)))
        with torch.compiler.set_stance("fail_on_recompile" if k else "default"):
            found = training_step(compiled, model, args, {})
            graph = made(args[0], args[2])
        assert_equal(found, training_step(call, model, args, {}))
        assert type(graph) is Graph
        assert torch.equal(graph.edge_index, build(args[0], args[2]).edge_index)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


class WithGraph(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self.graph = graph

    def forward(self, h: Tensor, x: Tensor) -> Any:
        return self.model(h, x, self.graph)


def exported_operators(program: torch.export.ExportedProgram) -> list[str]:
    targets = (str(node.target) for node in program.graph.nodes)
    return [name for name in targets if name.startswith("egnn_fast.")]


def reloaded(program: torch.export.ExportedProgram) -> torch.nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@even_interpreted
@pytest.mark.parametrize(
    ("make", "strict"), [(unsorted, False), (unsorted, True), (complete, False)]
)
def test_export_with_the_graph_in_the_module(
    make: Callable[[Tensor, int], Any], strict: bool, backend: str
) -> None:
    (h, x, graph), _ = inputs("plain", make, 10, 30)
    model = WithGraph(nn.EGNN(5, 8, 4, n_layers=2, backend=backend).eval(), graph)
    program = torch.export.export(model, (h, x), strict=strict)
    assert len(exported_operators(program)) >= 2
    for call in (program.module(), reloaded(program)):
        args = (torch.randn(10, 5), torch.randn(10, 3))
        with torch.no_grad(), kernel_calls(2, 0, backend):
            found = call(*args)
        for a, b in zip(found, model(*args), strict=True):
            assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_edge_index_and_sizes_as_inputs(strict: bool, backend: str) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=2, edge_attr_dim=2, backend=backend).eval()
    nodes, edges = Dim("nodes", min=2), Dim("edges", min=2)
    (h, x, edge_index), _ = inputs("plain", raw, 10, 30)
    program = torch.export.export(
        model, (h, x, edge_index), {"edge_attr": torch.randn(30, 2)}, strict=strict,
        dynamic_shapes={
            "h": {0: nodes}, "x": {0: nodes}, "graph": {1: edges}, "edge_attr": {0: edges},
        },
    )  # fmt: skip
    assert "egnn_fast.sort_by_receiver.default" in exported_operators(program)
    for call in (program.module(), reloaded(program)):
        for n, e in SIZES:
            args, _ = inputs("plain", raw, n, e)
            edge_attr = torch.randn(e, 2)
            with torch.no_grad():
                found = call(*args, edge_attr=edge_attr)
            for a, b in zip(found, model(*args, edge_attr=edge_attr), strict=True):
                assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("make", [unsorted, complete])
def test_export_with_a_graph_as_an_input(make: Callable[[Tensor, int], Any], backend: str) -> None:
    model = nn.EGNN(5, 8, 4, n_layers=2, backend=backend).eval()
    args, _ = inputs("plain", make, 10, 30)
    program = torch.export.export(model, args, strict=False)
    for call in (program.module(), reloaded(program)):
        other, _ = inputs("plain", make, 10, 30)
        with torch.no_grad():
            found = call(*other)
        for a, b in zip(found, model(*other), strict=True):
            assert torch.equal(a, b)


@even_interpreted
def test_graphs_are_not_filled_with_traced_tensors(backend: str) -> None:
    """What a trace computes of a graph must not stay in it."""
    model = nn.EGNN(5, 8, 4, n_layers=1, backend=backend)
    (h, x, graph), _ = inputs("plain", unsorted, 10, 30)
    torch.compile(model, fullgraph=True, backend="aot_eager")(h, x, graph)
    torch.export.export(WithGraph(model.eval(), graph), (h, x), strict=False)
    assert type(graph.edge_index) is Tensor
    assert type(graph.inverse_degree(torch.float32)) is Tensor
    options = Options()
    weights = model.gcl_0.weights()  # type: ignore[operator, union-attr]
    found = functional.egcl(torch.randn(10, 8), x, graph, weights, options, backend=backend)
    assert type(found[0]) is Tensor

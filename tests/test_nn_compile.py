"""``torch.compile`` and ``torch.export`` of the modules: one graph, no recompiling by size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_inputs import A, F, amplify
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import egnn_fast
from egnn_fast import Graph
from egnn_fast.compat import egnn_clean, nbody
from egnn_fast.nn import EGNN, EGNNVel

SIZES = [(10, 30), (12, 44), (14, 60), (21, 61)]
Call = Callable[..., tuple[Tensor, ...]]


def _egnn() -> tuple[nn.Module, Call]:
    net = EGNN(F, 16, 3, n_layers=2, edge_attr_dim=A, attention=True, coord_norm=1.0)
    return net, lambda m, h, x, v, edges, a: m(h, x, edges, edge_attr=a)


def _egnn_masked() -> tuple[nn.Module, Call]:
    net = EGNN(F, 16, 3, n_layers=2, edge_attr_dim=A, activation=nn.LeakyReLU(0.2))
    return net, lambda m, h, x, v, edges, a: m(
        h, x, edges, edge_attr=a, edge_mask=a[:, 0] > 0, node_mask=h[:, 0] > 0
    )


def _egnn_vel() -> tuple[nn.Module, Call]:
    net = EGNNVel(F, 16, n_layers=2, edge_attr_dim=A, carry_velocity=True, coord_clamp=100.0)
    return net, lambda m, h, x, v, edges, a: m(h, x, edges, v, edge_attr=a)


def _official() -> tuple[nn.Module, Call]:
    net = egnn_clean.EGNN(F, 16, 3, in_edge_nf=A, n_layers=2, act_fn=nn.ReLU())
    return net, lambda m, h, x, v, edges, a: m(h, x, edges, a)


def _official_nbody() -> tuple[nn.Module, Call]:
    net = nbody.EGNN_vel(F, A, 16, n_layers=2, recurrent=True)
    return net, lambda m, h, x, v, edges, a: (m(h, x, edges, v, a),)


BUILDERS = [_egnn, _egnn_masked, _egnn_vel, _official, _official_nbody]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("build", "backend"), [*((build, "cpu") for build in BUILDERS), (_egnn, "reference")]
)
@pytest.mark.parametrize("kind", ["graph", "raw"])
def test_training_compiles_to_one_graph(
    build: Callable[[], tuple[nn.Module, Call]], kind: str, backend: str
) -> None:
    net, call = build()
    net.double()
    amplify(net)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for nodes, count in SIZES:
        h, x, v = (torch.randn(nodes, w).double() for w in (F, 3, 3))
        edges, edge_attr = torch.randint(nodes, (2, count)), torch.randn(count, A).double()
        given: Any = edges if kind == "raw" else Graph.from_edge_index(edges, nodes)
        results = []
        for module in (net, compiled):
            net.zero_grad()
            with egnn_fast.use_backend(backend):
                out = call(module, h, x, v, given, edge_attr)
                torch.stack([(t**2).sum() for t in out]).sum().backward()
            grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
            results.append((out, grads))
        (eager_out, eager), (traced_out, traced) = results
        torch.testing.assert_close(traced_out, eager_out, rtol=1e-11, atol=1e-11)
        assert eager.keys() <= traced.keys()
        for name, grad in eager.items():
            torch.testing.assert_close(traced[name], grad, rtol=1e-10, atol=1e-11)
    # the first call's sizes are taken as fixed, the second's as changing; then no more
    assert counter.frame_count <= 2


def test_a_changed_backend_is_noticed() -> None:
    net = EGNN(F, 16, 3, n_layers=1).double()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    h, x, edges = torch.randn(9, F).double(), torch.randn(9, 3).double(), torch.randint(9, (2, 30))
    core = egnn_fast._native.core
    assert core is not None
    ran = []
    for backend in ("cpu", "reference", "cpu"):
        before = core.calls()[0]
        with egnn_fast.use_backend(backend):
            compiled(h, x, edges)
        ran.append(core.calls()[0] > before)
    assert ran == [True, False, True]


@pytest.mark.filterwarnings("ignore:.*SiLU, ReLU and LeakyReLU")
def test_an_activation_without_a_kernel_compiles() -> None:
    net = EGNN(F, 16, 3, n_layers=2, activation=nn.PReLU()).double()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    arguments = (torch.randn(9, F).double(), torch.randn(9, 3).double(), torch.randint(9, (2, 30)))
    for a, b in zip(compiled(*arguments), net(*arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_export_of_inference_takes_any_size() -> None:
    net = EGNN(F, 16, 3, n_layers=2, edge_attr_dim=A).eval()
    nodes, edges = torch.export.Dim("nodes"), torch.export.Dim("edges")

    def arguments(n: int, e: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        positional = torch.randn(n, F), torch.randn(n, 3), torch.randint(n, (2, e))
        return positional, {"edge_attr": torch.randn(e, A)}

    given, named = arguments(10, 30)
    with torch.no_grad():
        program = torch.export.export(
            net,
            given,
            named,
            dynamic_shapes={
                "h": {0: nodes}, "x": {0: nodes}, "graph": {1: edges}, "edge_attr": {0: edges},
            },
        )  # fmt: skip
        assert any("egnn_fast.messages" in str(n.target) for n in program.graph.nodes)
        for sizes in ((10, 30), (17, 61)):
            given, named = arguments(*sizes)
            got = program.module()(*given, **named)
            for a, b in zip(got, net(*given, **named), strict=True):
                torch.testing.assert_close(a, b)

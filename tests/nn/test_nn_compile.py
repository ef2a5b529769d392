"""``torch.compile`` of the official dialects and of activations without a kernel."""

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
from egnn_fast.compat import egnn_clean, nbody, qm9
from egnn_fast.nn import EGNN

SIZES = [(10, 30), (12, 44), (14, 60), (22, 61)]
Call = Callable[..., tuple[Tensor, ...]]


def _official() -> tuple[nn.Module, Call]:
    net = egnn_clean.EGNN(F, 16, 3, in_edge_nf=A, n_layers=2, act_fn=nn.ReLU())
    return net, lambda m, h, x, v, edges, a: m(h, x, edges, a)


def _official_nbody() -> tuple[nn.Module, Call]:
    net = nbody.EGNN_vel(F, A, 16, n_layers=2, recurrent=True)
    return net, lambda m, h, x, v, edges, a: (m(h, x, edges, v, a),)


def _official_qm9() -> tuple[nn.Module, Call]:
    net = qm9.EGNN(F, A, 16, n_layers=2, attention=True)
    return net, lambda m, h, x, v, edges, a: (
        m(h, x, edges, a, (h[:, :1] > 0).to(h), (a[:, :1] > 0).to(h), 2),
    )


BUILDERS = [_official, _official_nbody, _official_qm9]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("kind", ["graph", "raw"])
def test_official_networks_train_compiled_to_one_graph(
    build: Callable[[], tuple[nn.Module, Call]], kind: str
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
            with egnn_fast.use_backend("cpu"):
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


@pytest.mark.filterwarnings("ignore:.*SiLU, ReLU and LeakyReLU")
def test_an_activation_without_a_kernel_compiles() -> None:
    net = EGNN(F, 16, 3, n_layers=2, activation=nn.PReLU()).double()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    arguments = (torch.randn(9, F).double(), torch.randn(9, 3).double(), torch.randint(9, (2, 30)))
    for a, b in zip(compiled(*arguments), net(*arguments), strict=True):
        torch.testing.assert_close(a, b)

"""Defects that were found once, each with what it looked like."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from cases import FUSED_BACKENDS, even_interpreted
from torch import Tensor

from egnn_fast import Graph, Options, functional
from egnn_fast.checks.cases import Case
from egnn_fast.weights import LayerWeights

pytestmark = pytest.mark.native
every_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)


def random_weights(features: int, hidden: int, out: int, attrs: int) -> dict[str, Tensor]:
    """Weights of a layer with a coordinate head and velocity, named as in LayerWeights."""
    shapes = {
        "edge_w1": (hidden, 2 * features + 1), "edge_b1": (hidden,),
        "edge_w2": (hidden, hidden), "edge_b2": (hidden,),
        "node_w1": (hidden, features + hidden + attrs), "node_b1": (hidden,),
        "node_w2": (out, hidden), "node_b2": (out,),
        "coord_w1": (hidden, hidden), "coord_b1": (hidden,), "coord_w2": (1, hidden),
        "vel_w1": (hidden, features), "vel_b1": (hidden,),
        "vel_w2": (1, hidden), "vel_b2": (1,),
    }  # fmt: skip
    return {name: torch.randn(s, dtype=torch.float64) / 3 for name, s in shapes.items()}


@every_backend
@pytest.mark.parametrize(("features", "out"), [(0, 2), (2, 0), (0, 0)])
@pytest.mark.usefixtures("poison")
def test_no_features(features: int, out: int, backend: str) -> None:
    """An empty tensor has no address: velocity MLP and cotangents were taken for absent."""
    leaves = random_weights(features, 5, out, attrs=2)
    for name, width in (("h", features), ("x", 3), ("v", 3), ("node_attr", 2)):
        leaves[name] = torch.randn(7, width, dtype=torch.float64)
    graph = Graph.complete([4, 3])

    def run(backend: str) -> list[Tensor]:
        t = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        weights = LayerWeights(**{n: t[n] for n in LayerWeights._fields if n in t})
        h, x, _ = functional.egcl(
            t["h"], t["x"], graph, weights, Options(), v=t["v"], node_attr=t["node_attr"],
            residual=False, backend=backend,
        )  # fmt: skip
        loss = h.square().sum() + x.square().sum()
        return [h, x, *torch.autograd.grad(loss, list(t.values()))]

    exact = run("reference")
    for _ in range(3):  # only later calls were wrong
        for found, right in zip(run(backend), exact, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


CHILD = """
import os, torch
from egnn_fast.checks.cases import Case

problem = Case("fork", nodes=300, edges=3000, hidden=32).layer(torch.float32)
torch.set_num_threads(2)
torch.randn(2_000_000).exp()  # PyTorch's threads run before the first call of a kernel
pid = os.fork()
if pid == 0:
    problem.run(problem.leaves, "cpu", 0)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_first_call_in_a_forked_child() -> None:
    """It waited for threads that had not come along, unless the parent had called as well."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert out.strip() == "7"


@even_interpreted
@pytest.mark.parametrize("options", [Options(coord_norm=1e-60), Options(coord_clamp=1e-60)])
def test_options_below_the_smallest_float(options: Options, backend: str) -> None:
    """Rounded to 0 in float32, they were taken for none."""
    problem = Case("tiny", edges=60, options=options).edge_pass(torch.float32)
    right = problem.run(problem.leaves, "reference", 0)["X"]
    found = problem.run(problem.leaves, backend, 0)["X"]
    assert torch.allclose(found, right, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("backend", ["reference", *FUSED_BACKENDS])
def test_no_hidden_units(backend: str) -> None:
    """The edge pass returned memory that nobody had written."""
    x, graph = torch.randn(7, 3, dtype=torch.float64), Graph.complete([4, 3])
    w = {n: t for n, t in random_weights(2, 0, 2, attrs=0).items() if not n.startswith("vel_")}
    with pytest.raises(
        ValueError, match=r"weights\.edge_w1: expected a hidden width of at least 1"
    ):
        functional.egcl(x[:, :2], x, graph, LayerWeights(**w), Options(), backend=backend)
    edge = LayerWeights(**w).split(2)[2]
    with pytest.raises(ValueError, match="P: expected a hidden width of at least 1"):
        functional.egcl_messages(x[:, :0], x[:, :0], x, graph, edge, Options(), backend=backend)


def test_writing_to_an_edge_index_that_a_graph_gave_does_not_change_the_graph() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 2)
    graph.edge_index.zero_()
    assert graph.edge_index.tolist() == [[0, 1], [1, 0]]

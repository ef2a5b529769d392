"""What can be said of graphed networks without a GPU; bench/gpu_suite.py captures some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from egnn_fast import Graph, nn
from egnn_fast.nn import cuda_graphs

GRAPH = Graph.complete([3, 4])


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    return {
        "h": normal(7, 2), "x": normal(7, 3), "v": normal(7, 3), "edge_attr": normal(18, 1),
        "node_mask": torch.ones(7, 1),
    }  # fmt: skip


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the network itself, where a GPU would replay its capture."""

    def capture(run: Any, samples: tuple[Tensor, ...]) -> Any:
        run(*samples)
        return run

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")


@pytest.mark.usefixtures("uncaptured")
@pytest.mark.parametrize("velocity", [False, True])
def test_it_runs_the_network_on_its_graph(velocity: bool) -> None:
    torch.manual_seed(0)
    kind = nn.EGNNVel if velocity else nn.EGNN
    network = kind(2, 8, 5, n_layers=2, edge_attr_dim=1)
    given = tensors()
    if not velocity:
        del given["v"]
    run = nn.graphed(network, given["h"], given["x"], GRAPH, **without(given, "h", "x"))
    other = {k: t + 1 for k, t in given.items()}
    rest = without(other, "h", "x", "v")
    place = (other["v"],) if velocity else ()
    expected = network(other["h"], other["x"], GRAPH, *place, **rest)
    # in any order of the keywords
    found = run(other["h"], other["x"], **dict(reversed(without(other, "h", "x").items())))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    found[0].sum().backward()
    assert network.get_parameter("gcl_0.edge_mlp.0.weight").grad is not None


def without(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: t for k, t in given.items() if k not in names}


@pytest.mark.usefixtures("uncaptured")
def test_calls_unlike_the_capture_are_refused() -> None:
    network = nn.EGNN(2, 8, 5, n_layers=1)
    h, x = tensors()["h"], tensors()["x"]
    run = nn.graphed(network, h, x, GRAPH)
    with pytest.raises(
        ValueError, match=r"x: captured as \[7, 3\] torch.float32 on cpu, got \[6, 3\]"
    ):
        run(h, x[:6])
    with pytest.raises(ValueError, match=r"h: captured as .*float32.*, got .*float64"):
        run(h.double(), x)
    with pytest.raises(ValueError, match="captured with h, x, called with h, x, edge_attr"):
        run(h, x, edge_attr=torch.ones(18, 1))


@pytest.mark.usefixtures("uncaptured")
def test_what_the_capture_would_not_see_is_refused() -> None:
    network = nn.EGNN(2, 8, 5, n_layers=1)
    h, x = tensors()["h"], tensors()["x"]
    run = nn.graphed(network, h, x, GRAPH)
    with pytest.raises(ValueError, match="x: captured without requires_grad"):
        run(h, x.clone().requires_grad_())
    with torch.no_grad():
        run(h, x.clone().requires_grad_())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"autocast: captured with none, .* torch.bfloat16"),
    ):
        run(h, x)
    weight = network.get_parameter("gcl_0.edge_mlp.2.weight")
    with torch.no_grad():
        weight.mul_(2)
    run(h, x)
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match=r"gcl_0\.edge_mlp\.2\.weight: its memory was replaced"):
        run(h, x)
    run = nn.graphed(network, h, x, GRAPH)
    network.load_state_dict({k: t.clone() for k, t in network.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"embedding_in\.weight: its memory was replaced"):
        run(h, x)


def test_wrong_arguments_name_themselves() -> None:
    network = nn.EGNN(2, 8, 5, n_layers=1)
    h, x = tensors()["h"], tensors()["x"]
    graph: Any = GRAPH.edge_index
    with pytest.raises(TypeError, match="graph: expected a Graph, got Tensor"):
        nn.graphed(network, h, x, graph)
    with pytest.raises(ValueError, match="h: expected to lie on a CUDA device, got cpu"):
        nn.graphed(network, h, x, GRAPH)
    with pytest.raises(TypeError, match="edge_atr: expected one of v, edge_attr"):
        nn.graphed(network, h, x, GRAPH, edge_atr=h)
    nothing: Any = None
    with pytest.raises(TypeError, match="edge_mask: expected a Tensor, got NoneType"):
        nn.graphed(network, h, x, GRAPH, edge_mask=nothing)

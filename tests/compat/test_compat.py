"""The official dialects: arguments, returns, initial weights and where we differ.

``data/official_init.json`` was made with the official code: for each class and its arguments the
keys of the ``state_dict`` in order and, for each seed, the SHA-256 of all keys and values and the
number that the generator gives after construction.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

import egnn_fast
from egnn_fast import Graph
from egnn_fast import nn as fast
from egnn_fast.compat import ae, egnn_clean, gcl, nbody, qm9

BACKENDS = ("reference", "cpu")
OFFICIAL_INIT = json.loads((golden.DATA / "official_init.json").read_text())


def random_graph(nodes: int, edges: int) -> Tensor:
    """An unsorted edge list with repeated edges, without self-loops."""
    receivers = torch.randint(nodes, (edges,))
    senders = (receivers + torch.randint(1, nodes, (edges,))) % nodes
    return torch.stack((receivers, senders))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def row_name(row: dict[str, Any]) -> str:
    return f"{row['source']}-{len(row['kwargs'])}"


@pytest.mark.parametrize("row", OFFICIAL_INIT, ids=row_name)
def test_initial_weights_are_the_official_ones(row: dict[str, Any]) -> None:
    for seed, expected in row["seeds"].items():
        torch.manual_seed(int(seed))
        module = golden.build(row["source"], row["kwargs"])
        following = torch.rand(1, dtype=torch.float64).item()
        state = module.state_dict()
        # the order too: it is that of an optimiser's state
        assert list(state) == row["keys"]
        digest = hashlib.sha256()
        for key, value in state.items():
            digest.update(key.encode() + value.numpy().tobytes())
        assert digest.hexdigest() == expected["sha256"]
        assert following == expected["next_draw"]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: egnn_clean.E_GCL(4, 4, 8, coords_agg="max"), "coords_agg"),
        (lambda: egnn_clean.E_GCL(4, 4, 8, coords_agg=None), "coords_agg"),  # type: ignore[arg-type]
        (lambda: egnn_clean.E_GCL(4, 5, 8), "residual"),
        (lambda: egnn_clean.E_GCL(0, 0, 8), "input_nf"),
        (lambda: egnn_clean.E_GCL(4, 4, 8, edges_in_d=-1), "edges_in_d"),
        (lambda: egnn_clean.EGNN(4, 0, 4), "hidden_nf"),
        (lambda: egnn_clean.EGNN(4, 8, 4, n_layers=0), "n_layers"),
        (lambda: egnn_clean.EGNN(4, 8, 4, backend="gpu"), "backend"),
        (lambda: gcl.E_GCL(4, 5, 8), "recurrent"),
        (lambda: gcl.E_GCL(4, 4, 8, coords_weight=float("nan")), "coord_scale"),
        (lambda: qm9.E_GCL_mask(4, 4, 8, nodes_attr_dim=-1), "nodes_attr_dim"),
        (lambda: ae.AE_EGNN(8, K=0), "K"),
    ],
)
def test_wrong_values_are_named(build: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named}\b"):
        build()


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: egnn_clean.E_GCL(4.0, 4, 8), "input_nf"),  # type: ignore[arg-type]
        (lambda: egnn_clean.E_GCL(4, 4, 8, act_fn="silu"), "act_fn"),  # type: ignore[arg-type]
        (lambda: gcl.E_GCL_vel(4, 4, 8, act_fn=torch.tanh), "act_fn"),  # type: ignore[arg-type]
        (lambda: nbody.EGNN_vel(1, 2, "64"), "hidden_nf"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_named(build: Any, named: str) -> None:
    with pytest.raises(TypeError, match=rf"^{named}\b"):
        build()


def test_switches_may_be_integers() -> None:
    # the official scripts pass the command line's 0 and 1
    layer = gcl.E_GCL(4, 4, 8, attention=1, recurrent=1, tanh=0)  # type: ignore[arg-type]
    assert layer.options.attention is True
    assert layer.residual is True


@pytest.mark.parametrize("layer", [egnn_clean.E_GCL, gcl.E_GCL, gcl.E_GCL_vel, qm9.E_GCL_mask])
@pytest.mark.parametrize("name", ["edge_model", "node_model", "coord_model", "coord2radial"])
def test_methods_that_nothing_would_call_are_refused(layer: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^Mine\.{name}: forward does not call it"):
        type("Mine", (layer,), {name: lambda self, *args: None})
    own = type("Mine", (layer,), {name: lambda self, *args: 3, "forward": lambda self: 3})
    also = type("Also", (own,), {name: lambda self, *args: 4})
    assert getattr(also(4, 4, 8), name)() == 4


def test_layers_return_edge_attr_itself() -> None:
    edges, edge_attr = random_graph(5, 9), torch.rand(9, 2)
    h, x, v = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 3)
    with egnn_fast.use_backend("reference"):
        results = [
            egnn_clean.E_GCL(4, 4, 8, edges_in_d=2)(h, edges, x, edge_attr),
            gcl.E_GCL(4, 4, 8, edges_in_d=2)(h, edges, x, edge_attr),
            gcl.E_GCL_vel(4, 4, 8, edges_in_d=2)(h, edges, x, v, edge_attr),
            qm9.E_GCL_mask(4, 4, 8, edges_in_d=2)(h, edges, x, None, None, edge_attr),
        ]
    for result in results:
        assert len(result) == 3
        assert result[2] is edge_attr
    assert results[3][1] is x


@pytest.mark.filterwarnings("ignore:.*SiLU, ReLU and LeakyReLU")
@pytest.mark.parametrize("row", OFFICIAL_INIT, ids=row_name)
def test_the_kernel_equals_the_reference_on_random_cases(row: dict[str, Any]) -> None:
    kwargs, nodes, edges = row["kwargs"], 12, random_graph(12, 50)
    widths = {
        "h": kwargs.get("input_nf", kwargs.get("in_node_nf", 1)),
        "edge_attr": kwargs.get("edges_in_d", kwargs.get("in_edge_nf", 0)),
        "node_attr": kwargs.get("nodes_att_dim", kwargs.get("nodes_attr_dim", 0)),
        "x": 3, "vel": 3, "x0": kwargs.get("K", 8), "node_mask": 1, "edge_mask": 1,
    }  # fmt: skip
    if row["source"] == "models.ae.AE_EGNN":
        widths["edge_attr"] = 1
    rows = {"edge_attr": 50, "edge_mask": 50}
    drawn = {k: torch.randn(rows.get(k, nodes), w).double() for k, w in widths.items() if w}
    module = golden.build(row["source"], kwargs).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # out of the tiny initial gain, or an error in the coordinates would not show
            if name.endswith("coord_mlp.2.weight"):
                parameter.mul_(300)

    found = []
    for backend in BACKENDS:
        leaves = {k: v.clone().requires_grad_() for k, v in drawn.items()}
        with egnn_fast.use_backend(backend):
            outputs = golden.call(row["source"], module, leaves, edges, n_nodes=4)
            module.zero_grad()
            torch.manual_seed(0)
            sum((v * torch.randn_like(v)).sum() for v in outputs.values()).backward()  # type: ignore[union-attr]
        grads = {k: v.grad for k, v in [*leaves.items(), *module.named_parameters()]}
        found.append({**{f"out/{k}": v.detach() for k, v in outputs.items()}, **grads})
    reference, fused = found
    for name, expected in reference.items():
        value = fused[name]
        if expected is None:
            assert value is None, name
        else:
            assert value is not None, name
            assert expected.abs().max() > 0, name
            assert close(value, expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_networks_equal_the_clean_dialect(backend: str) -> None:
    edges, h, x, v = random_graph(9, 40), torch.randn(9, 3), torch.randn(9, 3), torch.randn(9, 3)
    edge_attr = torch.rand(40, 2)
    official = egnn_clean.EGNN(3, 16, 5, in_edge_nf=2, attention=True, normalize=True, tanh=True)
    clean = fast.EGNN(3, 16, 5, edge_attr_dim=2, attention=True, coord_norm="unit", coord_tanh=True)
    clean.load_state_dict(official.state_dict(), strict=True)
    official_vel = nbody.EGNN_vel(3, 2, 16, recurrent=True, norm_diff=True, coords_weight=0.5)
    clean_vel = fast.EGNNVel(
        3, 16, edge_attr_dim=2, coord_norm=1.0, coord_scale=0.5, coord_clamp=100.0
    )
    clean_vel.load_state_dict(official_vel.state_dict(), strict=True)
    with egnn_fast.use_backend(backend):
        for a, b in zip(
            official(h, x, edges, edge_attr), clean(h, x, edges, edge_attr=edge_attr), strict=True
        ):
            assert torch.equal(a, b)
        _, moved = clean_vel(h, x, edges, v, edge_attr=edge_attr)
        assert torch.equal(official_vel(h, x, edges, v, edge_attr), moved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_coordinates_are_always_clamped_in_gcl(backend: str) -> None:
    for clamp in (False, True):
        layer = gcl.E_GCL(2, 2, 8, clamp=clamp, backend=backend).double()
        with torch.no_grad():
            layer.get_parameter("coord_mlp.2.weight").fill_(1e6)
        x = torch.tensor([[1e3, -1e3], [0.0, 0.0]], dtype=torch.float64)
        _, moved, _ = layer(torch.ones(2, 2).double(), torch.tensor([[0], [1]]), x)
        assert torch.equal((moved - x)[0].abs(), torch.full((2,), 100.0, dtype=torch.float64))
        assert torch.equal(moved[1], x[1])


def test_node_attr_works_where_the_official_one_crashes() -> None:
    edges, h, x = random_graph(5, 9), torch.randn(5, 4), torch.randn(5, 3)
    node_attr = torch.randn(5, 2)
    with egnn_fast.use_backend("reference"):
        with pytest.raises(ValueError, match="node_attr"):
            egnn_clean.E_GCL(4, 4, 8)(h, edges, x, node_attr=node_attr)
        layer = egnn_clean.E_GCL(4, 4, 8, nodes_att_dim=2)
        out = layer(h, edges, x, node_attr=node_attr)[0]
        assert not torch.equal(out, layer(h, edges, x, node_attr=node_attr + 1)[0])


def test_a_checkpoint_with_missing_or_extra_keys_is_refused() -> None:
    network = egnn_clean.EGNN(3, 8, 2, n_layers=2)
    state = network.state_dict()
    missing = {k: v for k, v in state.items() if k != "gcl_1.coord_mlp.2.weight"}
    with pytest.raises(RuntimeError, match=r"gcl_1\.coord_mlp\.2\.weight"):
        network.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="surplus"):
        network.load_state_dict({**state, "surplus": torch.zeros(1)})


def test_device_argument_moves_the_parameters() -> None:
    for network in (
        egnn_clean.EGNN(3, 8, 2, device="meta"),
        nbody.EGNN(1, 2, 8, device="meta"),
        nbody.EGNN_vel(1, 2, 8, device="meta"),
        qm9.EGNN(3, 0, 8, device="meta"),
        ae.AE_EGNN(8, device="meta"),
    ):
        assert {p.device.type for p in network.parameters()} == {"meta"}


def test_an_activation_with_parameters_is_shared_and_trains() -> None:
    activation = nn.PReLU()
    network = egnn_clean.EGNN(3, 8, 2, n_layers=2, act_fn=activation)
    assert sum(p is activation.weight for p in network.parameters()) == 1
    h, x, edges = torch.randn(5, 3), torch.randn(5, 3), random_graph(5, 12)
    with pytest.warns(UserWarning, match="SiLU, ReLU and LeakyReLU") as caught:
        h, x = network(h, x, edges, None)
    assert len(caught) == 1
    (h.sum() + x.sum()).backward()
    assert activation.weight.grad is not None
    assert activation.weight.grad.abs() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("node_attr", [0, 1])
def test_qm9_padding_does_not_count(backend: str, node_attr: int) -> None:
    network = qm9.EGNN(4, 0, 8, n_layers=2, attention=True, node_attr=node_attr).double()
    h, x = torch.randn(10, 4).double(), torch.randn(10, 3).double()
    edges = Graph.complete([5, 5])
    real = (torch.arange(10) % 5 < 3).double()
    receiver, sender = edges.edge_index
    edge_mask = (real[receiver] * real[sender]).unsqueeze(1)
    with egnn_fast.use_backend(backend):
        before = network(h, x, edges, None, real.unsqueeze(1), edge_mask, 5)
        padding = real == 0
        h[padding], x[padding] = 7.0, -3.0
        after = network(h, x, edges, None, real.unsqueeze(1), edge_mask, 5)
    assert before.shape == (2,)
    assert torch.equal(before, after)
    assert not torch.equal(before[0], before[1])
    with pytest.raises(ValueError, match="n_nodes"):
        network(h, x, edges, None, real.unsqueeze(1), edge_mask, 4)


def test_autoencoder_draws_the_official_noise() -> None:
    network = ae.AE_EGNN(8, K=5, n_layers=2, backend="reference")
    h, edges, edge_attr = torch.ones(6, 1), Graph.complete([6]), torch.ones(30, 1)
    torch.manual_seed(3)
    noise = torch.randn(6, 5)
    torch.manual_seed(3)
    adjacency, z = network(h, edges, edge_attr)
    given = network(h, edges, edge_attr, x0=noise)
    assert torch.equal(adjacency, given[0])
    assert torch.equal(z, given[1])
    with pytest.raises(ValueError, match="x0"):
        network(h, edges, edge_attr, x0=torch.randn(6, 4))


@pytest.mark.parametrize("k", [1, 3, 16])
def test_autoencoder_decodes_any_dimension(k: int) -> None:
    network = ae.AE_EGNN(8, K=k).double()
    z = torch.randn(7, k).double()
    adjacency = network.decode(z)
    expected = torch.sigmoid(network.w * torch.cdist(z, z) ** 2 + network.b)
    expected = expected - torch.diag(expected.diagonal())
    assert close(adjacency, expected)
    kept = network.decode_from_x(z, remove_diagonal=False).diagonal()
    assert close(kept, torch.full((7,), -1.0).double().sigmoid())
    linear = nn.Linear(k, 1).double()
    pair = torch.sigmoid(linear((z[2] - z[4]) ** 2))
    assert close(network.decode_from_x(z, linear_layer=linear)[2, 4], pair.squeeze())
    adjacency.sum().backward()
    assert isinstance(network.w, nn.Parameter)
    for parameter in (network.w, network.b):
        assert parameter.grad is not None
        assert parameter.grad.abs() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_callers_coordinates_stay(backend: str) -> None:
    x = torch.randn(5, 3)
    before = x.clone()
    network = nbody.EGNN_vel(1, 0, 8, recurrent=True, backend=backend)
    moved = network(torch.ones(5, 1), x, random_graph(5, 12), torch.randn(5, 3), None)
    assert torch.equal(x, before)
    assert not torch.equal(moved, before)
    nbody.EGNN(1, 0, 8, backend=backend)(torch.ones(5, 1), x, random_graph(5, 12), None)
    assert torch.equal(x, before)


def test_helpers() -> None:
    assert egnn_clean.get_edges(3) == [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]]
    edges, edge_attr = egnn_clean.get_edges_batch(3, 2)
    assert [e.tolist() for e in edges] == [
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
        [1, 2, 0, 2, 0, 1, 4, 5, 3, 5, 3, 4],
    ]
    assert torch.equal(edge_attr, torch.ones(12, 1))
    data, ids = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 8.0]]), torch.tensor([2, 0, 2])
    total = [[3.0, 5.0], [0.0, 0.0], [8.0, 10.0]]
    assert egnn_clean.unsorted_segment_sum(data, ids, 3).tolist() == total
    total[2] = [4.0, 5.0]
    assert gcl.unsorted_segment_mean(data, ids, 3).tolist() == total

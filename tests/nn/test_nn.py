"""The layers and networks as modules: construction, options, velocities, masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nn_inputs import BACKENDS, A, D, Data, E, F, N, amplify
from torch import Tensor, nn

import egnn_fast
from egnn_fast import Graph, Options
from egnn_fast import nn as fast
from egnn_fast.nn import EGCL, EGNN, EGCLVel, EGNNVel


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data() -> Data:
    return Data()


def test_shapes(backend: str, data: Data) -> None:
    h, x = EGCL(F, 7, 16, residual=False, backend=backend).double()(data.h, data.x, data.edges)
    assert (h.shape, x.shape) == ((N, 7), (N, D))
    h, x = EGNN(F, 16, 5, edge_attr_dim=A, n_layers=2, backend=backend).double()(
        data.h, data.x, data.edges, edge_attr=data.edge_attr
    )
    assert (h.shape, x.shape) == ((N, 5), (N, D))
    for out_features in (None, 5):
        network = EGNNVel(F, 16, out_features, n_layers=2, backend=backend).double()
        h, x = network(data.h, data.x, data.edges, data.v)
        assert (h.shape, x.shape) == ((N, out_features or 16), (N, D))


def test_parameter_names_are_the_official_ones() -> None:
    layer = [
        "edge_mlp.0.weight", "edge_mlp.0.bias", "edge_mlp.2.weight", "edge_mlp.2.bias",
        "node_mlp.0.weight", "node_mlp.0.bias", "node_mlp.2.weight", "node_mlp.2.bias",
        "coord_mlp.0.weight", "coord_mlp.0.bias", "coord_mlp.2.weight",
        "att_mlp.0.weight", "att_mlp.0.bias",
        "coord_mlp_vel.0.weight", "coord_mlp_vel.0.bias",
        "coord_mlp_vel.2.weight", "coord_mlp_vel.2.bias",
    ]  # fmt: skip
    assert list(EGCLVel(4, 4, 8, attention=True).state_dict()) == layer
    assert list(EGCL(4, 4, 8, coord_agg=None).state_dict()) == layer[:8]
    parts = {key.split(".")[0] for key in EGNN(4, 8, 2, n_layers=2).state_dict()}
    assert parts == {"embedding_in", "gcl_0", "gcl_1", "embedding_out"}
    parts = {key.split(".")[0] for key in EGNNVel(4, 8, n_layers=2).state_dict()}
    assert parts == {"embedding", "gcl_0", "gcl_1"}


def test_residual_adds_h(backend: str, data: Data) -> None:
    with_residual = EGCL(F, F, 16, backend=backend).double()
    without = EGCL(F, F, 16, residual=False, backend=backend).double()
    without.load_state_dict(with_residual.state_dict())
    h, _ = with_residual(data.h, data.x, data.edges)
    update, _ = without(data.h, data.x, data.edges)
    assert torch.equal(h, data.h + update)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": True},
        {"coord_norm": "unit"},
        {"coord_norm": 1.0},
        {"coord_norm": 2.5},
        {"coord_tanh": True},
        {"coord_agg": "sum"},
        {"coord_scale": 0.5},
        {"coord_clamp": 0.01},
        {"activation": nn.ReLU()},
        {"activation": nn.LeakyReLU(0.2)},
        {"activation": nn.LeakyReLU(0.05)},
    ],
    ids=str,
)
def test_every_option_acts_and_runs_on_the_kernel(options: dict[str, Any], data: Data) -> None:
    torch.manual_seed(1)
    plain = EGCL(F, F, 16).double()
    torch.manual_seed(1)
    layer = EGCL(F, F, 16, **options).double()
    amplify(plain)
    amplify(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback is announced
        assert fast.explain(layer, data.h, data.x).backend == "cpu"
        fused = layer(data.h, data.x, data.edges)
    with egnn_fast.use_backend("reference"):
        expected = layer(data.h, data.x, data.edges)
    for a, b in zip(fused, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    unlike = plain(data.h, data.x, data.edges)
    assert not torch.allclose(fused[1], unlike[1], rtol=1e-6)


def test_node_attributes_enter_the_node_mlp(backend: str, data: Data) -> None:
    layer = EGCL(F, F, 16, node_attr_dim=2, backend=backend).double()
    node_attr = torch.randn(N, 2).double().requires_grad_()
    h, x = layer(data.h, data.x, data.edges, node_attr=node_attr)
    h[3].sum().backward()
    assert node_attr.grad is not None
    reached = node_attr.grad.abs().sum(dim=1) > 0
    assert reached.nonzero().flatten().tolist() == [3]
    assert torch.equal(x, layer(data.h, data.x, data.edges, node_attr=node_attr + 1)[1])
    with pytest.raises(ValueError, match="node_attr"):
        layer(data.h, data.x, data.edges)


def test_coord_agg_none_returns_the_coordinates_as_they_came(backend: str, data: Data) -> None:
    layer = EGCL(F, F, 16, coord_agg=None, backend=backend).double()
    h, x = layer(data.h, data.x, data.edges)
    assert x is data.x
    assert not torch.equal(h, data.h)


def test_carried_velocity_is_the_step(backend: str, data: Data) -> None:
    layer = EGCLVel(F, F, 16, carry_velocity=True, backend=backend).double()
    amplify(layer)
    h, x, v = layer(data.h, data.x, data.edges, data.v)
    assert torch.equal(x, data.x + v)
    plain = EGCLVel(F, F, 16, backend=backend).double()
    plain.load_state_dict(layer.state_dict())
    result = plain(data.h, data.x, data.edges, data.v)
    assert len(result) == 2
    assert torch.equal(result[1], x)

    network: Any = EGNNVel(F, F, n_layers=2, carry_velocity=True, backend=backend).double()
    once: Any = EGNNVel(F, F, n_layers=2, backend=backend).double()
    once.load_state_dict(network.state_dict())
    embedded = network.embedding(data.h)
    h, x, v = network.gcl_0(embedded, data.x, data.edges, data.v)
    _, carried, _ = network.gcl_1(h, x, data.edges, v)
    assert torch.equal(network(data.h, data.x, data.edges, data.v)[1], carried)
    _, initial = once.gcl_1(h, x, data.edges, data.v)
    assert torch.equal(once(data.h, data.x, data.edges, data.v)[1], initial)
    assert not torch.equal(carried, initial)


@pytest.mark.parametrize("kind", ["plain", "velocity"])
def test_masked_nodes_are_padding(backend: str, kind: str, data: Data) -> None:
    network: EGNN | EGNNVel
    if kind == "plain":
        network = EGNN(F, 16, 3, n_layers=2, attention=True, backend=backend).double()
    else:
        network = EGNNVel(F, 16, 3, n_layers=2, backend=backend).double()
    amplify(network)
    graph = Graph.complete([N])
    v = () if kind == "plain" else (data.v,)
    real = torch.arange(N) < 5
    before = network(data.h, data.x, graph, *v, node_mask=real)
    small = network(data.h[:5], data.x[:5], Graph.complete([5]), *(velocity[:5] for velocity in v))
    data.h[5:], data.x[5:] = 9.0, -4.0
    after = network(data.h, data.x, graph, *v, node_mask=real.double().unsqueeze(1))
    for a, b, alone in zip(before, after, small, strict=True):
        assert torch.equal(a[:5], b[:5])
        torch.testing.assert_close(a[:5], alone, rtol=1e-12, atol=1e-12)
    assert (after[0][5:] == 0).all()
    assert torch.equal(after[1][5:], data.x[5:])


def test_parameters_that_the_loss_does_not_reach_have_no_gradient(backend: str, data: Data) -> None:
    network = EGNN(F, 16, 3, n_layers=2, backend=backend).double()
    h, x = network(data.h, data.x, data.edges)
    h.sum().backward(retain_graph=True)
    unreached = {name for name, p in network.named_parameters() if p.grad is None}
    assert unreached == {f"gcl_1.coord_mlp.{k}" for k in ("0.weight", "0.bias", "2.weight")}
    network.zero_grad()
    x.sum().backward()
    unreached = {name for name, p in network.named_parameters() if p.grad is None}
    assert unreached == {
        f"{part}.{k}"
        for part, layers in (("gcl_1.node_mlp", ("0.", "2.")), ("embedding_out", ("",)))
        for layer in layers
        for k in (f"{layer}weight", f"{layer}bias")
    }


@pytest.mark.parametrize(
    ("build", "error", "named"),
    [
        (lambda: EGCL(0, 0, 8), ValueError, "in_features"),
        (lambda: EGCL(4, 4, True), TypeError, "hidden_features"),
        (lambda: EGCL(4, 5, 8), ValueError, "residual"),
        (lambda: EGCL(4, 4, 8, residual=2), TypeError, "residual"),  # type: ignore[arg-type]
        (lambda: EGCL(4, 4, 8, edge_attr_dim=-1), ValueError, "edge_attr_dim"),
        (lambda: EGCL(4, 4, 8, node_attr_dim=1.0), TypeError, "node_attr_dim"),  # type: ignore[arg-type]
        (lambda: EGCL(4, 4, 8, activation="silu"), TypeError, "activation"),  # type: ignore[arg-type]
        (lambda: EGCL(4, 4, 8, coord_agg="max"), ValueError, "coord_agg"),
        (lambda: EGCL(4, 4, 8, coord_norm="l2"), ValueError, "coord_norm"),
        (lambda: EGCL(4, 4, 8, coord_norm=0.0), ValueError, "coord_norm"),
        (lambda: EGCL(4, 4, 8, coord_clamp=-1.0), ValueError, "coord_clamp"),
        (lambda: EGCL(4, 4, 8, coord_scale="1"), TypeError, "coord_scale"),  # type: ignore[arg-type]
        (lambda: EGCL(4, 4, 8, attention="1"), TypeError, "attention"),  # type: ignore[arg-type]
        (lambda: EGCL(4, 4, 8, backend="gpu"), ValueError, "backend"),
        (lambda: EGCLVel(4, 4, 8, carry_velocity=1.0), TypeError, "carry_velocity"),  # type: ignore[arg-type]
        (lambda: EGNN(4, 8, 0), ValueError, "out_features"),
        (lambda: EGNN(4, 8, 2, n_layers=0), ValueError, "n_layers"),
        (lambda: EGNN(4, 8, 2, coord_agg="max"), ValueError, "coord_agg"),
        (lambda: EGNNVel(4, 8, 0), ValueError, "out_features"),
        (lambda: EGNNVel(4, 8, n_layers="2"), TypeError, "n_layers"),  # type: ignore[arg-type]
    ],
)
def test_wrong_constructor_arguments_are_named(
    build: Callable[[], nn.Module], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=rf"^{named}\b"):
        build()


@pytest.mark.parametrize("no", [False, 0, np.bool_(False), np.int64(0)])
def test_switches_may_be_0_and_1(no: Any) -> None:
    yes = type(no)(1)
    layer = EGCLVel(4, 4, 8, attention=yes, coord_tanh=yes, residual=no, carry_velocity=yes)
    assert layer.options == Options(attention=True, coord_tanh=True)
    values = (layer.options.attention, layer.options.coord_tanh, layer.carry_velocity)
    assert all(value is True for value in values)
    assert layer.residual is False
    assert hash(Options(attention=yes)) == hash(Options(attention=True))
    plain = EGNNVel(4, 8, attention=no, coord_tanh=no, residual=yes, carry_velocity=no)
    assert plain.carry_velocity is False
    assert "att_mlp" not in {name for name, _ in plain.gcl_0.named_children()}  # type: ignore[union-attr]
    h, x = layer(torch.randn(3, 4), torch.randn(3, 3), Graph.complete([3]), torch.randn(3, 3))[:2]
    assert (h.shape, x.shape) == ((3, 4), (3, 3))


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"h": torch.randn(N, F + 1).double()}, ValueError, "h"),
        ({"h": torch.randn(N, F)}, TypeError, "x"),
        ({"h": torch.randn(N, F), "x": torch.randn(N, D)}, TypeError, "h"),
        ({"h": torch.ones(N, F, dtype=torch.int64)}, TypeError, "h"),
        ({"h": torch.randn(F).double()}, ValueError, "h"),
        ({"x": torch.randn(N + 1, D).double()}, ValueError, "x"),
        ({"v": torch.randn(N, D + 1).double()}, ValueError, "v"),
        ({"v": None}, ValueError, "v"),
        ({"graph": Graph.complete([N + 1])}, ValueError, "graph"),
        ({"graph": torch.tensor([[0, N], [1, 2]])}, IndexError, "edge_index"),
        ({"graph": torch.rand(2, E)}, TypeError, "edge_index"),
        ({"graph": "edges"}, TypeError, "edge_index"),
        ({"edge_attr": None}, ValueError, "edge_attr"),
        ({"edge_attr": torch.randn(E - 1, A).double()}, ValueError, "edge_attr"),
        ({"edge_attr": torch.randn(E, A + 1).double()}, ValueError, "edge_attr"),
        ({"node_attr": torch.randn(N, 1).double()}, ValueError, "node_attr"),
        ({"edge_mask": torch.ones(E + 1).double()}, ValueError, "edge_mask"),
        ({"node_mask": torch.ones(N - 1).double()}, ValueError, "node_mask"),
    ],
)
def test_wrong_inputs_are_named(
    backend: str, changed: dict[str, Any], error: type[Exception], named: str, data: Data
) -> None:
    network = EGNNVel(F, 16, n_layers=1, edge_attr_dim=A, backend=backend).double()
    given = {"h": data.h, "x": data.x, "graph": data.edges, "v": data.v}
    network(**given, edge_attr=data.edge_attr)
    with pytest.raises(error, match=rf"\b{named}\b"):
        network(**{**given, "edge_attr": data.edge_attr, **changed})


def test_other_activations_run_on_the_reference_with_one_warning(
    data: Data,
) -> None:

    class ShiftedSiLU(nn.SiLU):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z) + 1

    torch.manual_seed(1)
    layer = EGCL(F, F, 16, activation=ShiftedSiLU()).double()
    with pytest.warns(UserWarning, match="SiLU, ReLU and LeakyReLU"):
        h, _ = layer(data.h, data.x, data.edges)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(data.h, data.x, data.edges)
    assert fast.explain(layer, data.h, data.x).backend == "reference"
    # a subclass of SiLU is not SiLU
    torch.manual_seed(1)
    silu = EGCL(F, F, 16).double()
    assert not torch.allclose(h, silu(data.h, data.x, data.edges)[0])


def test_explain(data: Data) -> None:
    network: Any = EGNN(F, 16, 3, n_layers=1).double()
    said = egnn_fast.explain(nn.Sequential(nn.Linear(1, 1), network), data.h, data.x)
    assert said.backend == "cpu"
    assert said.instruction_set == egnn_fast.backends.instruction_set("cpu")
    with egnn_fast.use_backend("reference"):
        assert network.gcl_0.explain(data.h, data.x).backend == "reference"
    assert EGCL(F, F, 8, backend="reference").explain(data.h, data.x).backend == "reference"
    with pytest.raises(TypeError, match="Linear"):
        egnn_fast.explain(nn.Linear(1, 1), data.h, data.x)


def test_extra_repr_shows_what_differs() -> None:
    assert EGCL(4, 4, 8).extra_repr() == "4, 4, 8"
    layer = EGCLVel(
        4, 5, 8, edge_attr_dim=2, residual=False, attention=True, coord_norm="unit",
        coord_agg="sum", coord_clamp=100.0, carry_velocity=True, backend="cpu",
    )  # fmt: skip
    assert layer.extra_repr() == (
        "4, 5, 8, edge_attr_dim=2, residual=False, attention=True, coord_norm='unit', "
        "coord_agg='sum', coord_clamp=100.0, backend='cpu', carry_velocity=True"
    )
    assert layer.options == Options(
        attention=True, coord_norm="unit", coord_agg="sum", coord_clamp=100.0
    )

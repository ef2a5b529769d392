"""The modules' state: copies, pickles, dtypes, devices, reparametrised and replaced weights."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_inputs import BACKENDS, A, Data, F, N
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from egnn_fast import Graph
from egnn_fast.nn import EGCL, EGNN, EGNNVel


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data() -> Data:
    return Data()


class Model(nn.Module):
    """A user's module that holds its graph."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.graph = Graph.from_edge_index(edges, N)
        self.net = EGNN(F, 16, 3, n_layers=1).double()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent_and_equal(
    backend: str, copied: Callable[[nn.Module], nn.Module], data: Data
) -> None:
    network = EGNNVel(F, 16, 3, n_layers=2, edge_attr_dim=A, attention=True, coord_norm="unit",
                      coord_clamp=2.0, carry_velocity=True, backend=backend).double()  # fmt: skip
    arguments = (data.h, data.x, data.edges, data.v)
    before = network(*arguments, edge_attr=data.edge_attr)
    other = copied(network)
    for a, b in zip(before, other(*arguments, edge_attr=data.edge_attr), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for a, b in zip(before, other(*arguments, edge_attr=data.edge_attr), strict=True):
        assert torch.equal(a, b)


def test_graphs_can_be_copied_with_a_module(data: Data) -> None:
    model = Model(data.edges)
    expected = model.net(data.h, data.x, model.graph)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(expected, other.net(data.h, data.x, other.graph), strict=True):
            assert torch.equal(a, b)


def test_dtype_and_device_arguments(backend: str, data: Data) -> None:
    network = EGNN(F, 8, 3, n_layers=1, dtype=torch.float64, backend=backend)
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert network(data.h, data.x, data.edges)[0].dtype == torch.float64
    single = network.float()(data.h.float(), data.x.float(), data.edges)
    assert {t.dtype for t in single} == {torch.float32}
    for module in (EGNN(F, 8, 3, device="meta"), EGNNVel(F, 8, 3, device="meta")):
        assert {p.device.type for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize("how", ["parametrization", "weight_norm", "prune"])
def test_reparametrised_weights_are_honoured(how: str, backend: str, data: Data) -> None:
    layer = EGCL(F, F, 16, backend=backend).double()
    plain = copy.deepcopy(layer)
    linear: Any = layer.edge_mlp[2]
    if how == "parametrization":
        parametrizations.weight_norm(linear)
        trained = "edge_mlp.2.parametrizations.weight.original1"
    elif how == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but still in use
            nn.utils.weight_norm(linear)
        trained = "edge_mlp.2.weight_v"
    else:
        prune.random_unstructured(linear, "weight", amount=0.5)
        trained = "edge_mlp.2.weight_orig"
    for _ in range(2):
        # twice with a step between: a stale weight would show
        plain.get_parameter("edge_mlp.2.weight").data = (
            linear(torch.eye(16).double()).detach().T.sub(linear.bias.detach().unsqueeze(1))
        )
        layer.zero_grad()
        h, x = layer(data.h, data.x, data.edges)
        expected = plain(data.h, data.x, data.edges)
        torch.testing.assert_close((h, x), expected, rtol=1e-10, atol=1e-12)
        (h.sum() + x.sum()).backward()
        parameter = layer.get_parameter(trained)
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        with torch.no_grad():
            parameter.sub_(0.5 * parameter.grad)


def test_functional_call_replaces_the_weights(backend: str, data: Data) -> None:
    network = EGNN(F, 16, 3, n_layers=1, backend=backend).double()
    halved = {k: v.detach() / 2 for k, v in network.named_parameters()}
    got = torch.func.functional_call(network, halved, (data.h, data.x, data.edges))
    assert not torch.equal(got[0], network(data.h, data.x, data.edges)[0])
    network.load_state_dict(halved)
    for a, b in zip(got, network(data.h, data.x, data.edges), strict=True):
        assert torch.equal(a, b)

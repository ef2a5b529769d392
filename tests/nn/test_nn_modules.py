"""Layers whose submodules are not as they were built call them as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import kernel_calls
from changed_layers import CHANGES, LoRA, build, by_hand, inputs, lora, lora_everywhere
from nn_inputs import BACKENDS, A, Data, E, F, N
from torch import Tensor, nn

import egnn_fast
from egnn_fast import Graph, Options, functional
from egnn_fast import nn as fast
from egnn_fast.backends import decision
from egnn_fast.nn import EGCL, EGNN, EGNNVel

Change = Callable[[Any], None]
THROUGH_MODULES = "the layer runs through its modules in plain PyTorch"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"attention": True, "coord_norm": "unit", "coord_agg": "sum", "coord_scale": 0.5},
    {"coord_norm": 1.0, "coord_tanh": True, "coord_clamp": 0.05, "residual": False},
]
quiet = pytest.mark.filterwarnings(f"ignore:.*{THROUGH_MODULES}")


@pytest.fixture(params=(*BACKENDS, None))
def backend(request: pytest.FixtureRequest) -> str | None:
    name: str | None = request.param
    return name


@pytest.fixture
def data() -> Data:
    return Data()


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def gradients(outputs: Any, leaves: list[Tensor], order: int) -> list[Tensor]:
    """Gradients of the given order: each time, of the sum of squares of the last ones."""
    values = list(outputs)
    for k in range(order):
        loss = torch.stack([(t**2).sum() for t in values if t.requires_grad]).sum()
        found = torch.autograd.grad(loss, leaves, create_graph=k + 1 < order, allow_unused=True)
        values = [torch.zeros(()) if g is None else g for g in found]
    return values


@quiet
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("change", [c for c, _ in CHANGES], ids=lambda c: c.__name__)
def test_a_changed_layer_computes_what_its_modules_say(
    change: Change, options: dict[str, Any], backend: str | None, data: Data
) -> None:
    given = inputs(data)
    layer = build(backend=backend, **options)
    before = layer(graph=data.edges, **given)
    change(layer)
    with kernel_calls(forward=0, backward=0):
        found = layer(graph=data.edges, **given)
        expected = by_hand(layer, edges=data.edges, **given)
        close(found, expected)
        leaves = [*given.values(), *(p for p in layer.parameters() if p.requires_grad)]
        for order in (1, 2):
            close(gradients(found, leaves, order), gradients(expected, leaves, order))
            found = layer(graph=data.edges, **given)
            expected = by_hand(layer, edges=data.edges, **given)
    assert any(not torch.allclose(a, b) for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=lambda c: getattr(c, "__name__", ""))
def test_one_warning_names_the_module_and_the_cost(change: Change, named: str, data: Data) -> None:
    layer, given = build(), inputs(data)
    assert layer.explain(data.h, data.x).backend == "cpu"
    change(layer)
    said = f"^{named.replace('.', '[.]')}.*; {THROUGH_MODULES}.* slower, and with memory of size"
    with pytest.warns(UserWarning, match=said) as caught:
        layer(graph=data.edges, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(graph=data.edges, **given)
    assert len(caught) == 1
    told = layer.explain(data.h, data.x)
    assert told.backend == "reference"
    assert told.reason == str(caught[0].message)
    assert told.refused["cpu"] in told.reason
    # named backends do the same; a named reference needs no warning
    for name in ("cpu", "triton"):
        decision._warned.clear()
        with egnn_fast.use_backend(name):
            with pytest.warns(UserWarning, match=said):
                layer(graph=data.edges, **given)
            assert layer.explain(data.h, data.x).backend == "reference"
    with warnings.catch_warnings(), egnn_fast.use_backend("reference"):
        warnings.simplefilter("error")
        layer(graph=data.edges, **given)
        assert layer.explain(data.h, data.x).reason == told.reason


@quiet
def test_adapters_alone_train(backend: str | None, data: Data) -> None:
    network: Any = EGNN(F, 8, 3, n_layers=2, edge_attr_dim=A, backend=backend).double()
    network.requires_grad_(False)
    for k in range(2):
        lora_everywhere(network.get_submodule(f"gcl_{k}"))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"a", "b"}
    h, x = network(data.h, data.x, data.edges, edge_attr=data.edge_attr)
    (h.sum() + x.sum()).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0


@quiet
@pytest.mark.parametrize("coord_agg", ["mean", None])
def test_graphs_of_every_kind(coord_agg: str | None, backend: str | None, data: Data) -> None:
    layer = EGCL(F, F, 8, coord_agg=coord_agg, backend=backend).double()
    lora("edge_mlp", 2)(layer)
    complete = Graph.complete([5, N - 5])
    results = [
        layer(data.h, data.x, graph)
        for graph in (complete, complete.edge_index, tuple(complete.edge_index))
    ]
    for found in results[1:]:
        close(found, results[0])
    assert (results[0][1] is data.x) == (coord_agg is None)


@quiet
def test_a_slope_changed_later_is_used(backend: str | None, data: Data) -> None:
    layer = build(activation=nn.LeakyReLU(0.2), backend=backend)
    before = layer(graph=data.edges, **inputs(data))
    layer.edge_mlp[1].negative_slope = 0.5
    assert "negative_slope=0.5, not 0.2" in layer.explain(data.h, data.x).reason
    given = inputs(data)
    found = layer(graph=data.edges, **given)
    close(found, by_hand(layer, edges=data.edges, **given))
    assert not torch.allclose(found[0], before[0])


@quiet
def test_modules_win_over_options_set_later(backend: str | None, data: Data) -> None:
    given = inputs(data)
    layer = build(backend=backend)
    before = layer(graph=data.edges, **given)
    for options in (Options(coord_tanh=True), Options(activation="relu")):
        layer.options = options
        assert layer.explain(data.h, data.x).backend == "reference"
        close(layer(graph=data.edges, **given), before)


@pytest.mark.parametrize(
    ("options", "change", "named"),
    [
        ({"attention": True}, lambda m: delattr(m, "att_mlp"), "att_mlp: .* removed"),
        ({"attention": True}, lambda m: setattr(m, "att_mlp", None), "att_mlp: .* removed"),
        ({}, lambda m: setattr(m, "att_mlp", nn.Linear(8, 1)), "att_mlp: .* no use"),
        ({}, lambda m: delattr(m, "coord_mlp"), "coord_mlp: .* removed"),
        ({"coord_agg": None}, lambda m: setattr(m, "coord_mlp", nn.Linear(8, 1)), "coord_mlp: "),
        ({}, lambda m: delattr(m, "edge_mlp"), "edge_mlp: .* removed"),
        ({}, lambda m: delattr(m, "coord_mlp_vel"), "v: "),
        # outputs that would broadcast or be cut off
        ({}, lambda m: setattr(m, "coord_mlp", nn.Linear(8, 3).double()), r"coord_mlp: .*, 1\]"),
        ({}, lambda m: setattr(m, "node_mlp", nn.Linear(14, 1).double()), r"node_mlp: .*, 4\]"),
        ({}, lambda m: setattr(m, "edge_mlp", nn.Flatten(0)), "edge_mlp: .* any"),
        ({}, lambda m: m.edge_mlp.__setitem__(2, nn.Linear(8, 9).double()), "edge_w2: "),
    ],
)
@quiet
def test_a_layer_without_a_part_is_an_error(
    options: dict[str, Any], change: Change, named: str, backend: str | None, data: Data
) -> None:
    layer = build(backend=backend, **options)
    layer(graph=data.edges, **inputs(data))
    change(layer)
    with pytest.raises(ValueError, match=named):
        layer(graph=data.edges, **inputs(data))


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"h": torch.randn(N, F + 1).double()}, ValueError, "h"),
        ({"h": torch.randn(N, F), "x": torch.randn(N, 3)}, TypeError, "h"),
        ({"h": None}, TypeError, "h"),
        ({"x": torch.randn(N + 1, 3).double()}, ValueError, "x"),
        ({"v": None}, ValueError, "v"),
        ({"v": torch.randn(N, 2).double()}, ValueError, "v"),
        ({"graph": Graph.complete([N + 1])}, ValueError, "graph"),
        ({"edge_attr": None}, ValueError, "edge_attr"),
        ({"edge_attr": torch.randn(E, A + 1).double()}, ValueError, "edge_attr"),
        ({"node_attr": None}, ValueError, "node_attr"),
        ({"node_attr": torch.randn(N, 1).double()}, ValueError, "node_attr"),
        ({"edge_mask": torch.ones(E + 1).double()}, ValueError, "edge_mask"),
        ({"node_mask": torch.ones(N - 1).double()}, ValueError, "node_mask"),
    ],
)
@quiet
def test_wrong_inputs_are_named(
    changed: dict[str, Any], error: type[Exception], named: str, data: Data
) -> None:
    layer = build()
    lora("edge_mlp", 0)(layer)
    given = {"graph": data.edges, **inputs(data)}
    layer(**given)
    with pytest.raises(error, match=rf"^{named}: "):
        layer(**{**given, **changed})


def test_weights_of_a_changed_layer_are_refused() -> None:
    layer: Any = EGCL(F, F, 8)
    weights = layer.weights()
    layer.edge_mlp[1] = nn.Tanh()  # egcl takes an activation beside the weights
    assert all(a is b for a, b in zip(layer.weights(), weights, strict=True))
    lora("node_mlp", 0)(layer)
    with pytest.raises(ValueError, match=r"node_mlp\.0 is a LoRA"):
        layer.weights()


def test_explain_finds_the_changed_layer_of_a_network(data: Data) -> None:
    network: Any = EGNNVel(F, 8, n_layers=3).double()
    assert fast.explain(network, data.h, data.x).backend == "cpu"
    lora("edge_mlp", 2)(network.gcl_1)
    told = egnn_fast.explain(nn.Sequential(network), data.h, data.x)
    assert told.backend == "reference"
    assert told.reason.startswith("0.gcl_1.edge_mlp.2 is a LoRA")


@quiet
def test_hooks_see_what_passes(data: Data) -> None:
    layer: Any = EGCL(F, F, 8).double()
    seen: dict[str, list[torch.Size]] = {"forward": [], "backward": []}
    handles = [
        layer.edge_mlp[2].register_forward_hook(
            lambda module, args, out: seen["forward"].append(out.shape)
        ),
        layer.coord_mlp[0].register_full_backward_hook(
            lambda module, into, out: seen["backward"].append(out[0].shape)
        ),
    ]
    _, x = layer(data.h, data.x, data.edges)
    x.sum().backward()
    assert seen == {"forward": [(E, 8)], "backward": [(E, 8)]}
    for handle in handles:
        handle.remove()
    with kernel_calls(forward=1, backward=0):
        layer(data.h, data.x, data.edges)


@quiet
def test_quantised_networks(data: Data) -> None:
    network = EGNN(F, 16, 3, n_layers=2, edge_attr_dim=A)
    given = (data.h.float(), data.x.float(), data.edges, data.edge_attr.float())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)
    plain = network(*given[:3], edge_attr=given[3])
    said = quantised.gcl_0.explain(torch.randn(N, 16), given[1]).reason
    assert said.startswith("edge_mlp.0 is a torch.ao.nn.quantized.dynamic.modules.linear.Linear, ")
    found = quantised(*given[:3], edge_attr=given[3])
    assert not torch.equal(found[0], plain[0])
    h, (row, col) = quantised.embedding_in(given[0]), given[2]
    x = given[1]
    for layer in (quantised.gcl_0, quantised.gcl_1):  # eqs. 3 to 6
        d = x[row] - x[col]
        r = d.square().sum(1, keepdim=True)
        m = layer.edge_mlp(torch.cat((h[row], h[col], r, given[3]), 1))
        total = torch.zeros(N, 16).index_add(0, row, m)
        shift = torch.zeros(N, 3).index_add(0, row, d * layer.coord_mlp(m))
        x = x + shift / torch.bincount(row, minlength=N).clamp(min=1).unsqueeze(1)
        h = h + layer.node_mlp(torch.cat((h, total), 1))
    # 8 bits: where a sum rounds otherwise, a product's operands may move by a step
    for a, b in zip(found, (quantised.embedding_out(h), x), strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()
    with pytest.raises(ValueError, match=r"^h: expected \[N, 4\]"):
        quantised(torch.randn(N, F + 1), *given[1:3], edge_attr=given[3])


@quiet
def test_coordinates_keep_their_precision_under_autocast(data: Data) -> None:
    layer = EGCL(F, F, 8)
    h, x = data.h.float(), data.x.float() + 100
    before = layer(h, x, data.edges)
    lora("node_mlp", 0)(layer)
    with torch.autocast("cpu", torch.bfloat16):
        _, new_x = layer(h, x, data.edges)
    assert new_x.dtype == torch.float32
    torch.testing.assert_close(new_x, before[1], rtol=0, atol=1e-3)


def test_a_lora_of_zero_changes_nothing(data: Data) -> None:
    """Submodules and kernel agree where they compute the same."""
    layer: Any = EGCL(F, F, 8).double()
    fused = layer(data.h, data.x, data.edges)
    weights, options = layer.weights(), layer.options
    lora("edge_mlp", 0)(layer)
    assert isinstance(layer.edge_mlp[0], LoRA)
    with torch.no_grad():
        layer.edge_mlp[0].b.zero_()
    with pytest.warns(UserWarning, match=THROUGH_MODULES):
        found = layer(data.h, data.x, data.edges)
    close(found, fused)
    plain = functional.egcl(data.h, data.x, data.edges, weights, options, backend="reference")
    close(found, plain[:2])

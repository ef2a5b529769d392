"""Layers whose submodules are as they were built run fused; changed layers in transforms."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import kernel_calls
from changed_layers import appended, build, by_hand, hook, inputs, layer_norm, lora, patched_forward
from nn_inputs import A, Data, F, N
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from egnn_fast import compat
from egnn_fast.nn import EGCL, EGNN, EGCLVel

Change = Callable[[Any], None]
quiet = pytest.mark.filterwarnings("ignore:.*the layer runs through its modules")


@pytest.fixture
def data() -> Data:
    return Data()


@contextmanager
def fused(calls: int = 1) -> Iterator[None]:
    """Assert that the kernel runs, without a warning."""
    with warnings.catch_warnings(), kernel_calls(forward=calls, backward=0):
        warnings.simplefilter("error")
        yield


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def replicated(module: nn.Module) -> Any:
    """As DataParallel's replicas are: weights as plain attributes, not parameters."""
    replicate: Any = module._replicate_for_data_parallel
    replica = replicate()
    for key, child in module._modules.items():
        replica._modules[key] = None if child is None else replicated(child)
    for key, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[key] = None
        else:
            setattr(replica, key, parameter * 1)
    return replica


COPIES = [
    copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved, replicated,
    lambda m: m.share_memory(), lambda m: m.to("cpu").train(),
]  # fmt: skip
NAMES = ["deepcopy", "copy", "pickle", "save", "replicate", "share_memory", "to"]


def nothing(layer: nn.Module) -> None:
    pass


def new_activation(layer: Any) -> None:
    layer.node_mlp[1] = nn.SiLU()


def new_linear(layer: Any) -> None:
    layer.edge_mlp[2] = nn.Linear(8, 8).double()


def inherited_forward(layer: Any) -> None:
    class Named(nn.Linear):
        pass

    layer.edge_mlp[0].__class__ = Named


def unknown_part(layer: Any) -> None:
    layer.dropout = nn.Dropout(0.5)


def state_dict_hook(layer: Any) -> None:
    layer.edge_mlp[0].register_state_dict_pre_hook(lambda *args: None)


def parametrised(layer: Any) -> None:
    parametrizations.weight_norm(layer.edge_mlp[2])


def pruned(layer: Any) -> None:
    prune.l1_unstructured(layer.coord_mlp[0], "weight", amount=0.5)


def spectral(layer: Any) -> None:
    nn.utils.spectral_norm(layer.eval().node_mlp[0])


KEPT = [
    nothing, new_activation, new_linear, inherited_forward, unknown_part, state_dict_hook,
    parametrised, pruned, spectral,
]  # fmt: skip


@pytest.mark.parametrize("change", KEPT, ids=lambda c: c.__name__)
def test_what_leaves_the_modules_in_place_runs_fused(change: Change, data: Data) -> None:
    layer, given = build(attention=True, coord_tanh=True), inputs(data)
    change(layer)
    with fused():
        found = layer(graph=data.edges, **given)
    assert layer.explain(data.h, data.x).backend == "cpu"
    for a, b in zip(found, by_hand(layer, edges=data.edges, **given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("other", COPIES, ids=NAMES)
def test_copies_run_fused(other: Callable[[Any], Any], data: Data) -> None:
    layer, given = build(activation=nn.LeakyReLU(0.3), attention=True), inputs(data)
    expected = layer(graph=data.edges, **given)
    copied = other(layer)
    with fused():
        found = copied(graph=data.edges, **given)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@quiet
@pytest.mark.parametrize("other", COPIES[:3] + COPIES[4:], ids=NAMES[:3] + NAMES[4:])
def test_copies_of_changed_layers(other: Callable[[Any], Any], data: Data) -> None:
    layer, given = build(), inputs(data)
    lora("edge_mlp", 0)(layer)
    appended(layer)
    copied = other(layer)
    for a, b in zip(
        copied(graph=data.edges, **given), layer(graph=data.edges, **given), strict=True
    ):
        assert torch.equal(a, b)


def test_a_pickle_of_an_older_version_loads(data: Data) -> None:
    layer = EGCL(F, F, 8).double()
    expected = layer(data.h, data.x, data.edges)
    layer.__dict__["_is_fused"] = True  # an attribute that layers once had
    with fused():
        found = pickle.loads(pickle.dumps(layer))(data.h, data.x, data.edges)
    assert torch.equal(found[0], expected[0])


@quiet
def test_compiled_submodules(data: Data) -> None:
    given = inputs(data)
    for compiled in (
        lambda m: setattr(m, "edge_mlp", torch.compile(m.edge_mlp, backend="eager")),
        lambda m: m.node_mlp[0].compile(backend="eager"),
    ):
        layer = build()
        expected = by_hand(layer, edges=data.edges, **given)
        compiled(layer)
        with kernel_calls(forward=0, backward=0):
            found = layer(graph=data.edges, **given)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@quiet
def test_lazy_linears_run_fused_once_filled(data: Data) -> None:
    layer: Any = EGCL(F, F, 8).double()
    layer.edge_mlp[0] = nn.LazyLinear(8, dtype=torch.float64)
    expected = layer(data.h, data.x, data.edges)
    assert type(layer.edge_mlp[0]) is nn.Linear
    with fused():
        found = layer(data.h, data.x, data.edges)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


CHANGES_TO_TRACE = [lora("edge_mlp", 0), layer_norm, hook, patched_forward]


@quiet
@pytest.mark.parametrize("change", CHANGES_TO_TRACE, ids=["lora", "norm", "hook", "forward"])
def test_changed_layers_compile_to_one_graph(change: Change, data: Data) -> None:
    torch._dynamo.reset()
    layer, given = build(attention=True), inputs(data)
    change(layer)
    expected = by_hand(layer, edges=data.edges, **given)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(graph=data.edges, **given)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    grads = [
        torch.autograd.grad(torch.stack([(t**2).sum() for t in out]).sum(), leaves)
        for out in (found, expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_change_after_compilation_is_noticed(data: Data) -> None:
    torch._dynamo.reset()
    layer = EGCL(F, F, 8).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    before = compiled(data.h, data.x, data.edges)[0]
    lora("edge_mlp", 2)(layer)
    with pytest.warns(UserWarning, match="edge_mlp.2 is a LoRA"):
        expected = layer(data.h, data.x, data.edges)[0]
    torch.testing.assert_close(compiled(data.h, data.x, data.edges)[0], expected)
    assert not torch.allclose(expected, before)


@quiet
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", [nothing, lora("edge_mlp", 0), layer_norm])
def test_export(change: Change, strict: bool, data: Data) -> None:
    network: Any = EGNN(F, 8, 3, n_layers=2, edge_attr_dim=A).double().eval().requires_grad_(False)
    change(network.gcl_0)
    given = ((data.h, data.x, data.edges), {"edge_attr": data.edge_attr})
    program = torch.export.export(network, *given, strict=strict)
    found, expected = program.module()(*given[0], **given[1]), network(*given[0], **given[1])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@quiet
def test_functional_call_and_vmap_of_changed_layers(data: Data) -> None:
    layers = [EGCL(F, F, 8).double() for _ in range(3)]
    for layer in layers:
        lora("edge_mlp", 0)(layer)
    params, buffers = torch.func.stack_module_state(layers)

    def run(p: dict[str, Tensor], b: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(layers[0], (p, b), (data.h, data.x, data.edges))

    for k, layer in enumerate(layers):
        own = {name: p[k] for name, p in params.items()}
        for a, b in zip(run(own, {}), layer(data.h, data.x, data.edges), strict=True):
            torch.testing.assert_close(a, b)
    stacked = torch.func.vmap(run)(params, buffers)[0]
    expected = torch.stack([layer(data.h, data.x, data.edges)[0] for layer in layers])
    torch.testing.assert_close(stacked, expected)


@quiet
def test_official_layers(data: Data) -> None:
    edge_mask = torch.rand(data.edges.shape[1], 1).double()
    layers: list[tuple[Any, Callable[[Any], Any]]] = [
        (compat.egnn_clean.E_GCL(F, F, 8, normalize=True, attention=True), lambda m: m(
            data.h, data.edges, data.x)),
        (compat.gcl.E_GCL(F, F, 8, norm_diff=True, tanh=True), lambda m: m(
            data.h, data.edges, data.x)),
        (compat.gcl.E_GCL_vel(F, F, 8), lambda m: m(data.h, data.edges, data.x, data.v)),
        (compat.qm9.E_GCL_mask(F, F, 8, attention=True), lambda m: m(
            data.h, data.edges, data.x, None, edge_mask)),
    ]  # fmt: skip
    for layer, call in layers:
        layer.double()
        fused_result = call(layer)
        lora("node_mlp", 0)(layer)
        adapter = layer.node_mlp[0]
        h, x, _ = call(layer)
        assert not torch.allclose(h, fused_result[0])
        torch.testing.assert_close(x, fused_result[1])
        # the adapter's weight, merged, runs fused
        with torch.no_grad():
            merged = adapter.base_layer
            merged.weight += adapter.b @ adapter.a
        layer.node_mlp[0] = merged
        with kernel_calls(forward=1, backward=0):
            torch.testing.assert_close(call(layer)[0], h)


def test_layers_as_others_wrap_them(data: Data) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    layer = EGCLVel(F, F, 8).double()
    with fused():
        expected = layer(data.h, data.x, data.edges, data.v)
        seen: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with fused():  # a hook of the layer itself is about the layer as a whole
        found = Wrapper(layer)(data.h, data.x, data.edges, data.v)
    handle.remove()
    assert seen == [found]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert data.h.shape == (N, F)

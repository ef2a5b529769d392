"""The records that the kernels read: made only of tensors that fit each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from ways import leaves_of, total

from egnn_fast import Graph, Options, functional, nn
from egnn_fast.backends import cpu
from egnn_fast.checks.cases import Case
from egnn_fast.operators.signature import encode_options
from egnn_fast.runtime import native
from egnn_fast.weights import LayerWeights

N, E, F, H, O, D, A, B = 7, 20, 4, 8, 5, 3, 2, 1  # noqa: E741 (the widths' names)
LAYER = {
    "h": (N, F), "x": (N, D), "v": (N, D), "edge_attr": (E, A), "edge_mask": (E,),
    "node_attr": (N, B), "coord_weight": (N,),
    "edge_w1": (H, 2 * F + 1 + A), "edge_b1": (H,), "edge_w2": (H, H), "edge_b2": (H,),
    "node_w1": (H, F + H + B), "node_b1": (H,), "node_w2": (O, H), "node_b2": (O,),
    "att_w": (1, H), "att_b": (1,), "coord_w1": (H, H), "coord_b1": (H,), "coord_w2": (1, H),
    "vel_w1": (H, F), "vel_b1": (H,), "vel_w2": (1, H), "vel_b2": (1,),
}  # fmt: skip
MESSAGES = {
    "pq": (N, 2 * H), "x": (N, D), "edge_attr": (E, A), "edge_mask": (E,), "w_r": (H,),
    "w_a": (H, A), "w2": (H, H), "b2": (H,), "w_g": (H,), "b_g": (1,), "w3": (H, H), "b3": (H,),
    "w_x": (H,),
}  # fmt: skip
GRAPH = {"rowptr": (N + 1,), "senders": (E,), "perm": (E,), "first": None}
OPTIONS = encode_options(Options())
OPTIONS_IN_CPP = (0, *OPTIONS[1:], 1.0, False, False)
KERNELS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "layer": (cpu.LayerKernel((*OPTIONS, 1.0, False, False)), LAYER),
    "messages": (cpu.MessagesKernel(OPTIONS), MESSAGES),
}
PLACES = [(kernel, name) for kernel, (_, shapes) in KERNELS.items() for name in (*shapes, *GRAPH)]
# may be left out alone
OPTIONAL = {"edge_mask", "coord_weight", "perm", "first"}


def tensors_of(kernel: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    graph = Graph.from_edge_index(torch.randint(N, (2, E)), N)
    assert graph.perm is not None, "drawn in receiver order"
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in KERNELS[kernel][1].items()}
    return {**tensors, **{name: getattr(graph, name) for name in GRAPH}}


def record(kernel: str, tensors: dict[str, Tensor | None]) -> Any:
    return KERNELS[kernel][0].record(tuple(tensors.values()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_fits_has_a_record(kernel: str, dtype: torch.dtype) -> None:
    tensors = tensors_of(kernel, dtype)
    assert record(kernel, tensors) is not None
    for name in OPTIONAL & tensors.keys():
        assert record(kernel, {**tensors, name: None}) is not None
    parameters = {k: t if t is None or not t.is_floating_point() else torch.nn.Parameter(t)
                  for k, t in tensors.items()}  # fmt: skip
    assert record(kernel, parameters) is not None
    half = {k: None if t is None else t.half() if t.is_floating_point() else t
            for k, t in tensors.items()}  # fmt: skip
    assert record(kernel, half) is None


def more_rows(t: Tensor) -> Tensor:
    return torch.cat((t, t[-1:]))


def more_columns(t: Tensor) -> Tensor:
    return torch.cat((t, t[..., -1:]), dim=-1)


def another_dtype(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.int() if t.dtype == torch.int64 else t.long()


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "row": more_rows,
    "column": more_columns,
    "dimension": lambda t: t.unsqueeze(0),
    "dtype": another_dtype,
    "int dtype": lambda t: t.short(),
    "device": lambda t: t.to("meta"),
    "strides": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "layout": lambda t: t.to_sparse(),
    "freed": freed,
    "list": lambda t: t.tolist(),
}


def fits_all_the_same(kernel: str, name: str, what: str) -> bool:
    """Whether a tensor that is wrong in this way is right after all."""
    shape = {**KERNELS[kernel][1], **GRAPH, "first": (N,)}[name]
    assert shape is not None
    return (
        # a row of these is compared with the edges by the core, which says so
        (what == "row" and name in ("edge_attr", "edge_mask"))
        or (what == "column" and name == "edge_mask")
        # another number of coordinates
        or (what == "column" and (kernel, name) == ("messages", "x"))
        # read by the distance between its elements, or rows
        or (what in ("strides", "expanded") and name == "w_r")
        or (what == "expanded" and (name == "w_a" or shape[0] == 1))
        or (what == "strides" and shape == (1,))
    )


@pytest.mark.parametrize(
    ("kernel", "name", "what"),
    [
        (kernel, name, what)
        for kernel, name in PLACES
        for what in WRONG
        if not fits_all_the_same(kernel, name, what)
    ],
)
def test_what_does_not_fit_has_none(kernel: str, name: str, what: str) -> None:
    tensors = tensors_of(kernel)
    t = torch.zeros(N, dtype=torch.int32) if name == "first" else tensors[name]
    assert t is not None
    assert record(kernel, {**tensors, name: t}) is not None
    assert record(kernel, {**tensors, name: WRONG[what](t)}) is None


@pytest.mark.parametrize(("kernel", "name"), PLACES)
def test_what_is_missing_has_none(kernel: str, name: str) -> None:
    tensors = {**tensors_of(kernel), name: None}
    if name in OPTIONAL:
        assert record(kernel, tensors) is not None
    else:
        assert record(kernel, tensors) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_coordinates_have_none(kernel: str) -> None:
    tensors = tensors_of(kernel)
    x = tensors["x"]
    assert x is not None
    assert record(kernel, {**tensors, "x": x[:, :0].contiguous()}) is None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("edges", [E - 1, E + 1, -1])
def test_another_number_of_edges_than_senders_has_none(kernel: str, edges: int) -> None:
    tensors = tensors_of(kernel)
    rowptr = tensors["rowptr"]
    assert rowptr is not None
    rowptr[-1] = edges
    assert record(kernel, tensors) is None


PLAIN: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.ones(3),
    "strided": lambda: torch.ones(3, 4).T,
    "expanded": lambda: torch.ones(1).expand(3),
    "no elements": lambda: torch.ones(0),
    "integers": lambda: torch.ones(3, dtype=torch.int32),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "an inference tensor": torch.inference_mode()(lambda: torch.ones(3)),
    "None": lambda: None,
}
NOT_PLAIN: dict[str, Callable[[], Any]] = {
    "a subclass": lambda: torch.ones(3).as_subclass(type("Sub", (Tensor,), {})),
    "a parameter's subclass": lambda: torch.nn.UninitializedParameter(),
    "negated": lambda: torch._neg_view(torch.ones(3)),
    "a lazy zero": lambda: torch._efficientzerotensor((3,)),
    "freed": lambda: freed(torch.ones(3)),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "a number": lambda: 3.0,
    "a list": lambda: [1.0],
}


@pytest.mark.parametrize("name", [*PLAIN, *NOT_PLAIN])
def test_plain_tensors(name: str) -> None:
    assert native.core is not None
    made = (PLAIN | NOT_PLAIN)[name]()
    for tensors in ((made,), [torch.ones(2), None, made]):
        assert native.core.are_plain(tensors) is (name in PLAIN)


def test_other_than_tensors_are_refused() -> None:
    assert native.core is not None
    with pytest.raises(TypeError):
        native.core.are_plain(3)
    with pytest.raises(ValueError, match=f"{len(OPTIONS_IN_CPP)} options, got 5"):
        native.core.layer_record(tuple(tensors_of("layer").values()), 1, OPTIONS_IN_CPP[:5])
    with pytest.raises(ValueError, match="28 tensors"):
        native.core.layer_record((torch.ones(3),), 1, OPTIONS_IN_CPP)


def test_cotangents_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    core = native.core
    assert core is not None
    tensors = tensors_of("layer")
    made = record("layer", tensors)
    inputs = [t for t in list(tensors.values())[:24] if t is not None]
    gradients = [torch.full_like(t, 0.123) for t in inputs]
    g_h, g_x, m, shift = (torch.ones(N, width) for width in (O, D, H, D))
    right = [g_h, g_x, None, m, shift]
    for k, other in ((0, g_x), (1, g_h), (3, None), (4, None), (0, g_h.double())):
        given = [*right[:k], other, *right[k + 1 :]]
        assert not core.layer_backward(made, given, 0, 0, gradients)
    assert all(torch.equal(g, torch.full_like(g, 0.123)) for g in gradients)
    assert core.layer_backward(made, right, 0, 0, gradients)
    assert not any(torch.equal(g, torch.full_like(g, 0.123)) for g in gradients)


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_activations_of_another_size_are_not_read(size: int) -> None:
    problem = Case("activations", nodes=20, edges=60).layer(torch.float32)
    leaves = leaves_of(problem)
    right = torch.autograd.grad(total(problem.run(leaves, "cpu", 0)), list(leaves.values()))

    def unpack(t: Tensor) -> Tensor:
        return torch.full((size,), torch.nan).resize_(0) if t.shape == (0,) else t

    with saved_tensors_hooks(lambda t: t, unpack):
        value = total(problem.run(leaves, "cpu", 0))
        found = torch.autograd.grad(value, list(leaves.values()))
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("name", LayerWeights._fields)
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("agg", ["mean", None])
def test_weights_that_the_options_have_no_use_for_are_named(
    name: str, attention: bool, agg: str | None
) -> None:
    """And those that are missing: presence alone decides what the kernel computes."""
    given = {k: t for k, t in tensors_of("layer").items() if k in LAYER and t is not None}
    every = dict(zip(LayerWeights._fields, list(given.values())[7:], strict=True))
    graph = Graph.complete([N])
    options = Options(attention=attention, coord_agg=agg)
    unused = (() if attention else ("att_",)) + (() if agg else ("coord_",))
    fitting = {k: t for k, t in every.items() if not k.startswith(unused)}
    attr = torch.randn(graph.num_edges, A)

    def run(weights: dict[str, Tensor]) -> Any:
        every_field: dict[str, Any] = {**dict.fromkeys(every), **weights}
        return functional.egcl(
            given["h"], given["x"], graph, LayerWeights(**every_field), options, v=given["v"],
            edge_attr=attr, node_attr=given["node_attr"], residual=False,
        )  # fmt: skip

    run(fitting)
    changed = {k: t for k, t in fitting.items() if k != name} | {
        k: t for k, t in every.items() if k == name and k not in fitting
    }
    # vel_w1 says whether there is a velocity MLP: without it the others are too many
    match = r"weights\.vel_" if name == "vel_w1" else rf"weights\.{name}"
    with pytest.raises((TypeError, ValueError), match=match):
        run(changed)


def test_a_wrong_argument_is_named_before_it_is_copied() -> None:
    """It is expanded from a few numbers: a dense copy would not fit into memory."""
    layer, graph = nn.EGCL(F, F, H), Graph.complete([N])
    huge = torch.zeros(1, D).expand(10**12, D)
    with pytest.raises(ValueError, match=f"x: expected {N} rows as h has"):
        layer(torch.randn(N, F), huge, graph)


@pytest.mark.parametrize("when", ["forward", "no_grad", "backward"])
def test_freed_memory_of_a_strided_input_raises(when: str) -> None:
    layer, graph = nn.EGCL(F, F, H), Graph.complete([N])
    h, x = torch.randn(F, N).T.requires_grad_(), torch.randn(N, D)
    if when != "backward":
        freed(h.detach())
        recorded = torch.set_grad_enabled(when == "forward")
        with recorded, pytest.raises(ValueError, match="was its storage freed"):
            layer(h, x, graph)
        return
    value = layer(h, x, graph)[0].sum()
    freed(h.detach())
    with pytest.raises(ValueError, match="was its storage freed"):
        value.backward()


@pytest.mark.parametrize(
    ("name", "replace"),
    [("h", lambda t: more_columns(t)), ("edge_attr", lambda t: t[:, :1].clone())],
)
def test_what_was_replaced_before_the_backward_is_named(
    name: str, replace: Callable[[Tensor], Tensor]
) -> None:
    graph = Graph.complete([N])
    given = {"h": torch.randn(N, F).requires_grad_(), "edge_attr": torch.randn(N * (N - 1), A)}
    layer = nn.EGCL(F, F, H, edge_attr_dim=A)
    value = layer(given["h"], torch.randn(N, D), graph, edge_attr=given["edge_attr"])[0].sum()
    given[name].data = replace(given[name].detach())
    with pytest.raises(ValueError, match=f"{name}: expected"):
        value.backward()


ANOTHER_VERSION = """
import egnn_fast._core as core
names = core.signatures()
part = names[{operator!r}][{part!r}]
part[-2:] = {names}
core.signatures = lambda: names
import torch
import egnn_fast.backends.cpu
from egnn_fast import nn, Graph
print(egnn_fast.info()[1].reason)
layer, graph = nn.EGCL(4, 4, 4), Graph.complete([3])
print(nn.explain(layer, torch.randn(3, 4), torch.randn(3, 3)).backend)
layer(torch.randn(3, 4), torch.randn(3, 3), graph)
"""


def output_of(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
        timeout=300,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("operator", "part", "names"),
    [
        ("messages", "inputs", "reversed(part[-2:])"),
        ("messages", "shapes", "['H', 'H, H']"),
        ("messages", "options", "reversed(part[-2:])"),
        ("layer", "inputs", "reversed(part[-2:])"),
        ("layer", "cotangents", "reversed(part[-2:])"),
        ("layer", "constants", "['shift']"),
        ("layer", "activations", "reversed(part[-2:])"),
    ],
)
def test_an_extension_with_other_names_is_not_used(operator: str, part: str, names: str) -> None:
    code = ANOTHER_VERSION.format(operator=operator, part=part, names=names)
    reason, backend = output_of(code)
    assert "built from another version of egnn_fast; build it again" in reason
    assert f"({part} of egnn_fast::{operator}: " in reason
    assert backend == "reference"


def test_an_extension_without_names_is_not_used() -> None:
    lines = ANOTHER_VERSION.splitlines(keepends=True)
    reason, backend = output_of("".join([lines[1], "del core.signatures\n", *lines[6:]]))
    assert "built from another version" in reason
    assert backend == "reference"


OLD = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None
import egnn_fast
from egnn_fast import nn, Graph
print(egnn_fast.info()[1].reason)
layer, graph = nn.EGCL(4, 4, 4), Graph.complete([3])
print(layer(torch.randn(3, 4), torch.randn(3, 3), graph)[0].shape)
print(nn.explain(layer, torch.randn(3, 4), torch.randn(3, 3)).backend)
"""


def test_without_the_exchange_api_the_reference_runs() -> None:
    reason, shape, backend = output_of(OLD)
    assert "cannot read the tensors of PyTorch" in reason
    assert "exchange API" in reason
    assert (shape, backend) == ("torch.Size([3, 4])", "reference")

"""Bad input is named before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, FUSED_BACKENDS, kernel_calls
from torch import Tensor

from egnn_fast import BackendError, Graph, Options, functional
from egnn_fast.checks.cases import Case
from egnn_fast.weights import EdgeWeights, LayerWeights

pytestmark = pytest.mark.native
BACKENDS = (*FUSED_BACKENDS, "reference")
OPTIONS = Options(attention=True)
# N = 6, E = 14, H = 5, F = 3, D = 3, A = 2, B = 1
CASE = Case(
    "errors", nodes=6, edges=14, hidden=5, attrs=2, mask="soft", features=3, options=OPTIONS,
    velocity=True, node_attrs=1, node_mask=True,
)  # fmt: skip
EDGES = CASE.edge_index()


def layer_arguments() -> dict[str, Any]:
    leaves = CASE.layer(torch.float32).leaves
    names = LayerWeights._fields
    weights = LayerWeights(**{k: t for k, t in leaves.items() if k in names})
    rest = {k: t for k, t in leaves.items() if k not in names}
    return {**rest, "graph": CASE.build_graph(), "weights": weights, "options": OPTIONS}


def edge_pass_arguments() -> dict[str, Any]:
    leaves = CASE.edge_pass(torch.float32).leaves
    names = EdgeWeights._fields
    weights = EdgeWeights(**{k: t for k, t in leaves.items() if k in names})
    rest = {k: t for k, t in leaves.items() if k not in names}
    return {**rest, "graph": CASE.build_graph(), "weights": weights, "options": OPTIONS}


def test_the_arguments_are_right_to_begin_with() -> None:
    with kernel_calls(forward=2, backward=0):
        functional.egcl(**layer_arguments(), backend="cpu")
        functional.egcl_messages(**edge_pass_arguments(), backend="cpu")


Change = Callable[[Tensor], Any]
# what is done to a tensor argument, the error, and what its message says
WRONG_TENSORS: dict[str, tuple[Change, type[Exception], str]] = {
    "no tensor": (lambda t: t.tolist(), TypeError, "expected a tensor, got list"),
    "integers": (lambda t: t.int(), TypeError, "expected a floating-point tensor, got torch.int32"),
    "rank 3": (lambda t: t.reshape(1, 1, -1), ValueError, "expected"),
    "rank 0": (lambda t: t.sum(), ValueError, "expected"),
    "a row too few": (lambda t: t[:-1], ValueError, "expected"),
    "a row too many": (lambda t: torch.cat((t, t[:1])), ValueError, "expected"),
    "no rows": (lambda t: t[:0], ValueError, "expected"),
    "float64": (lambda t: t.double(), TypeError, "expected dtype torch.float32"),
    "bfloat16": (lambda t: t.bfloat16(), TypeError, "expected dtype torch.float32"),
    "meta device": (lambda t: t.to("meta"), ValueError, "expected device cpu"),
}
LAYER_TENSORS = ("x", "v", "edge_attr", "node_attr", "edge_mask", "node_mask")
EDGE_PASS_TENSORS = ("Q", "x", "edge_attr", "edge_mask")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
@pytest.mark.parametrize("name", LAYER_TENSORS)
def test_layer_tensor(name: str, wrong: str, backend: str) -> None:
    check_tensor(functional.egcl, layer_arguments(), name, wrong, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
@pytest.mark.parametrize("name", EDGE_PASS_TENSORS)
def test_edge_pass_tensor(name: str, wrong: str, backend: str) -> None:
    check_tensor(functional.egcl_messages, edge_pass_arguments(), name, wrong, backend)


def check_tensor(
    call: Callable[..., Any], arguments: dict[str, Any], name: str, wrong: str, backend: str
) -> None:
    change, error, message = WRONG_TENSORS[wrong]
    arguments[name] = change(arguments[name])
    with kernel_calls(forward=0, backward=0), pytest.raises(error, match=f"^{name}: .*{message}"):
        call(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h: h.tolist(), TypeError, "^h: expected a tensor, got list"),
        (lambda h: h.long(), TypeError, "^h: expected a floating-point tensor, got torch.int64"),
        (lambda h: h[0], ValueError, "^h: expected 2 dimensions, got shape"),
        (lambda h: h[:, :2], ValueError, "^h and node_attr: expected 4 features together"),
        (lambda h: torch.cat((h, h), 1), ValueError, "^h: has 6 features"),
        (lambda h: h[:4], ValueError, "^x: expected 4 rows as h has, got 6"),
        (lambda h: h.double(), TypeError, "^x: expected dtype torch.float64 as h has"),
        (lambda h: h.to("meta"), ValueError, "^x: expected device meta as h has, got cpu"),
    ],
)
def test_h(change: Change, error: type[Exception], message: str, backend: str) -> None:
    arguments = layer_arguments()
    arguments["h"] = change(arguments["h"])
    with kernel_calls(forward=0, backward=0), pytest.raises(error, match=message):
        functional.egcl(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[:, :0], r"^x: expected \[N, D\] with D >= 1"),
        ("v", lambda t: t[:, :2], r"^v: expected shape \[6, 3\], got \[6, 2\]"),
        ("v", lambda t: None, "^v: needed exactly where the weights have a velocity MLP"),
        ("edge_attr", lambda t: t[:, :1], r"^edge_attr: expected \[E, 2\], got \[14, 1\]"),
        ("edge_attr", lambda t: None, r"^edge_attr: expected \[E, 2\], got None"),
        ("edge_attr", lambda t: t[:, 0], "^edge_attr: expected 2 dimensions"),
        ("node_attr", lambda t: None, "^h and node_attr: expected 4 features together"),
        ("node_attr", lambda t: torch.cat((t, t), 1), "^h and node_attr: expected 4 features"),
        ("edge_mask", lambda t: t.expand(2, -1).T, r"^edge_mask: expected shape \[E\]"),
        ("edge_mask", lambda t: t[:-1].bool(), "^edge_mask: expected a row for each of the 14"),
        ("node_mask", lambda t: t.expand(2, -1).T, r"^node_mask: expected shape \[6\]"),
        ("node_mask", lambda t: t[:-1].bool(), r"^node_mask: expected shape \[6\], got \[5\]"),
    ],
)
def test_widths(name: str, change: Change, message: str, backend: str) -> None:
    arguments = layer_arguments()
    arguments[name] = change(arguments[name])
    with kernel_calls(forward=0, backward=0), pytest.raises(ValueError, match=message):
        functional.egcl(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attributes_that_the_weights_have_no_room_for(backend: str) -> None:
    leaves = Case("bare", nodes=6, edges=14, hidden=5, features=3).layer(torch.float32).leaves
    weights = LayerWeights(**{k: t for k, t in leaves.items() if k not in ("h", "x")})
    call = {"h": leaves["h"], "x": leaves["x"], "graph": CASE.build_graph(), "weights": weights}
    for name, value, message in (
        ("edge_attr", torch.zeros(14, 2), r"^edge_attr: expected \[E, 0\], got \[14, 2\]"),
        ("node_attr", torch.zeros(6, 1), "^h and node_attr: expected 3 features together"),
        ("v", torch.zeros(6, 3), "^v: needed exactly where the weights have a velocity MLP"),
    ):
        with kernel_calls(forward=0, backward=0), pytest.raises(ValueError, match=message):
            functional.egcl(**call, options=Options(), backend=backend, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        ([[0, 1], [1, 6]], IndexError, "^edge_index: indices must be below num_nodes = 6, got 6"),
        ([[6, 1], [1, 0]], IndexError, "^edge_index: indices must be below num_nodes = 6, got 6"),
        ([[0, 1], [1, -1]], IndexError, "^edge_index: indices must not be negative, got -1"),
        ([[0, 1], [2**40, 0]], IndexError, "^edge_index: indices must be below num_nodes"),
        ([[0, 1], [1]], ValueError, "^edge_index: receivers and senders must be 1-D"),
        ([[0.0, 1.0], [1.0, 2.0]], TypeError, "^edge_index: expected int64 or int32"),
        ([[0, 1]], TypeError, "^edge_index: expected a Graph, a tensor"),
        (None, TypeError, "^edge_index: expected a Graph, a tensor"),
        ("complete", TypeError, "^edge_index: expected a Graph, a tensor"),
        (torch.zeros(3, 4, dtype=torch.int64), ValueError, r"^edge_index: expected shape \[2, E\]"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"^edge_index: expected shape \[2, E\]"),
        (torch.zeros(2, 4), TypeError, "^edge_index: expected int64 or int32, got torch.float32"),
        (torch.zeros(2, 4, dtype=torch.bool), TypeError, "^edge_index: expected int64 or int32"),
        (torch.full((2, 4), 6), IndexError, "^edge_index: indices must be below"),
        (torch.full((2, 4), -1), IndexError, "^edge_index: indices must not be negative"),
        (Graph.complete([7]), ValueError, "^graph: has 7 nodes, but h has 6 rows"),
        (Graph.complete([2, 3]), ValueError, "^graph: has 5 nodes, but h has 6 rows"),
        (Graph.complete([6], device="meta"), ValueError, "^graph: expected device cpu as h has"),
    ],
)
def test_graph(graph: Any, error: type[Exception], message: str, backend: str) -> None:
    for call, arguments in (
        (functional.egcl, layer_arguments()),
        (functional.egcl_messages, edge_pass_arguments()),
    ):
        arguments["graph"] = graph
        expected = message.replace("h has", "[hP] has")
        with kernel_calls(forward=0, backward=0), pytest.raises(error, match=expected):
            call(**arguments, backend=backend)


LAYER_FIELDS = tuple(k for k, t in layer_arguments()["weights"]._asdict().items() if t is not None)
EDGE_FIELDS = tuple(
    k for k, t in edge_pass_arguments()["weights"]._asdict().items() if t is not None
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ["no tensor", "integers", "float64", "meta device", "None"])
@pytest.mark.parametrize("name", LAYER_FIELDS)
def test_layer_weight(name: str, wrong: str, backend: str) -> None:
    check_weight(functional.egcl, layer_arguments(), name, wrong, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ["no tensor", "integers", "float64", "meta device", "None"])
@pytest.mark.parametrize("name", [name for name in EDGE_FIELDS if name != "w_a"])
def test_edge_weight(name: str, wrong: str, backend: str) -> None:
    check_weight(functional.egcl_messages, edge_pass_arguments(), name, wrong, backend)


def check_weight(
    call: Callable[..., Any], arguments: dict[str, Any], name: str, wrong: str, backend: str
) -> None:
    value = getattr(arguments["weights"], name)
    changed: dict[str, tuple[Any, type[Exception] | tuple[type[Exception], ...]]] = {
        "no tensor": (value.tolist(), TypeError),
        "integers": (value.int(), TypeError),
        "float64": (value.double(), TypeError),
        "meta device": (value.to("meta"), ValueError),
        "None": (None, (ValueError, TypeError)),
    }
    new, error = changed[wrong]
    arguments["weights"] = arguments["weights"]._replace(**{name: new})
    # without its first weight there is no velocity MLP, and the others are too many
    named = "vel_b1" if wrong == "None" and name == "vel_w1" else name
    with kernel_calls(forward=0, backward=0), pytest.raises(error, match=rf"^weights\.{named}: "):
        call(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYER_FIELDS)
def test_layer_weight_of_the_wrong_shape(name: str, backend: str) -> None:
    """Wrong in each dimension in turn, too large and too small."""
    # where a width follows from this very weight, what does not fit to it is named
    followers = {
        ("edge_w1", 0): "h and node_attr: ",
        ("edge_w1", 1): "edge_attr: ",
        ("node_w1", 1): "h and node_attr: ",
        ("node_w2", 0): r"weights\.node_b2: ",
    }
    for dim, size in wrong_sizes(getattr(layer_arguments()["weights"], name)):
        arguments = layer_arguments()
        wrong = resized(getattr(arguments["weights"], name), dim, size)
        arguments["weights"] = arguments["weights"]._replace(**{name: wrong})
        message = "^" + followers.get((name, dim), rf"weights\.{name}: ")
        with kernel_calls(forward=0, backward=0), pytest.raises(ValueError, match=message):
            functional.egcl(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EDGE_FIELDS)
def test_edge_weight_of_the_wrong_shape(name: str, backend: str) -> None:
    for dim, size in wrong_sizes(getattr(edge_pass_arguments()["weights"], name)):
        arguments = edge_pass_arguments()
        wrong = resized(getattr(arguments["weights"], name), dim, size)
        arguments["weights"] = arguments["weights"]._replace(**{name: wrong})
        message = r"^edge_attr: " if (name, dim) == ("w_a", 1) else rf"^weights\.{name}: "
        with kernel_calls(forward=0, backward=0), pytest.raises(ValueError, match=message):
            functional.egcl_messages(**arguments, backend=backend)


def wrong_sizes(t: Tensor) -> list[tuple[int, int]]:
    return [(dim, t.shape[dim] + off) for dim in range(t.dim()) for off in (-1, 1)]


def resized(t: Tensor, dim: int, size: int) -> Tensor:
    shape = list(t.shape)
    shape[dim] = size
    return torch.zeros(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_the_options_do_not_have(backend: str) -> None:
    arguments = layer_arguments() | {"options": Options()}
    with (
        kernel_calls(forward=0, backward=0),
        pytest.raises(ValueError, match=r"weights\.att_w: expected None"),
    ):
        functional.egcl(**arguments, backend=backend)
    arguments = edge_pass_arguments() | {"options": Options(attention=True, coord_agg=None)}
    with (
        kernel_calls(forward=0, backward=0),
        pytest.raises(ValueError, match=r"weights\.w3: expected None"),
    ):
        functional.egcl_messages(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_needs_equal_widths(backend: str) -> None:
    arguments = layer_arguments()
    arguments["weights"] = arguments["weights"]._replace(
        node_w2=torch.zeros(4, 5), node_b2=torch.zeros(4)
    )
    with (
        kernel_calls(forward=0, backward=0),
        pytest.raises(ValueError, match=r"^residual: needs as many"),
    ):
        functional.egcl(**arguments, backend=backend)
    functional.egcl(**arguments, backend=backend, residual=False)


@pytest.mark.usefixtures("without_triton")
def test_backends() -> None:
    arguments = layer_arguments()
    for name, error, message in (
        ("gpu", ValueError, "^backend: expected 'auto' or one of .*'cpu'.* got 'gpu'"),
        ("", ValueError, "^backend: expected"),
        ("CPU", ValueError, "^backend: expected"),
        ("triton", BackendError, "^backend 'triton' cannot run this call: "),
        ("cuda", ValueError, "^backend: expected"),  # a name without kernels is not one
    ):
        with kernel_calls(forward=0, backward=0), pytest.raises(error, match=message):
            functional.egcl(**arguments, backend=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cpu_kernel_refuses_a_dtype_it_has_not(dtype: torch.dtype) -> None:
    problem = Case("half", nodes=4, edges=9).edge_pass(dtype)
    message = f"takes float32 and float64, not {dtype}"
    with kernel_calls(forward=0, backward=0), pytest.raises(BackendError, match=message):
        problem.run(problem.leaves, "cpu", 0)
    with (
        kernel_calls(forward=0, backward=0),
        pytest.warns(UserWarning, match="using the reference"),
    ):
        out = problem.run(problem.leaves, "auto", 0)
    assert out["M"].dtype == dtype


def test_meta_tensors_are_refused_by_the_cpu_kernel() -> None:
    arguments: dict[str, Any] = {
        k: t.to("meta") if isinstance(t, Tensor | Graph) else t
        for k, t in layer_arguments().items()
    }
    arguments["weights"] = LayerWeights(
        *(None if t is None else t.to("meta") for t in arguments["weights"])  # type: ignore[arg-type]
    )
    with (
        kernel_calls(forward=0, backward=0),
        pytest.raises(BackendError, match="lie on meta, not on the CPU"),
    ):
        functional.egcl(**arguments, backend="cpu")


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("activation", "gelu", ValueError, "activation: expected one of"),
        ("activation", None, ValueError, "activation: expected one of"),
        ("attention", 2, TypeError, "attention: expected a bool, got 2"),
        ("coord_tanh", "yes", TypeError, "coord_tanh: expected a bool, got 'yes'"),
        ("coord_agg", "max", ValueError, "coord_agg: expected 'mean', 'sum' or None .* got 'max'"),
        ("coord_agg", "none", ValueError, "coord_agg: expected 'mean', 'sum' or None"),
        ("coord_norm", "l2", ValueError, "coord_norm: expected None, 'unit' or a positive number"),
        ("coord_norm", 0.0, ValueError, "coord_norm: expected a positive finite number, got 0.0"),
        ("coord_norm", -1.0, ValueError, "coord_norm: expected a positive finite number"),
        ("coord_norm", True, TypeError, "coord_norm: expected a number, got True"),
        ("coord_scale", math.nan, ValueError, "coord_scale: expected a finite number, got nan"),
        ("coord_scale", "2", TypeError, "coord_scale: expected a number, got '2'"),
        ("coord_clamp", 0.0, ValueError, "coord_clamp: expected a positive finite number"),
        ("coord_clamp", math.inf, ValueError, "coord_clamp: expected a positive finite number"),
        ("coord_clamp", [1.0], TypeError, "coord_clamp: expected a number"),
        ("negative_slope", math.inf, ValueError, "negative_slope: expected a finite number"),
        ("negative_slope", None, TypeError, "negative_slope: expected a number, got None"),
    ],
)
def test_options(field: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Options(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["h", "x", "v", "edge_attr", "node_attr", "edge_mask"])
def test_nan_and_infinity_pass_through(name: str, dtype: torch.dtype, backend: str) -> None:
    """No hang, no crash: NaN in, NaN out, forward and backward."""
    problem = CASE.layer(dtype)
    for value in (math.nan, math.inf, -math.inf):
        leaves = {k: t.clone() for k, t in problem.leaves.items()}
        leaves[name].view(-1)[0] = value
        inputs = {k: t.requires_grad_() for k, t in leaves.items()}
        out = problem.run(inputs, backend, 0)
        if math.isnan(value):
            assert any(t.isnan().any() for t in out.values())
        torch.stack([t.sum() for t in out.values()]).sum().backward()
        assert any(not t.grad.isfinite().all() for t in inputs.values() if t.grad is not None)


def test_counts() -> None:
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError, match=r"^num_nodes: expected 0 to"):
            Graph.from_edge_index(EDGES, wrong)
        with pytest.raises(ValueError, match=r"^sizes: expected 0 to"):
            Graph.complete([3, wrong])
    for bad in (1.5, True, None, "3"):
        with pytest.raises(TypeError, match=r"^num_nodes: expected an int, got"):
            Graph.from_edge_index(EDGES, bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^sizes: expected an int, got"):
            Graph.complete([3, bad])  # type: ignore[list-item]
    for tensor in (torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]]), torch.tensor(3)):
        with pytest.raises(TypeError, match=r"^sizes: expected a 1-D tensor of integers, got"):
            Graph.complete(tensor)
    with pytest.raises(ValueError, match=r"^sizes: at most"):
        Graph.complete([100_000])

"""Drop-in: outputs and every gradient equal the official code's, for each backend and dtype."""

from __future__ import annotations

import golden
import pytest
import torch
from torch import Tensor

import egnn_fast
from egnn_fast import Graph
from egnn_fast.runtime import native

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
EXPECTED_CASES = 14


def assert_close(name: str, got: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """max|a - b| / max|b| of one tensor."""
    assert got is not None, f"{name}: no gradient"
    assert got.shape == expected.shape, name
    scale = expected.abs().max()
    assert scale > 0, f"{name}: a golden tensor of zeros cannot be compared relatively"
    error = (got.detach().double() - expected).abs().max() / scale
    # "not <=" rather than ">" so that NaN fails
    assert error <= tolerance, f"{name}: relative error {error:.3e} > {tolerance:.0e}"


def assert_matches(case: golden.Golden, outputs: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and all gradients of a case after its backward."""
    assert outputs.keys() == case.outputs.keys()
    for name, expected in case.outputs.items():
        assert_close(f"out/{name}", outputs[name], expected, tolerance)
    for name, expected in case.input_grads.items():
        assert_close(f"grad/{name}", case.inputs[name].grad, expected, tolerance)
    for name, parameter in case.module.named_parameters():
        if name in case.state_grads:
            expected = case.state_grads[name]
            assert_close(f"grad/state/{name}", parameter.grad, expected, tolerance)
        else:
            assert parameter.grad is None, f"{name}: official gradient is None"


def test_every_golden_file_is_here() -> None:
    assert len(golden.names()) == EXPECTED_CASES


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", golden.names())
def test_golden(name: str, backend: str, dtype: torch.dtype) -> None:
    case = golden.load(name, dtype)
    before = kernel_calls()
    with egnn_fast.use_backend(backend):
        outputs = case.run()
        case.backward(outputs)
    forward, backward = (b - a for a, b in zip(before, kernel_calls(), strict=True))
    expected = case.kernel_calls if backend == "cpu" else 0
    assert (forward, backward) == (expected, expected)
    assert_matches(case, outputs, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["graph", "pair", "lists"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["egnn-4layers", "egcl-edgeattr_random", "gcl_vel-nbody"])
def test_golden_with_every_form_of_edges(name: str, backend: str, form: str) -> None:
    case = golden.load(name, torch.float64)
    edges = case.inputs["edge_index"]
    forms = {
        "graph": Graph.from_edge_index(edges, case.inputs["h"].shape[0]),
        "pair": list(edges),
        "lists": edges.tolist(),
    }
    with egnn_fast.use_backend(backend):
        outputs = case.run(forms[form])
        case.backward(outputs)
    assert_matches(case, outputs, TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["egcl-plain", "egcl-normalize", "gcl-nodeattr_normdiff"])
def test_golden_on_an_implicit_complete_graph(name: str, backend: str) -> None:
    case = golden.load(name, torch.float64)
    graph = Graph.complete([case.inputs["h"].shape[0]])
    assert torch.equal(graph.edge_index, case.inputs["edge_index"])
    with egnn_fast.use_backend(backend):
        outputs = case.run(graph)
        case.backward(outputs)
    assert_matches(case, outputs, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", golden.names())
def test_inputs_are_not_modified(name: str) -> None:
    case = golden.load(name, torch.float64)
    before = {k: v.detach().clone() for k, v in case.inputs.items()}
    with egnn_fast.use_backend("reference"):
        case.backward(case.run())
    for key, value in case.inputs.items():
        assert torch.equal(value, before[key]), key


def test_the_comparison_can_fail() -> None:
    case = golden.load("egcl-plain", torch.float64)
    with egnn_fast.use_backend("reference"):
        outputs = case.run()
        case.backward(outputs)
    weight = case.module.get_parameter("coord_mlp.2.weight")
    assert weight.grad is not None
    weight.grad *= 1 + 1e-8
    with pytest.raises(AssertionError, match=r"coord_mlp\.2\.weight"):
        assert_matches(case, outputs, TOLERANCE[torch.float64])


def kernel_calls() -> tuple[int, int]:
    """How often the kernel ran forward and backward in this process."""
    return (0, 0) if native.core is None else native.core.calls()

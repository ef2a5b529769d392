"""The fused layer and the reference share nothing but the Graph: a mistake in one of them shows."""

from __future__ import annotations

import inspect
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from cases import CASES, LAYER_CASES, kernel_calls
from torch import Tensor

from egnn_fast import checks, functional, reference
from egnn_fast.checks import cases
from egnn_fast.checks.cases import Case, check_cases
from egnn_fast.weights import LayerWeights

pytestmark = pytest.mark.usefixtures("one_thread")

# (the text, the mistake), in what prepares the fused layer's inputs and outputs
FUSED = {
    "velocities without node mask": ("else v * nodes.unsqueeze(1)", "else v"),
    "edges without the sender's mask": ("nodes[receiver] * nodes[sender]", "nodes[receiver]"),
    "edge mask lost": ("if mask is None else mask * both_ends", "if True else mask"),
    "mean without masks": ("_coord_weight(mask, graph", "_coord_weight(None, graph"),
    "mean a little off": ("total.clamp(min=1)", "total.clamp(min=1.0001)"),
    "features without node mask": ("new_h * nodes.unsqueeze(1).to(new_h.dtype)", "new_h"),
    "velocities of the layer before": ("step if carry else None", "v if carry else None"),
}
REFERENCE = {
    "velocities without node mask": ("else v * node_factor.unsqueeze(1)", "else v"),
    "edges without the sender's mask": (
        "node_factor[receiver] * node_factor[sender]",
        "node_factor[receiver]",
    ),
    "mean without masks": ("if edge_mask is None:\n        return", "if True:\n        return"),
    "mean a little off": ("clamp(min=1)", "clamp(min=1.0001)"),
    "scale lost": ("options.coord_scale != 1", "False"),
    "clamp lost": ("options.coord_clamp is not None", "False"),
    "residual lost": ("if residual else update", "if False else update"),
    "sum of messages": ("segment_sum(m.to(d.dtype), receiver, h", "segment_sum(m, sender, h"),
    "features without node mask": ("new_h * node_factor.unsqueeze(1).to(new_h.dtype)", "new_h"),
}


def with_mistake(module: ModuleType, text: str, mistake: str) -> ModuleType:
    """A copy of a module in which another text stands in one place."""
    source = inspect.getsource(module)
    assert source.count(text) == 1, text
    copy = ModuleType(module.__name__)
    exec(compile(source.replace(text, mistake), str(module.__file__), "exec"), vars(copy))
    return copy


def passes() -> bool:
    """Whether every quick case of the check passes."""
    return all(
        row.passed
        for case in check_cases(quick=True)
        for row in checks.compare(case.layer(torch.float64), case.name, ["cpu"], torch.float64)
    )


@pytest.mark.parametrize("mistake", FUSED)
def test_a_mistake_around_the_fused_layer_is_found(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "functional", with_mistake(functional, *FUSED[mistake]))
    assert not passes()


@pytest.mark.parametrize("mistake", REFERENCE)
def test_a_mistake_in_the_reference_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "reference", with_mistake(reference, *REFERENCE[mistake]))
    assert not passes()


def test_a_copy_without_mistake_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (functional, reference):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(cases, name, with_mistake(module, "def egcl(", "def egcl("))
    assert passes()


def gradients(case: Case, face: str) -> None:
    """Run a case forward and backward on the CPU's kernels."""
    problem = getattr(case, face)(torch.float64)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    outputs = problem.run(leaves, "cpu", 0)
    total = torch.stack([t.square().sum() for t in outputs.values()]).sum()
    torch.autograd.grad(total, list(leaves.values()), allow_unused=True)


def test_the_fused_layer_calls_nothing_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the fused layer called the reference")

    own = [k for k, f in vars(reference).items() if isinstance(f, FunctionType)]
    own = [k for k in own if getattr(reference, k).__module__ == reference.__name__]
    assert {"egcl", "messages", "update_nodes", "coord_weight", "segment_sum"} <= set(own)
    for name in own:
        monkeypatch.setattr(reference, name, refuse)
    with kernel_calls():
        for case in LAYER_CASES:
            gradients(case, "layer")
        for case in CASES[:30]:
            gradients(case, "edge_pass")
    problem = LAYER_CASES[0].layer(torch.float64)
    with pytest.raises(AssertionError, match="called the reference"):
        problem.run(problem.leaves, "reference", 0)


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case.name)
def test_backend_reference_is_the_reference(case: Case) -> None:
    """The documented function on backend "reference", bit by bit."""
    problem = case.layer(torch.float32)
    t = problem.leaves
    new_h, new_x, new_v = functional.egcl(
        t["h"], t["x"], case.build_graph(), weights_in(t), case.options,
        edge_attr=t.get("edge_attr"), node_attr=t.get("node_attr"),
        edge_mask=t.get("edge_mask"), node_mask=t.get("node_mask"), v=t.get("v"),
        residual=case.residual, carry_velocity=case.carry, backend="reference",
    )  # fmt: skip
    right = problem.run(t, "reference", 0)
    assert torch.equal(new_h, right["h"])
    assert torch.equal(new_x, right["x"])
    assert (new_v is None) is ("v" not in right)
    assert new_v is None or torch.equal(new_v, right["v"])


def weights_in(leaves: dict[str, Tensor]) -> LayerWeights:
    return LayerWeights(**{k: t for k, t in leaves.items() if k in LayerWeights._fields})

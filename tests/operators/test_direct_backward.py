"""The backward of a direct call: when it is direct, and that it follows autograd's rules."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import kernel_calls
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from ways import FACES, by_operators, layer_inputs, leaves_of, step, through_operators, total

from egnn_fast import checks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_second_derivatives_go_by_the_operators_and_third_ones_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for build in FACES.values():
        problem = build(torch.float64)
        leaves = leaves_of(problem)
        step(problem, leaves)
        right = checks.evaluate(problem, "reference")
        with through_operators(monkeypatch) as count:
            found = checks.evaluate(problem, "cpu")
            assert count.backward > 0
        for order, tensors in right.items():
            for name, t in tensors.items():
                assert checks.relative_error(found[order][name], t) < 1e-11, (order, name)
        x = leaves["x"]
        value = total(problem.run(leaves, "cpu", 0))
        for _ in range(2):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = (grad**2).sum()
        with pytest.raises(NotImplementedError, match="second order"):
            torch.autograd.grad(value, x)


def test_autograd_knows_both_ways_by_one_name() -> None:
    layer, args = layer_inputs()
    names = [by_operators(lambda: layer(**args)[0].grad_fn.name()), layer(**args)[0].grad_fn.name()]
    assert names == ["EgnnFast_layerBackward"] * 2


@pytest.mark.parametrize("face", FACES)
def test_the_graph_of_a_call_can_be_kept_or_is_freed(face: str) -> None:
    problem = FACES[face](torch.float32)
    leaves = leaves_of(problem)
    step(problem, leaves)
    value = total(problem.run(leaves, "cpu", 0))
    value.backward(retain_graph=True)
    once = {n: t.grad.clone() for n, t in leaves.items() if t.grad is not None}
    value.backward()
    for name, grad in once.items():
        assert torch.equal(leaves[name].grad, 2 * grad)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@pytest.mark.parametrize("face", FACES)
def test_a_saved_tensor_edited_in_place_is_noticed(face: str) -> None:
    problem = FACES[face](torch.float32)
    leaves = leaves_of(problem)
    step(problem, leaves)
    value = total(problem.run(leaves, "cpu", 0))
    with torch.no_grad():
        leaves["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_gradients_have_memory_of_their_own() -> None:
    layer, args = layer_inputs()
    for _ in range(2):
        layer.zero_grad()
        h, x = layer(**args)
        (h.sum() + (x * x).sum()).backward()
    grads = [p.grad for p in layer.parameters()]
    assert all(g is not None for g in grads)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)  # type: ignore[union-attr]
    for p in layer.parameters():
        assert p.grad is not None
        assert p.grad.untyped_storage().size() == p.numel() * p.element_size()
        assert p.grad.is_contiguous()


def test_nothing_of_a_call_stays_behind() -> None:
    layer, args = layer_inputs()
    for _ in range(2):
        layer(**args)
    gc.collect()
    gc.disable()
    try:
        h = args["h"].clone().requires_grad_()
        found = layer(**{**args, "h": h})
        found = layer(**{**args, "h": h})
        dead = [weakref.ref(t) for t in (h, *found, *layer.parameters())]
        found[0].sum().backward()
        del found, h, layer
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()


def test_hooks_on_saved_tensors_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, args = layer_inputs()
    weights = list(layer.parameters())

    def grads(run: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        h, x = run()
        return list(torch.autograd.grad(h.sum() + (x * x).sum(), weights))

    grads(lambda: layer(**args))
    with through_operators(monkeypatch) as count:
        right = grads(lambda: layer(**args))
        ways: list[Callable[[], tuple[Tensor, ...]]] = [
            lambda: checkpoint(lambda: layer(**args), use_reentrant=False),
        ]
        for run in ways:
            with kernel_calls(2, 1):
                assert all(map(torch.equal, grads(run), right))
        packed: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            assert all(map(torch.equal, grads(lambda: layer(**args)), right))
        assert {id(w) for w in weights} <= {id(t) for t in packed}
        assert count.forward == 0


HOOKED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "strided": (lambda t: torch.stack([t, torch.full_like(t, 7)], dim=-1)[..., 0], True),
    "cloned": (Tensor.clone, True),
    "lazily negative": (lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag, True),
    "of another dtype": (Tensor.double, False),
    "of another shape": (lambda t: t[:-1] if t.dim() else t, False),
}


@pytest.mark.parametrize("name", HOOKED)
def test_tensors_that_hooks_unpack_are_checked(name: str) -> None:
    layer, args = layer_inputs()
    weights = list(layer.parameters())
    change, works = HOOKED[name]

    def grads(unpack: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            h, x = layer(**args)
        return list(torch.autograd.grad(h.sum() + (x * x).sum(), weights))

    right = grads(lambda t: t)
    for _ in range(2):
        if works:
            found = grads(lambda t: change(t) if t.is_floating_point() else t)
            assert all(map(torch.equal, found, right))
        else:
            with pytest.raises(ValueError, match=r"egnn_fast::layer: .*: expected"):
                grads(lambda t: change(t) if t.is_floating_point() else t)


SWAPPED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "other numbers": (lambda t: t + 1, True),
    "strided": (lambda t: torch.stack([t + 1, t], dim=-1)[..., 0], True),
    "fewer columns": (lambda t: t[:, :2].clone(), False),
    "the same memory, fewer columns": (lambda t: t[:, :2], False),
    "another dtype": (Tensor.double, False),
    "another device": (lambda t: t.to("meta"), False),
    "flat": (Tensor.flatten, False),
}


@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize(
    "place", ["edge_mlp.0.weight", "node_mlp.0.weight", "node_mlp.2.weight", "coord_mlp.2.weight"]
)
def test_replaced_memory_of_a_weight_is_checked_in_the_backward(name: str, place: str) -> None:
    """Autograd does not notice ``weight.data = ...``, and passes on the new memory."""
    change, works = SWAPPED[name]
    for frozen in (False, True):
        found = []
        for way in (by_operators, lambda run: run()):
            layer, args = layer_inputs()
            weight = layer.get_parameter(place)
            weight.requires_grad_(not frozen)
            trained = [p for p in layer.parameters() if p.requires_grad]

            def grads(
                layer: Any = layer, args: Any = args, weight: Any = weight, trained: Any = trained
            ) -> list[Tensor]:
                h, x = layer(**args)
                weight.data = change(weight.data)
                return list(torch.autograd.grad(h.sum() + (x * x).sum(), trained))

            if works:
                found.append(way(grads))
            else:
                with pytest.raises((ValueError, RuntimeError)):
                    way(grads)
        if works:
            assert all(map(torch.equal, *found))


LAZY_ZEROS: dict[str, Callable[..., Tensor]] = {
    "sgn": lambda h, x, y: h.sgn().sum(),
    "abs": lambda h, x, y: (x - y).abs().sum(),
    "l1_loss": lambda h, x, y: torch.nn.functional.l1_loss(x, y),
}


@pytest.mark.parametrize("name", LAZY_ZEROS)
def test_cotangents_that_pytorch_has_not_filled(name: str) -> None:
    """The derivative of sgn is a tensor of zeros without memory."""
    layer, args = layer_inputs()
    y = torch.randn_like(args["x"])
    found = []
    for way in (by_operators, lambda run: run()):
        x = args["x"].clone().requires_grad_()
        inputs = [x, *layer.parameters()]

        def run(x: Tensor = x, inputs: list[Tensor] = inputs) -> list[Tensor]:
            value = LAZY_ZEROS[name](*layer(**{**args, "x": x}), y)
            first = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
            total = torch.stack([g.square().sum() for g in first]).sum()
            second = [torch.zeros(())]
            if total.requires_grad:
                second = list(torch.autograd.grad(total, inputs, materialize_grads=True))
            return [*first, *second]

        found.append(way(run))
    assert all(map(torch.equal, *found))


def test_inputs_that_pytorch_has_not_filled() -> None:
    layer, args = layer_inputs()
    zeros = torch._efficientzerotensor((6, 3))
    right = layer(**{**args, "v": torch.zeros(6, 3)})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = layer(**{**args, "v": zeros})
        assert all(map(torch.equal, found, right))


def test_hooks_of_single_saved_tensors_are_noticed() -> None:
    """None were active in the forward; what they return is looked at all the same."""
    layer, args = layer_inputs()
    weights = list(layer.parameters())

    def grads(hooked: bool) -> list[Tensor]:
        h, x = layer(**args)
        node: Any = h.grad_fn
        for slot, t in zip(node._raw_saved_tensors, node.saved_tensors, strict=True):
            if hooked and t is not None and t.is_floating_point():
                slot.register_hooks(lambda t: t, lambda t: torch._neg_view(-t))
        return list(torch.autograd.grad(h.sum() + (x * x).sum(), weights))

    assert all(map(torch.equal, grads(True), grads(False)))


def test_a_weight_negated_lazily_between_forward_and_backward() -> None:
    found = []
    for way in (by_operators, lambda run: run()):
        layer, args = layer_inputs()
        weight = layer.get_parameter("edge_mlp.2.weight")

        def run(layer: Any = layer, args: Any = args, weight: Any = weight) -> list[Tensor]:
            h, x = layer(**args)
            weight.data = torch._neg_view(-weight.data)
            return list(torch.autograd.grad(h.sum() + (x * x).sum(), list(layer.parameters())))

        found.append(way(run))
    assert all(map(torch.equal, *found))

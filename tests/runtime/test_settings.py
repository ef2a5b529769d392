"""Settings that outlive a call: blocks of several threads, derivatives under another setting."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cases import even_interpreted, interpreted, kernel_calls
from torch import Tensor
from torch.utils._device import DeviceContext

import egnn_fast
from egnn_fast import Graph, backends, checks, nn
from egnn_fast.backends import user_choice
from egnn_fast.operators import autograd, precision
from egnn_fast.runtime.settings import Blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_blocks_end_in_any_order() -> None:
    told: list[int | None] = []
    blocks: Blocks[int] = Blocks(told.append)
    first, second = blocks.enter(1), blocks.enter(2)
    blocks.leave(first)
    assert blocks.latest == 2
    blocks.leave(first)
    blocks.leave(second)
    assert blocks.latest is None
    assert told == [1, 2, 2, 2, None]
    assert len(blocks) == 0


@pytest.mark.parametrize(
    ("block", "setting"),
    [
        (lambda: egnn_fast.approximate_activations(), lambda: precision._approximate),
        (lambda: egnn_fast.use_backend("reference"), lambda: user_choice._traced_override),
    ],
    ids=["approximate", "backend"],
)
def test_overlapping_blocks_leave_nothing_behind(
    block: Callable[[], AbstractContextManager[None]], setting: Callable[[], Any]
) -> None:
    before, first, second = setting(), block(), block()
    first.__enter__()
    inside = setting()
    assert inside != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting() == inside
    second.__exit__(None, None, None)
    assert setting() == before


def test_a_block_may_end_in_another_context() -> None:
    """As an asynchronous generator's may."""
    block = egnn_fast.use_backend("reference")
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    assert backends.requested(None) == "auto"
    assert user_choice._traced_override is None


def test_a_warning_that_is_an_error_is_raised_each_time() -> None:
    layer = nn.EGCL(3, 3, 4, activation=torch.nn.GELU())
    args = (torch.randn(4, 3), torch.randn(4, 3), Graph.complete([4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="run fused"):
                layer(*args)


def layer_and_inputs() -> tuple[nn.EGCLVel, tuple[Any, ...]]:
    torch.manual_seed(0)
    h, x, v = torch.randn(5, 16), torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    return nn.EGCLVel(16, 16, 16), (h, x, Graph.complete([5]), v)


@even_interpreted
def test_a_backward_inside_autocast_is_that_of_its_forward(backend: str) -> None:
    layer, args = layer_and_inputs()
    inputs = [args[1], *layer.parameters()]
    with egnn_fast.use_backend(backend):
        h, x = layer(*args)[:2]
    value = h.square().sum() + x.square().sum()
    right = torch.autograd.grad(value, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(value, inputs)
    for a, b in zip(found, right, strict=True):
        assert checks.relative_error(a, b) < 1e-6


@interpreted
def test_a_second_derivative_has_the_precision_of_its_forward(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, args = layer_and_inputs()
    seen: list[str] = []
    call = autograd.Operator.__call__

    def spy(self: autograd.Operator, *given: Any) -> Any:
        seen.extend(a for a in given if a in ("highest", "high", "highest~", "high~"))
        return call(self, *given)

    with egnn_fast.use_backend(backend):
        h, x = layer(*args)[:2]
    (force,) = torch.autograd.grad(h.sum() + x.sum(), args[1], create_graph=True)
    monkeypatch.setattr(autograd.Operator, "__call__", spy)
    try:
        torch.set_float32_matmul_precision("high")
        with egnn_fast.approximate_activations():
            force.square().sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_jit_trace_is_refused_by_name() -> None:
    """It would record the results of operators that it does not know as constants."""
    layer, (h, x, graph, v) = layer_and_inputs()
    network, edges = nn.EGNNVel(16, 8), graph.edge_index
    for run in (
        lambda h, x, v: layer(h, x, graph, v)[0],
        lambda h, x, v: layer(h, x, edges, v)[0],
        lambda h, x, v: network(h, x, graph, v)[0],
        lambda h, x, v: network(h, x, edges, v)[0],
    ):
        for backend in ("auto", "reference"):
            with (
                egnn_fast.use_backend(backend),
                pytest.raises(RuntimeError, match=r"torch\.jit\.trace.* use torch\.export"),
            ):
                torch.jit.trace(run, (h, x.detach(), v))


def test_memory_that_was_freed_is_named() -> None:
    layer, args = layer_and_inputs()
    weight = layer.edge_mlp[2].weight
    assert isinstance(weight, Tensor)
    weight.requires_grad_(False).untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(ValueError, match="was its storage freed"), kernel_calls(0, 0):
            layer(*args)


def test_a_default_device_sees_nothing_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run Python code at each access to a tensor: up to 1.5 ms a layer."""
    seen: list[Any] = []
    look = DeviceContext.__torch_function__

    def counted(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func)
        return look(self, func, types, args, kwargs)

    layer, (h, x, graph, v) = layer_and_inputs()
    network, edges = nn.EGNNVel(16, 8), graph.edge_index
    right = layer(h, x, graph, v)
    monkeypatch.setattr(DeviceContext, "__torch_function__", counted)
    for device in ("cpu", "meta"):
        with torch.device(device):
            for given in (graph, edges):
                seen.clear()
                found = layer(h, x, given, v)
                assert seen == []
                network(h, x, given, v)
                assert seen == [torch.nn.functional.linear]  # the embedding
            assert all(map(torch.equal, found, right))
            seen.clear()
            found[0].backward(torch.ones_like(h, device="cpu"), inputs=[x])
            assert [f.__name__ for f in seen] == ["ones_like", "backward"]
    assert x.grad is not None


def test_a_users_activation_sees_the_default_device() -> None:
    class Shifted(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z + torch.zeros(1)

    layer = nn.EGCL(3, 3, 4, activation=Shifted())
    with (
        torch.device("meta"),
        pytest.warns(match="Shifted"),
        pytest.raises(RuntimeError, match="meta"),
    ):
        layer(torch.randn(4, 3, device="cpu"), torch.randn(4, 3, device="cpu"), Graph.complete([4]))

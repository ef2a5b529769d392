"""The fused edge pass as PyTorch operators, with their derivatives.

Three flat operators (tensors and scalars only): ``egnn_fast::messages``, its derivative
``messages_backward`` and the derivative of that, ``messages_double_backward``. Each has a fake
for tracing and an autograd Function registered at the Autograd key, so that ``torch.compile``,
``torch.export``, ``torch.func`` and ``opcheck`` all see an ordinary operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from egnn_fast import _cpu, _double_backward, _sorting
from egnn_fast.graph import Graph, check_index_range
from egnn_fast.options import EdgeWeights, Options

# what gradients flow to, what describes the graph, and what is no tensor: in this order everywhere
DIFFERENTIABLE = (
    "pq", "x", "edge_attr", "edge_mask",
    "w_r", "w_a", "w2", "b2", "w_g", "b_g", "w3", "b3", "w_x",
)  # fmt: skip
N_DIFF = len(DIFFERENTIABLE)
N_TENSORS = N_DIFF + 4
HEAD = DIFFERENTIABLE.index("w3")  # from here on the coordinate head's weights
_INPUTS = (
    "Tensor pq, Tensor x, Tensor? edge_attr, Tensor? edge_mask, Tensor w_r, Tensor? w_a, "
    "Tensor w2, Tensor b2, Tensor? w_g, Tensor? b_g, Tensor? w3, Tensor? b3, Tensor? w_x, "
    "Tensor rowptr, Tensor? senders, Tensor? perm, Tensor? first, "
    "str activation, float slope, float norm, bool tanh, float clamp, str backend"
)
MAX_ORDER_MESSAGE = (
    "egnn_fast: the fused operators support derivatives up to the second order; "
    "for higher orders use backend='reference'"
)
FORWARD_MODE_MESSAGE = (
    "egnn_fast: the fused operators have no forward-mode derivative (jvp, jacfwd, hessian); "
    "use reverse mode (vjp, jacrev) or backend='reference'"
)

_lib = torch.library.Library("egnn_fast", "DEF")
_lib.define(f"messages({_INPUTS}) -> (Tensor, Tensor)")
_lib.define(f"messages_backward(Tensor? g_m, Tensor? g_x, {_INPUTS}, bool[] needed) -> Tensor[]")
_lib.define(
    "messages_double_backward(Tensor?[] cotangents, Tensor? g_m, Tensor? g_x, "
    f"{_INPUTS}, bool[] needed, bool[] needed2) -> Tensor[]"
)
_lib.define("sort_by_receiver(Tensor edge_index, SymInt num_nodes) -> (Tensor, Tensor, Tensor)")

_messages = torch.ops.egnn_fast.messages.default
_messages_backward = torch.ops.egnn_fast.messages_backward.default
_messages_double_backward = torch.ops.egnn_fast.messages_double_backward.default


def messages(
    pq: Tensor,
    x: Tensor,
    graph: Graph,
    weights: EdgeWeights,
    options: Options,
    edge_attr: Tensor | None,
    edge_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The fused edge pass: ``pq [N, 2H]`` holds P and Q side by side.

    Returns ``M [N, H]`` and ``X [N, D]`` (``[0, D]`` without a coordinate head). Arguments are
    not checked here: that is functional's part. Under autocast everything is brought to the
    dtype of ``x``: distances, edge MLP and sums keep its precision.
    """
    tensors = [pq, x, edge_attr, edge_mask, *weights]
    if torch.is_autocast_enabled(x.device.type):
        tensors = [None if t is None else t.to(x.dtype) for t in tensors]
    return _transformable(
        _Messages, _messages, *tensors,
        graph.rowptr, graph.senders, graph.perm, graph.first,
        options.activation, options.negative_slope, norm_code(options), options.coord_tanh,
        options.coord_clamp or 0.0, backend,
    )  # fmt: skip


def norm_code(options: Options) -> float:
    """coord_norm as one number: 0 none, -1 "unit", else k."""
    if options.coord_norm is None:
        return 0.0
    return -1.0 if isinstance(options.coord_norm, str) else float(options.coord_norm)


def graph_in_trace(edge_index: Tensor, num_nodes: int) -> Graph:
    """The graph of an edge list inside a traced region, where nothing may be kept."""
    rowptr, senders, perm = torch.ops.egnn_fast.sort_by_receiver.default(edge_index, num_nodes)
    return Graph(rowptr, senders, perm)


def _transformable(function: type[torch.autograd.Function], operator: Any, *args: Any) -> Any:
    """Run an operator, by way of its Function where a torch.func transform is active.

    The transforms take a Function apart level by level, but only if they meet it before the
    dispatcher does.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return operator(*args)


class _Operator(torch.autograd.Function):
    """What the Functions of all three operators share: vmap by a loop, no forward mode."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        runs = [
            cls.apply(*(_select(a, dim, k) for a, dim in zip(args, in_dims, strict=True)))
            for k in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
        return outputs, (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE_MESSAGE)


def _select(argument: Any, dim: int | None, k: int) -> Any:
    return argument.select(dim, k) if isinstance(dim, int) else argument


def _reached(needed: Sequence[bool], g_x: Tensor | None) -> list[bool]:
    """Which of the needed gradients exist: the head's weights have none unless X is used."""
    return [need and (g_x is not None or k < HEAD) for k, need in enumerate(needed)]


class _Messages(_Operator):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return _messages(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:N_TENSORS])
        ctx.scalars = inputs[N_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g_m: Tensor | None, g_x: Tensor | None) -> tuple[Any, ...]:
        needed = _reached(ctx.needs_input_grad[:N_DIFF], g_x)
        none = (None,) * (N_TENSORS - N_DIFF + len(ctx.scalars))
        if (g_m is None and g_x is None) or not any(needed):
            return (None,) * N_DIFF + none
        found = _transformable(
            _MessagesBackward, _messages_backward,
            g_m, g_x, *ctx.saved_tensors, *ctx.scalars, needed,
        )  # fmt: skip
        return (*_spread(found, needed), *none)


class _MessagesBackward(_Operator):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_messages_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[: 2 + N_TENSORS])
        ctx.scalars = inputs[2 + N_TENSORS :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        g_x = ctx.saved_tensors[1]
        wanted = ctx.needs_input_grad[: 2 + N_DIFF]
        needed2 = [*wanted[:2], *_reached(wanted[2:], g_x)]
        none = (None,) * (N_TENSORS - N_DIFF + len(ctx.scalars))
        if all(c is None for c in cotangents) or not any(needed2):
            return (None,) * (2 + N_DIFF) + none
        found = _transformable(
            _MessagesDoubleBackward, _messages_double_backward_flat,
            len(cotangents), *cotangents, *ctx.saved_tensors, *ctx.scalars, needed2,
        )  # fmt: skip
        return (*_spread(found, needed2), *none)


class _MessagesDoubleBackward(_Operator):
    """Exists to raise: a raw result here would silently be a constant to a third derivative."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_messages_double_backward_flat(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise NotImplementedError(MAX_ORDER_MESSAGE)


def _messages_double_backward_flat(n_cotangents: int, *args: Any) -> list[Tensor]:
    """The operator for a Function, which sees tensors only where they are no list."""
    return _messages_double_backward(list(args[:n_cotangents]), *args[n_cotangents:])


def _spread(found: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Put the gradients that were asked for in their places."""
    rest = iter(found)
    return [next(rest) if n else None for n in needed]


def _wants_grad(*args: Any) -> bool:
    # a forward-mode tangent must meet its Function too, which refuses it
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    )


def _messages_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    return _Messages.apply(*args) if _wants_grad(*args) else _Messages.forward(*args)


def _messages_backward_autograd(*args: Any) -> list[Tensor]:
    run = _MessagesBackward.apply if _wants_grad(*args) else _MessagesBackward.forward
    return list(run(*args))


def _messages_double_backward_autograd(
    cotangents: Sequence[Tensor | None], *args: Any
) -> list[Tensor]:
    flat = (len(cotangents), *cotangents, *args)
    wants = _wants_grad(*flat)
    run = _MessagesDoubleBackward.apply if wants else _MessagesDoubleBackward.forward
    return list(run(*flat))


def _messages_fake(pq: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    has_head = rest[DIFFERENTIABLE.index("w_x") - 2] is not None
    m = pq.new_empty((pq.shape[0], pq.shape[1] // 2))
    return m, x.new_empty((x.shape[0] if has_head else 0, x.shape[1]))


def _messages_backward_fake(g_m: Any, g_x: Any, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(rest[:N_DIFF], rest[-1], strict=True) if need]


def _messages_double_backward_fake(cotangents: Any, *rest: Any) -> list[Tensor]:
    inputs = rest[: 2 + N_DIFF]
    return [t.new_empty(t.shape) for t, need in zip(inputs, rest[-1], strict=True) if need]


def _sort_by_receiver(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    check_index_range(edge_index, num_nodes)
    return _sorting.sort_by_receiver(edge_index, num_nodes)[:3]


def _sort_by_receiver_fake(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    edges = edge_index.shape[1]
    int32 = edge_index.new_empty((edges,), dtype=torch.int32)
    return edge_index.new_empty((num_nodes + 1,)), int32, torch.empty_like(int32)


_lib.impl("messages", _cpu.messages, "CPU")
_lib.impl("messages_backward", _cpu.messages_backward, "CPU")
_lib.impl("messages_double_backward", _double_backward.double_backward, "CompositeExplicitAutograd")
_lib.impl("sort_by_receiver", _sort_by_receiver, "CompositeExplicitAutograd")
_lib.impl("messages", _messages_autograd, "Autograd")
_lib.impl("messages_backward", _messages_backward_autograd, "Autograd")
_lib.impl("messages_double_backward", _messages_double_backward_autograd, "Autograd")
torch.library.register_fake("egnn_fast::messages", _messages_fake, lib=_lib)
torch.library.register_fake("egnn_fast::messages_backward", _messages_backward_fake, lib=_lib)
torch.library.register_fake(
    "egnn_fast::messages_double_backward", _messages_double_backward_fake, lib=_lib
)
torch.library.register_fake("egnn_fast::sort_by_receiver", _sort_by_receiver_fake, lib=_lib)

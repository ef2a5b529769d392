"""Makes an ordinary PyTorch operator of a kernel and its derivatives.

An operator here is three: ``name``, its derivative ``name_backward`` and the derivative of that,
``name_double_backward``; flat, tensors and scalars only. Each gets a fake for tracing and an
autograd Function at the Autograd key, so that ``torch.compile``, ``torch.export``, ``torch.func``
and ``opcheck`` see what they know. A third derivative raises: a raw kernel without a derivative of
its own would silently be a constant to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad

from egnn_fast.operators.registry import kernels_of
from egnn_fast.operators.signature import Signature

MAX_ORDER_MESSAGE = (
    "egnn_fast: the fused operators support derivatives up to the second order; "
    "for higher orders use backend='reference'"
)
FORWARD_MODE_MESSAGE = (
    "egnn_fast: the fused operators have no forward-mode derivative (jvp, jacfwd, hessian); "
    "use reverse mode (vjp, jacrev) or backend='reference'"
)

F = TypeVar("F", bound=type[torch.autograd.Function])
Tensors = Sequence[Tensor | None]

lib = torch.library.Library("egnn_fast", "DEF")


class _Function(torch.autograd.Function):
    """What all Functions here share: vmap by a loop, no forward mode."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError("egnn_fast: vmap needs a batch of at least 1, got 0")
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


class Operator:
    """An operator with two derivatives; call it like a function.

    Parameters
    ----------
    signature : Signature
        Its arguments and results.
    fake : callable
        Empty outputs and constants for the arguments.
    double_backward : callable
        Takes ``(cotangents, *the derivative's arguments, needed, needed2)``; returns the gradients
        that ``needed2`` marks among the outputs' cotangents and the inputs.
    """

    def __init__(
        self,
        signature: Signature,
        *,
        fake: Callable[..., tuple[Tensor, ...]],
        double_backward: Callable[..., list[Tensor]],
    ) -> None:
        self.signature, name = signature, signature.name
        self.outputs, self.constants = len(signature.outputs), len(signature.constants)
        self.n_inputs, self.n_tensors = signature.n_inputs, signature.n_tensors
        results = ", ".join(["Tensor"] * (self.outputs + self.constants))
        lib.define(f"{name}({signature.schema}) -> ({results})")
        lib.define(f"{name}_backward({signature.backward_schema}, bool[] needed) -> Tensor[]")
        lib.define(
            f"{name}_double_backward(Tensor?[] cotangents, {signature.backward_schema}, "
            "bool[] needed, bool[] needed2) -> Tensor[]"
        )
        space = torch.ops.egnn_fast
        self.op = getattr(space, name).default
        self.backward_op = getattr(space, f"{name}_backward").default
        self.double_backward_op = getattr(space, f"{name}_double_backward").default
        self.function = _first_order(self)
        self.backward_function = _second_order(self)
        self.double_backward_function = _last_order(self)
        for device in ("CPU", "CUDA"):
            lib.impl(name, self._run, device)
            lib.impl(f"{name}_backward", self._run_backward, device)
        lib.impl(f"{name}_double_backward", double_backward, "CompositeExplicitAutograd")
        lib.impl(name, self._autograd, "Autograd")
        lib.impl(f"{name}_backward", self._backward_autograd, "Autograd")
        lib.impl(f"{name}_double_backward", self._double_backward_autograd, "Autograd")
        torch.library.register_fake(f"egnn_fast::{name}", fake, lib=lib)
        torch.library.register_fake(f"egnn_fast::{name}_backward", self._backward_fake, lib=lib)
        torch.library.register_fake(
            f"egnn_fast::{name}_double_backward", self._double_backward_fake, lib=lib
        )

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Run the operator: its outputs, then its constants."""
        return transformable(self.function, self.op, *args)

    def backward(
        self, wanted: Sequence[bool], cotangents: Tensors, saved: Tensors, scalars: Sequence[Any]
    ) -> list[Tensor | None]:
        """The derivative, differentiable itself: a gradient or None for each input.

        ``saved`` holds the constants, the inputs and the graph's tensors.
        """
        if are_batched(cotangents):
            return over_batch(lambda each: self.backward(wanted, each, saved, scalars), cotangents)
        inputs = saved[self.constants : self.constants + self.n_inputs]
        needed = self.signature.reached(wanted, cotangents, inputs)
        if all(g is None for g in cotangents) or not any(needed):
            return [None] * self.n_inputs
        found = transformable(
            self.backward_function, self.backward_op, *cotangents, *saved, *scalars, needed
        )
        return spread(found, needed)

    def double_backward_flat(self, n_cotangents: int, *args: Any) -> list[Tensor]:
        """The operator for a Function, which sees tensors only where they are no list."""
        return self.double_backward_op(list(args[:n_cotangents]), *args[n_cotangents:])

    def _run(self, *args: Any) -> tuple[Tensor, ...]:
        backend = args[self.signature.index("backend")]
        results: tuple[Tensor, ...] = getattr(kernels_of(backend), self.signature.name)(*args)
        return results

    def _run_backward(self, *args: Any) -> list[Tensor]:
        kernels = kernels_of(args[self.outputs + self.constants + self.signature.index("backend")])
        grads: list[Tensor] = getattr(kernels, f"{self.signature.name}_backward")(*args)
        return grads

    def _autograd(self, *args: Any) -> tuple[Tensor, ...]:
        run = self.function.apply if wants_grad(*args) else self.function.forward
        return run(*args)

    def _backward_autograd(self, *args: Any) -> list[Tensor]:
        function = self.backward_function
        return list((function.apply if wants_grad(*args) else function.forward)(*args))

    def _double_backward_autograd(
        self, cotangents: Sequence[Tensor | None], *args: Any
    ) -> list[Tensor]:
        function = self.double_backward_function
        flat = (len(cotangents), *cotangents, *args)
        return list((function.apply if wants_grad(*flat) else function.forward)(*flat))

    def _backward_fake(self, *args: Any) -> list[Tensor]:
        first = self.outputs + self.constants
        return _empty_like(args[first : first + self.n_inputs], args[-1])

    def _double_backward_fake(self, cotangents: Any, *args: Any) -> list[Tensor]:
        first = self.outputs + self.constants
        return _empty_like((*args[: self.outputs], *args[first : first + self.n_inputs]), args[-1])


def transformable(function: type[torch.autograd.Function], operator: Any, *args: Any) -> Any:
    """Run an operator, by way of its Function where a torch.func transform is active.

    The transforms take a Function apart level by level, but only if they meet it before the
    dispatcher does.
    """
    if (
        not torch.compiler.is_compiling()
        and torch._C._are_functorch_transforms_active()
        # functionalize knows operators alone
        and peek_interpreter_stack().key() != TransformType.Functionalize
    ):
        return function.apply(*args)
    return operator(*args)


def are_batched(tensors: Tensors) -> bool:
    """Whether derivatives are asked for in a batch, by ``is_grads_batched`` or ``vectorize``.

    They use PyTorch's older vmap, which does not know a Function's vmap rule.
    """
    return any(t is not None and is_legacy_batchedtensor(t) for t in tensors)


def over_batch(
    run: Callable[[Tensors], Sequence[Tensor | None]], cotangents: Tensors
) -> list[Tensor | None]:
    """``run`` for each element of such a batch, one after the other; the results as a batch."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    given = [None if t is None else torch._remove_batch_dim(t, level, 1, 0) for t in cotangents]
    size = max(t.shape[0] for t in given if t is not None)
    runs = [
        run([None if t is None else t[k if t.shape[0] > 1 else 0] for t in given])
        for k in range(size)
    ]
    stacked = (None if each[0] is None else torch.stack(each) for each in zip(*runs, strict=True))
    return [None if t is None else torch._add_batch_dim(t, 0, level) for t in stacked]


def _first_order(operator: Operator) -> type[_Function]:
    outputs, n_inputs, n_tensors = operator.outputs, operator.n_inputs, operator.n_tensors

    class Forward(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            constants = output[outputs:]
            ctx.mark_non_differentiable(*constants)
            ctx.save_for_backward(*constants, *inputs[:n_tensors])
            ctx.scalars = inputs[n_tensors:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            found = operator.backward(
                ctx.needs_input_grad[:n_inputs], grads[:outputs], ctx.saved_tensors, ctx.scalars
            )
            return (*found, *(None,) * (n_tensors - n_inputs + len(ctx.scalars)))

    return named(Forward, f"EgnnFast_{operator.signature.name}")


def _second_order(operator: Operator) -> type[_Function]:
    outputs, constants, n_inputs = operator.outputs, operator.constants, operator.n_inputs
    n_tensors = outputs + constants + operator.n_tensors

    class Backward(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                return tuple(operator.backward_op(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[:n_tensors])
            ctx.scalars = inputs[n_tensors:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            wanted, saved, scalars = ctx.needs_input_grad, ctx.saved_tensors, ctx.scalars
            if are_batched(cotangents):
                return tuple(over_batch(lambda each: run(wanted, each, saved, scalars), cotangents))
            return run(wanted, cotangents, saved, scalars)

    def run(
        wanted: Sequence[bool], cotangents: Tensors, saved: Tensors, scalars: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        first = outputs + constants
        diff = slice(first, first + n_inputs)
        reached = operator.signature.reached(wanted[diff], saved[:outputs], saved[diff])
        needed2 = [*wanted[:outputs], *reached]
        rest = (None,) * (n_tensors - first - n_inputs + len(scalars))
        if all(c is None for c in cotangents) or not any(needed2):
            return (None,) * (first + n_inputs) + rest
        found = transformable(
            operator.double_backward_function, operator.double_backward_flat,
            len(cotangents), *cotangents, *saved, *scalars, needed2,
        )  # fmt: skip
        places = spread(found, needed2)
        return (*places[:outputs], *(None,) * constants, *places[outputs:], *rest)

    return named(Backward, f"EgnnFast_{operator.signature.name}_backward")


def _last_order(operator: Operator) -> type[_Function]:
    class DoubleBackward(_Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                return tuple(operator.double_backward_flat(*args))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            raise NotImplementedError(MAX_ORDER_MESSAGE)

    return named(DoubleBackward, f"EgnnFast_{operator.signature.name}_double_backward")


def named(function: F, name: str) -> F:
    """Give a Function the name by which profiles and ``grad_fn`` call it."""
    node: Any = function._backward_cls
    function.__name__ = function.__qualname__ = name
    node.__name__ = node.__qualname__ = f"{name}Backward"
    return function


def spread(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """A tensor for each needed place, in order, and None for the others."""
    rest = iter(tensors)
    return [next(rest) if n else None for n in needed]


def _empty_like(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, needed, strict=True) if need]


def wants_grad(*args: Any) -> bool:
    """Whether a derivative may be asked for with respect to one of the tensors among ``args``."""
    # a forward-mode tangent must meet its Function too, which refuses it
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    )

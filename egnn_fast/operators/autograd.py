"""Makes PyTorch operators of a kernel and its derivatives.

Each :class:`Operator` registers three operators: ``name``, its derivative ``name_backward`` and the
derivative of that, ``name_double_backward``. They take and return tensors and scalars only. Each
has a fake for tracing and an autograd Function at the Autograd key, so that ``torch.compile``,
``torch.export``, ``torch.func`` and ``opcheck`` work. A third derivative raises an error: autograd
would otherwise treat the double backward as a constant and return wrong gradients.

Private names of PyTorch used here, seen in releases 2.11 to 2.13. In a release without one of them:

- ``torch._C._functorch`` with ``TransformType``, ``is_legacy_batchedtensor`` and
  ``peek_interpreter_stack``: ImportError when this module is imported.
- ``torch.autograd.Function._backward_cls``: AttributeError when an operator is made, so when
  :mod:`egnn_fast.operators.messages` is imported.
- ``torch._C._AutoDispatchBelowAutograd``, ``torch._C._are_functorch_transforms_active`` and
  ``torch.autograd.forward_ad._current_level``: AttributeError at every call of an operator.
- ``torch._C._vmapmode_increment_nesting``, ``torch._C._vmapmode_decrement_nesting``,
  ``torch._remove_batch_dim`` and ``torch._add_batch_dim``: AttributeError in a backward with
  ``is_grads_batched`` or ``vectorize``.
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

FunctionType = TypeVar("FunctionType", bound=type[torch.autograd.Function])
Tensors = Sequence[Tensor | None]

lib = torch.library.Library("egnn_fast", "DEF")


class _Function(torch.autograd.Function):
    """The base of all Functions here: vmap runs a loop, forward mode raises an error."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError("egnn_fast: vmap needs a batch of at least 1, got 0")
        runs = [
            cls.apply(*(_element(a, dim, k) for a, dim in zip(args, in_dims, strict=True)))
            for k in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
        return outputs, (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE_MESSAGE)


def _element(argument: Any, dim: int | None, k: int) -> Any:
    """Element k of an argument's batch, which is its dimension ``dim``; None: no batch."""
    return argument.select(dim, k) if isinstance(dim, int) else argument


class Operator:
    """An operator that can be differentiated twice; call it like a function.

    Parameters
    ----------
    signature : Signature
        Its arguments and results.
    fake : callable
        Takes the operator's arguments; returns empty outputs and constants of the right shapes.
    double_backward : callable
        The derivative of ``name_backward``. Takes the cotangents of its results, its arguments
        (the last one is ``needed``) and ``needed2``. ``needed2`` has a bool for each cotangent of
        the operator's outputs, then one for each input; returns the gradients of those that are
        True.
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
        self.function = _forward_function(self)
        self.backward_function = _backward_function(self)
        self.double_backward_function = _double_backward_function(self)
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
        """Run the operator; returns its outputs, then its constants."""
        return call_transformable(self.function, self.op, *args)

    def backward(
        self, wanted: Sequence[bool], cotangents: Tensors, saved: Tensors, scalars: Sequence[Any]
    ) -> list[Tensor | None]:
        """Run the derivative, which can be differentiated itself.

        Parameters
        ----------
        wanted : sequence of bool
            For each input, whether its gradient is asked for.
        cotangents : sequence of Tensor or None
            The gradients of the outputs.
        saved : sequence of Tensor or None
            The constants, the inputs and the graph's tensors.
        scalars : sequence
            The operator's scalars.

        Returns
        -------
        A gradient for each input, or None if it is not asked for or no cotangent reaches the input.
        """
        if are_legacy_batched(cotangents):
            return map_legacy_batch(
                lambda each: self.backward(wanted, each, saved, scalars), cotangents
            )
        inputs = saved[self.constants : self.constants + self.n_inputs]
        needed = self.signature.reached(wanted, cotangents, inputs)
        if all(g is None for g in cotangents) or not any(needed):
            return [None] * self.n_inputs
        grads = call_transformable(
            self.backward_function, self.backward_op, *cotangents, *saved, *scalars, needed
        )
        return fill_none(grads, needed)

    def double_backward_flat(self, n_cotangents: int, *args: Any) -> list[Tensor]:
        """``double_backward_op`` for a Function, which does not see tensors inside a list."""
        return self.double_backward_op(list(args[:n_cotangents]), *args[n_cotangents:])

    # What the dispatcher calls. _run and _run_backward call the kernels. The *_autograd methods
    # run at the Autograd key: they record the call if needed, then go on below that key.

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


def call_transformable(function: type[torch.autograd.Function], operator: Any, *args: Any) -> Any:
    """Run an operator; if a torch.func transform is active, by ``apply`` of its Function.

    A transform handles a Function only if ``apply`` is called before the dispatcher: at the
    Autograd key it is too late.
    """
    if (
        not torch.compiler.is_compiling()
        and torch._C._are_functorch_transforms_active()
        # functionalize handles operators, but no Functions
        and peek_interpreter_stack().key() != TransformType.Functionalize
    ):
        return function.apply(*args)
    return operator(*args)


def are_legacy_batched(tensors: Tensors) -> bool:
    """Whether one of the tensors is a batch of ``is_grads_batched`` or ``vectorize``.

    Both use PyTorch's older vmap, which ignores a Function's vmap rule.
    """
    return any(t is not None and is_legacy_batchedtensor(t) for t in tensors)


def map_legacy_batch(
    run: Callable[[Tensors], Sequence[Tensor | None]], cotangents: Tensors
) -> list[Tensor | None]:
    """Call ``run`` for each element of a batch of the older vmap; returns a batch of results."""
    # the number of open vmaps can be read only by opening one
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # a tensor that is not batched gets a batch of size 1
    batches = [None if t is None else torch._remove_batch_dim(t, level, 1, 0) for t in cotangents]
    size = max(t.shape[0] for t in batches if t is not None)
    runs = [
        run([None if t is None else t[k if t.shape[0] > 1 else 0] for t in batches])
        for k in range(size)
    ]
    stacked = (None if each[0] is None else torch.stack(each) for each in zip(*runs, strict=True))
    return [None if t is None else torch._add_batch_dim(t, 0, level) for t in stacked]


def _forward_function(operator: Operator) -> type[_Function]:
    """The Function of an operator."""
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
            input_grads = operator.backward(
                ctx.needs_input_grad[:n_inputs], grads[:outputs], ctx.saved_tensors, ctx.scalars
            )
            return (*input_grads, *(None,) * (n_tensors - n_inputs + len(ctx.scalars)))

    return set_name(Forward, f"EgnnFast_{operator.signature.name}")


def _backward_function(operator: Operator) -> type[_Function]:
    """The Function of an operator's derivative."""
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
            if are_legacy_batched(cotangents):
                return tuple(
                    map_legacy_batch(
                        lambda each: double_backward(wanted, each, saved, scalars), cotangents
                    )
                )
            return double_backward(wanted, cotangents, saved, scalars)

    def double_backward(
        wanted: Sequence[bool], cotangents: Tensors, saved: Tensors, scalars: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        # arguments of the derivative: the outputs' cotangents, the constants, the inputs, ...
        first = outputs + constants
        inputs = slice(first, first + n_inputs)
        reached = operator.signature.reached(wanted[inputs], saved[:outputs], saved[inputs])
        needed2 = [*wanted[:outputs], *reached]
        rest = (None,) * (n_tensors - first - n_inputs + len(scalars))
        if all(c is None for c in cotangents) or not any(needed2):
            return (None,) * (first + n_inputs) + rest
        results = call_transformable(
            operator.double_backward_function, operator.double_backward_flat,
            len(cotangents), *cotangents, *saved, *scalars, needed2,
        )  # fmt: skip
        grads = fill_none(results, needed2)
        return (*grads[:outputs], *(None,) * constants, *grads[outputs:], *rest)

    return set_name(Backward, f"EgnnFast_{operator.signature.name}_backward")


def _double_backward_function(operator: Operator) -> type[_Function]:
    """The Function of the second derivative; its own derivative raises an error."""

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

    return set_name(DoubleBackward, f"EgnnFast_{operator.signature.name}_double_backward")


def set_name(function: FunctionType, name: str) -> FunctionType:
    """Set the name of a Function in profiles and in ``grad_fn``; returns the Function."""
    node: Any = function._backward_cls
    function.__name__ = function.__qualname__ = name
    node.__name__ = node.__qualname__ = f"{name}Backward"
    return function


def fill_none(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """A list as long as ``needed``: the tensors, in order, where it is True, None elsewhere."""
    remaining = iter(tensors)
    return [next(remaining) if need else None for need in needed]


def _empty_like(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, needed, strict=True) if need]


def wants_grad(*args: Any) -> bool:
    """Whether autograd has to record a call with these arguments."""
    # in forward mode too: the Function must be applied to raise its error
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    )

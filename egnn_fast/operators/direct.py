"""Direct calls: eager calls on plain CPU tensors that go straight to the kernel.

For a small graph PyTorch's dispatcher takes as long as the kernel. Ordinary calls do without it;
all others (in traces, transforms and modes) go through the operator. Nothing is cached: each call
checks its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from egnn_fast.backends.cpu import dense_record
from egnn_fast.operators.autograd import Operator, Tensors, are_batched, named, wants_grad
from egnn_fast.operators.budget import activation_budget
from egnn_fast.runtime import native
from egnn_fast.runtime.eager import transforming


def direct_calls_allowed() -> bool:
    """Whether calls on plain tensors may go straight to the kernel at this moment.

    Not without the extension, nor in traces, transforms and modes, nor under autocast, the profiler
    or forward-mode differentiation: the operator handles those.
    """
    return (
        not transforming()
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
        and not torch.is_autocast_enabled("cpu")
        and native.core is not None
    )


def is_direct(tensors: Tensors) -> bool:
    """Whether a call on these tensors, some of them None, may go straight to the kernel."""
    return direct_calls_allowed() and native.core.are_plain(tensors)  # type: ignore[union-attr]


class Call(NamedTuple):
    """A call of an operator on the CPU.

    Attributes
    ----------
    operator : Operator
        Gives the derivatives that are to be differentiated themselves.
    kernel : MessagesKernel or LayerKernel
        See :mod:`egnn_fast.backends.cpu`.
    scalars : tuple
        The operator's.
    """

    operator: Operator
    kernel: Any
    scalars: tuple[Any, ...]

    def forward(self, record: Any, tensors: Sequence[Any], keep: bool) -> tuple[Tensor | None, ...]:
        """The operator's outputs, None for those that the layer lacks; the constants last.

        ``record`` is that of ``tensors``, the dense inputs and the graph's four tensors.
        """
        size = self.kernel.kept_size(record) if keep else None
        if size and size * tensors[0].element_size() > activation_budget():
            size = 0
        outputs: tuple[Tensor | None, ...] = self.kernel.forward(record, tensors, size)
        return outputs

    def backward(
        self, wanted: Sequence[bool], cotangents: Tensors, saved: tuple[Any, ...]
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs; ``saved`` holds the constants, inputs and graph tensors."""
        operator, kernel = self.operator, self.kernel
        # second derivatives, and tensors that are no longer plain, go through the operator
        if (
            not torch.is_grad_enabled()
            and not are_batched(cotangents)
            and is_direct((*saved, *cotangents))
        ):
            constants, tensors = saved[: operator.kept], saved[operator.kept :]
            needed = operator.reached(wanted, cotangents, tensors[: operator.n_diff])
            if not any(needed) or all([g is None for g in cotangents]):  # noqa: C419 (faster)
                return (None,) * operator.n_diff
            record, dense = dense_record(kernel, tensors)
            if record is not None:
                found: list[Tensor | None] | None = kernel.backward(
                    record, cotangents, constants, dense, needed
                )
                if found is not None:
                    return found
        # the operator also raises the error for tensors that do not fit
        return operator.backward(wanted, cotangents, saved, self.scalars)


class DirectWay:
    """Calls an operator's kernel directly, with the operator's derivatives.

    Parameters
    ----------
    operator : Operator
    kernel : type
        ``MessagesKernel`` or ``LayerKernel``.
    """

    def __init__(self, operator: Operator, kernel: Callable[..., Any]) -> None:
        self._operator, self._kernel = operator, kernel
        self._apply = _differentiable(operator)

    def __call__(
        self,
        inputs: Sequence[Any],
        parts: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        *,
        checked: bool = True,
    ) -> Sequence[Tensor | None] | None:
        """The differentiable outputs, None for those that the layer lacks.

        ``parts`` are the graph's tensors. ``checked`` says that the arguments are known to be
        right, so that strided ones may be copied. Returns None if the call cannot be direct, or has
        no record.
        """
        given = (*inputs, *parts)
        rowptr = parts[0]
        # tensors of a graph without nodes have no addresses: the operator handles them
        if rowptr is None or rowptr.shape[0] == 1 or not is_direct(given):
            return None
        call = Call(self._operator, self._kernel(scalars), scalars)
        if checked:
            record, tensors = dense_record(call.kernel, given)
        else:  # they may be wrong, and of any size: they are not copied
            record, tensors = call.kernel.record(given), given
        if record is None:
            return None
        if wants_grad(*inputs):
            return self._apply(call, record, tensors, parts, *inputs)
        return call.forward(record, tensors, keep=False)[: self._operator.outputs]


def _differentiable(operator: Operator) -> Callable[..., Sequence[Tensor | None]]:
    """``function(call, record, tensors, parts, *inputs)``: a call that may be differentiated."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            call: Call,
            record: Any,
            tensors: Sequence[Any],
            parts: tuple[Any, ...],
            *inputs: Any,
        ) -> tuple[Tensor | None, ...]:
            found = call.forward(record, tensors, keep=True)
            ctx.call = call
            ctx.set_materialize_grads(False)
            # as the operator's Function saves them, so that a recomputation may go either way
            ctx.save_for_backward(*found[operator.outputs :], *inputs, *parts)
            return found[: operator.outputs]

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            found = ctx.call.backward(ctx.needs_input_grad[4:], cotangents, ctx.saved_tensors)
            return (None, None, None, None, *found)

    named(Direct, operator.function.__name__)
    # Function.apply in Python looks at each argument for transforms, of which there are none here
    return super(torch.autograd.Function, Direct).apply

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

from egnn_fast._cpu import NoAddress, fits
from egnn_fast.budget import activation_budget
from egnn_fast.eager import PLAIN_OR_NONE, transforming
from egnn_fast.operators import Operator, Tensors, are_batched, named, wants_grad


def is_direct(tensors: Tensors) -> bool:
    """Whether a call on these tensors, some of them None, may go straight to the kernel.

    Autocast, profiles and forward-mode derivatives need the operator, as all transforms do.
    """
    return (
        not transforming()
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
        and not torch.is_autocast_enabled("cpu")
        and PLAIN_OR_NONE.issuperset(map(type, tensors))
        and not any(map(Tensor.is_neg, [t for t in tensors if t is not None]))
    )


class Call(NamedTuple):
    """A call of an operator on the CPU.

    Attributes
    ----------
    operator : Operator
        Gives the derivatives that are to be differentiated themselves.
    kernel : MessagesKernel or LayerKernel
        See :mod:`egnn_fast._cpu`.
    num_edges : int
        The graph's.
    scalars : tuple
        The operator's.
    """

    operator: Operator
    kernel: Any
    num_edges: int
    scalars: tuple[Any, ...]

    def forward(self, tensors: Sequence[Any], keep: bool) -> tuple[Tensor | None, ...]:
        """The operator's outputs, None for those that the layer lacks; the constants last.

        ``tensors`` are its inputs and the graph's four tensors.
        """
        tensors = self.kernel.dense(tensors)
        record = self.kernel.record(tensors)
        size = self.kernel.kept_size(record, self.num_edges) if keep else 0
        if size and size * tensors[0].element_size() > activation_budget():
            size = 0
        outputs: tuple[Tensor | None, ...] = self.kernel.forward(record, *tensors[:2], size)
        return outputs

    def backward(
        self, wanted: Sequence[bool], cotangents: Tensors, saved: tuple[Any, ...], hooked: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs; ``saved`` holds the constants, inputs and graph tensors."""
        operator, kernel = self.operator, self.kernel
        # what is to be differentiated once more is the operator's, and what is not plain now
        direct = not torch.is_grad_enabled() and not are_batched(cotangents)
        if not direct or not is_direct((*saved, *cotangents)):
            return operator.backward(wanted, cotangents, saved, self.scalars)
        constants, tensors = saved[: operator.kept], saved[operator.kept :]
        inputs = tensors[: operator.n_diff]
        needed = operator.reached(wanted, cotangents, inputs)
        if not any(needed) or all([g is None for g in cotangents]):  # noqa: C419 (faster)
            return (None,) * operator.n_diff
        if hooked or not fits(kernel, constants, tensors, self.num_edges):
            kernel.check(tensors, (*cotangents, *constants))
        try:
            found: list[Tensor | None] = kernel.backward(
                cotangents, constants, kernel.dense(tensors), needed
            )
        except NoAddress:  # a lazy zero, which the dispatcher fills, or an error to be named
            return operator.backward(wanted, cotangents, saved, self.scalars)
        return found


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
        self._apply = _recorded(operator)

    def __call__(
        self,
        inputs: Sequence[Any],
        parts: tuple[Tensor | None, ...],
        num_edges: int,
        scalars: tuple[Any, ...],
    ) -> Sequence[Tensor | None]:
        """The operator's outputs that take part in derivatives; None for what the layer lacks.

        ``parts`` are the graph's tensors. :func:`is_direct` holds for them and the inputs.
        """
        kernel = self._kernel(inputs, scalars)
        call = Call(self._operator, kernel, num_edges, scalars)
        try:
            if wants_grad(*inputs):
                return self._apply(call, parts, *inputs)
            return call.forward((*inputs, *parts), keep=False)[: self._operator.outputs]
        except NoAddress:  # a lazy zero, which the dispatcher fills, or an error to be named
            return self._operator(*inputs, *parts, *scalars)[: self._operator.outputs]


def _recorded(operator: Operator) -> Callable[..., Sequence[Tensor | None]]:
    """``function(call, parts, *inputs)``: the outputs of a call that may be differentiated."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, call: Call, parts: tuple[Any, ...], *inputs: Any
        ) -> tuple[Tensor | None, ...]:
            tensors = (*inputs, *parts)
            found = call.forward(tensors, keep=True)
            ctx.call = call
            ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            ctx.set_materialize_grads(False)
            # as the operator's Function saves them, so that a recomputation may go either way
            ctx.save_for_backward(*found[operator.outputs :], *tensors)
            return found[: operator.outputs]

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            call, wanted = ctx.call, ctx.needs_input_grad[2:]
            return (None, None, *call.backward(wanted, cotangents, ctx.saved_tensors, ctx.hooked))

    named(Direct, operator.function.__name__)
    # Function.apply in Python looks at each argument for transforms, of which there are none here
    return super(torch.autograd.Function, Direct).apply

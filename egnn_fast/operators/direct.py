"""Direct calls: eager calls on plain CPU tensors that go straight to the kernel.

For a small graph PyTorch's dispatcher takes as long as the kernel. Ordinary calls do without it;
all others (in traces, transforms and modes) go through the operator. Nothing is cached: each call
checks its own tensors.

Private names of PyTorch used here, seen in 2.11 to 2.13 (those of :mod:`egnn_fast.runtime.eager`
beside them): ``forward_ad._current_level``, ``torch._C._autograd._profiler_enabled`` and
``torch._C._FunctionBase.apply``. In a release without one of them no call is direct: all go through
the operator, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from egnn_fast.operators.autograd import Operator, Tensors, are_batched, named, wants_grad
from egnn_fast.operators.budget import activation_budget
from egnn_fast.operators.registry import kernels_of
from egnn_fast.runtime import native
from egnn_fast.runtime.eager import transforming

_profiling: Callable[[], bool] | None = getattr(torch._C._autograd, "_profiler_enabled", None)
# Function.apply in Python looks at each argument for transforms, of which a direct call has none
_base_apply = getattr(getattr(torch._C, "_FunctionBase", None), "apply", None)
_SUPPORTED = (
    _profiling is not None and _base_apply is not None and hasattr(forward_ad, "_current_level")
)


def direct_calls_allowed() -> bool:
    """Whether calls on plain tensors may go straight to the kernel at this moment.

    Not without the extension, nor in traces, transforms and modes, nor under autocast, the profiler
    or forward-mode differentiation: the operator handles those.
    """
    return (
        _SUPPORTED
        and not transforming()
        and forward_ad._current_level < 0
        and not _profiling()  # type: ignore[misc]
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

    def forward(self, record: Any, tensors: Sequence[Any], store: bool) -> Sequence[Tensor | None]:
        """The operator's outputs, None for those that the layer lacks; then its constants.

        ``record`` is that of ``tensors``, the dense inputs and the graph's four tensors.
        """
        size = self.kernel.stored_elements(record) if store else None
        if size and size * tensors[0].element_size() > activation_budget():
            size = 0
        results: Sequence[Tensor | None] = self.kernel.forward(record, tensors, size)
        return results

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
            constants, tensors = saved[: operator.constants], saved[operator.constants :]
            needed = operator.signature.reached(wanted, cotangents, tensors)
            if not any(needed) or all([g is None for g in cotangents]):  # noqa: C419 (faster)
                return (None,) * operator.n_inputs
            record, dense = kernel.dense_record(tensors)
            if record is not None:
                grads: list[Tensor | None] | None = kernel.backward(
                    record, cotangents, constants, dense, needed
                )
                if grads is not None:
                    return grads
        # the operator also raises the error for tensors that do not fit
        return operator.backward(wanted, cotangents, saved, self.scalars)


class DirectWay:
    """Calls an operator's CPU kernel directly, with the operator's derivatives.

    Parameters
    ----------
    operator : Operator
    kernel : str
        ``"MessagesKernel"`` or ``"LayerKernel"``, of the module with the CPU's kernels.
    """

    def __init__(self, operator: Operator, kernel: str) -> None:
        self._operator, self._kernel = operator, kernel
        self._apply = _differentiable(operator)

    def __call__(
        self,
        inputs: Sequence[Any],
        graph: tuple[Tensor | None, ...],
        scalars: tuple[Any, ...],
        *,
        checked: bool = True,
    ) -> Sequence[Tensor | None] | None:
        """The operator's outputs, None for those that the layer lacks.

        ``graph`` are the graph's tensors. ``checked`` says that the arguments are known to be
        right, so that strided ones may be copied. Returns None if the call cannot be direct, or has
        no record.
        """
        tensors: Sequence[Any] = (*inputs, *graph)
        rowptr = graph[0]
        # tensors of a graph without nodes have no addresses: the operator handles them
        if rowptr is None or rowptr.shape[0] == 1 or not is_direct(tensors):
            return None
        kernel = getattr(kernels_of("cpu"), self._kernel)(scalars)
        call = Call(self._operator, kernel, scalars)
        if checked:
            record, tensors = kernel.dense_record(tensors)
        else:  # they may be wrong, and of any size: they are not copied
            record = kernel.record(tensors)
        if record is None:
            return None
        if wants_grad(*inputs):
            return self._apply(call, record, tensors, graph, *inputs)
        return call.forward(record, tensors, store=False)[: self._operator.outputs]


def _differentiable(operator: Operator) -> Callable[..., Sequence[Tensor | None]]:
    """``function(call, record, tensors, graph, *inputs)``: a call that may be differentiated."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            call: Call,
            record: Any,
            tensors: Sequence[Any],
            graph: tuple[Any, ...],
            *inputs: Any,
        ) -> tuple[Tensor | None, ...]:
            results = call.forward(record, tensors, store=True)
            ctx.call = call
            ctx.set_materialize_grads(False)
            # as the operator's Function saves them, so that a recomputation may go either way
            ctx.save_for_backward(*results[operator.outputs :], *inputs, *graph)
            return tuple(results[: operator.outputs])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            grads = ctx.call.backward(ctx.needs_input_grad[4:], cotangents, ctx.saved_tensors)
            return (None, None, None, None, *grads)

    named(Direct, operator.function.__name__)
    if not _SUPPORTED:
        return Direct.apply
    return super(torch.autograd.Function, Direct).apply

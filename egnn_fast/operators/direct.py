"""Direct calls: ordinary calls on plain CPU tensors that skip PyTorch's dispatcher.

For a small graph the dispatcher takes as long as the kernel. All other calls (in traces, transforms
and modes) go through the operator. Nothing is cached: each call checks its own tensors.

Private names of PyTorch used here, seen in releases 2.11 to 2.13, beside those of
:mod:`egnn_fast.runtime.eager` and :mod:`egnn_fast.operators.autograd`:
``torch._C._autograd._profiler_enabled`` and ``torch._C._FunctionBase.apply``. In a release without
one of them no call is direct: all go through the operator, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from egnn_fast.operators.autograd import (
    Operator,
    Tensors,
    are_legacy_batched,
    set_name,
    wants_grad,
)
from egnn_fast.operators.budget import activation_budget
from egnn_fast.operators.registry import kernels_of
from egnn_fast.runtime import native
from egnn_fast.runtime.eager import transforming

_profiling: Callable[[], bool] | None = getattr(torch._C._autograd, "_profiler_enabled", None)
# Function.apply, in Python, searches the arguments for what transforms leave; a direct call has
# none of that, so it uses the apply in C++ of the base class
_base_apply = getattr(getattr(torch._C, "_FunctionBase", None), "apply", None)
_SUPPORTED = (
    _profiling is not None and _base_apply is not None and hasattr(forward_ad, "_current_level")
)


def direct_calls_allowed() -> bool:
    """Whether calls on plain tensors may now be direct.

    False without the extension, in traces, transforms and modes, and under autocast, the profiler
    or forward-mode differentiation: the operator handles those calls.
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
    """Whether a call on these tensors (or None) may be direct."""
    return direct_calls_allowed() and native.core.are_plain(tensors)  # type: ignore[union-attr]


class Call(NamedTuple):
    """A direct call of an operator's CPU kernel.

    Attributes
    ----------
    operator : Operator
        Runs the backward if that is not direct, for example if it is differentiated itself.
    kernel : MessagesKernel or LayerKernel
        See :mod:`egnn_fast.backends.cpu`.
    scalars : tuple
        The operator's scalars.
    """

    operator: Operator
    kernel: Any
    scalars: tuple[Any, ...]

    def forward(self, record: Any, tensors: Sequence[Any], store: bool) -> Sequence[Tensor | None]:
        """The operator's outputs, then its constants.

        Parameters
        ----------
        record : object
            The kernel's record of ``tensors``.
        tensors : sequence of Tensor or None
            The contiguous inputs and the graph's four tensors.
        store : bool
            Whether a backward may follow, so that constants are returned and activations stored.

        Returns
        -------
        A tensor for each output and constant; None for those that the layer does not have.
        """
        size = self.kernel.stored_elements(record) if store else None
        if size and size * tensors[0].element_size() > activation_budget():
            size = 0
        results: Sequence[Tensor | None] = self.kernel.forward(record, tensors, size)
        return results

    def backward(
        self, wanted: Sequence[bool], cotangents: Tensors, saved: tuple[Any, ...]
    ) -> Sequence[Tensor | None]:
        """The gradients of the inputs; arguments and result as for ``Operator.backward``."""
        operator, kernel = self.operator, self.kernel
        # a backward that is recorded for a second one needs the operator, and so do tensors that
        # are not plain any more
        if (
            not torch.is_grad_enabled()
            and not are_legacy_batched(cotangents)
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


class DirectOperator:
    """An operator that is called directly if possible; it has the operator's derivatives.

    Parameters
    ----------
    operator : Operator
        What is called.
    kernel : str
        Its class in :mod:`egnn_fast.backends.cpu`: ``"MessagesKernel"`` or ``"LayerKernel"``.
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
        """Call the kernel, if the call can be direct.

        Parameters
        ----------
        inputs : sequence of Tensor or None
            The operator's inputs.
        graph : tuple of Tensor or None
            The graph's four tensors.
        scalars : tuple
            The operator's scalars.
        checked : bool
            Whether the arguments are known to be right, so that strided tensors may be copied.

        Returns
        -------
        The operator's outputs, None for those that the layer does not have. None instead of all if
        the call cannot be direct, or the tensors do not fit each other.
        """
        tensors: Sequence[Any] = (*inputs, *graph)
        rowptr = graph[0]
        # without nodes the tensors have no elements, so no addresses: the operator handles them
        if rowptr is None or rowptr.shape[0] == 1 or not is_direct(tensors):
            return None
        kernel = getattr(kernels_of("cpu"), self._kernel)(scalars)
        call = Call(self._operator, kernel, scalars)
        if checked:
            record, tensors = kernel.dense_record(tensors)
        else:  # the tensors may be wrong and of any size, so they are not copied
            record = kernel.record(tensors)
        if record is None:
            return None
        if wants_grad(*inputs):
            return self._apply(call, record, tensors, graph, *inputs)
        return call.forward(record, tensors, store=False)[: self._operator.outputs]


def _differentiable(operator: Operator) -> Callable[..., Sequence[Tensor | None]]:
    """A function ``(call, record, tensors, graph, *inputs)`` that runs ``call`` under autograd.

    ``tensors`` are the contiguous inputs and graph tensors that ``record`` has the addresses of;
    ``graph`` and ``inputs`` are the caller's. Returns the outputs of ``Call.forward``.
    """

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
            # the same tensors as the operator's Function saves: a checkpoint may recompute a
            # direct call through the operator, or the other way round
            ctx.save_for_backward(*results[operator.outputs :], *inputs, *graph)
            return tuple(results[: operator.outputs])

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            grads = ctx.call.backward(ctx.needs_input_grad[4:], cotangents, ctx.saved_tensors)
            return (None, None, None, None, *grads)

    set_name(Direct, operator.function.__name__)
    if not _SUPPORTED:
        return Direct.apply
    return super(torch.autograd.Function, Direct).apply

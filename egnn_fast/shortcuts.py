"""The short way of a call: from its arguments straight to the CPU kernel.

Around a small graph's layer the checks of its arguments and PyTorch's dispatcher take longer than
the kernel. An eager call on ordinary tensors needs neither if a call like it has gone the long way
before: a :class:`Guard` recognises it, and a :class:`Plan` runs it. Everything else (traces,
transforms, modes, profiles, autocast, tensor subclasses, a backward that is to be differentiated)
goes the long way, through the operators, and so does every call where PyTorch has no such guard.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from egnn_fast.budget import activation_budget
from egnn_fast.graph import Graph
from egnn_fast.operators import Operator, Tensors, named

# PyTorch's own check of a compiled region's tensors: all of them in one call
TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

MOST_KINDS = 256  # of calls remembered at a time
Pick = Callable[[Sequence[Any]], tuple[Any, ...]]


def _keys(tensor: Tensor) -> int:
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


with torch.inference_mode():
    _inference_keys = _keys(torch.empty(0))
with torch.inference_mode(False):
    # of plain dense CPU tensors: no subclass, no lazy negation or conjugation, no transform
    _ORDINARY_KEYS = (_keys(torch.empty(0)), _inference_keys)


def ordinary() -> bool:
    """Whether nothing watches or rewrites the program, which then only wants its numbers."""
    return not (
        is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _is_ordinary(tensor: Any) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and _keys(tensor) in _ORDINARY_KEYS


class Guard:
    """Recognises tensors like those it was made of.

    The same ones are None; the others agree in type, dtype, device, ``requires_grad``, shape and
    strides. Nor have modes, transforms, autocast or inference mode come in between: they show in
    the keys by which PyTorch dispatches.

    Parameters
    ----------
    tensors : sequence of Tensor or None
        Ordinary ones.
    rows : set of int
        Places of those that may have any number of rows.
    any_strides : set of int
        Places of those whose strides do not count.
    """

    def __init__(
        self, tensors: Tensors, rows: Container[int], any_strides: Container[int] = ()
    ) -> None:
        places = [k for k, t in enumerate(tensors) if t is not None]
        absent = [k for k, t in enumerate(tensors) if t is None]
        self._present = pick(places)
        self._absent, self._nones = pick(absent), (None,) * len(absent)
        given: Any = self._present(tensors)
        sizes, strides = [], []
        for k, t in zip(places, given, strict=True):
            sizes.append([None if k in rows and d == 0 else n for d, n in enumerate(t.shape)])
            strides.append([None if k in any_strides else n for n in t.stride()])
        self._check = TensorGuards(
            *given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check

    def knows(self, tensors: Tensors) -> bool:
        """Whether these are such tensors."""
        return self._absent(tensors) == self._nones and self._check(*self._present(tensors))


def pick(places: Sequence[int]) -> Pick:
    """``pick(places)(values)`` is the tuple of the values in these places."""
    if not places:
        return lambda values: ()
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places)


def can_learn(tensors: Tensors) -> bool:
    """Whether the next call on tensors like these may go the short way."""
    return (
        TensorGuards is not None
        and ordinary()
        and not torch.is_autocast_enabled("cpu")
        and all(t is None or _is_ordinary(t) for t in tensors)
    )


class Memory:
    """The kinds of calls that have gone the long way, each with what it is to be answered by."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[Guard, Any]]] = {}
        self._count = 0

    def find(self, key: Hashable, tensors: Tensors) -> Any:
        """What was learned of such a call; None if there is nothing yet."""
        for guard, answer in self._known.get(key, ()):
            if guard.knows(tensors):
                return answer
        return None

    def learn(self, key: Hashable, tensors: Tensors, rows: Container[int], answer: Any) -> None:
        """Give this answer to such calls from now on."""
        guard = Guard(tensors, rows)
        # a guard takes no tensor twice
        if not guard.knows(tensors):
            return
        if self._count >= MOST_KINDS:
            self._known, self._count = {}, 0
        # what is newest is likeliest to be asked for
        self._known[key] = [(guard, answer), *self._known.get(key, ())]
        self._count += 1


class Plan:
    """How to run an operator's kernel for calls of one kind.

    Parameters
    ----------
    operator : Operator
        Gives the derivatives that are to be differentiated themselves.
    function : callable
        See :func:`short_function`.
    kernel : MessagesKernel or LayerKernel
        See :mod:`egnn_fast._cpu`.
    inputs : sequence
        The operator's differentiable inputs: ordinary ones, as the kernel reads them.
    scalars : tuple
        The operator's scalars.
    """

    def __init__(
        self,
        operator: Operator,
        function: Callable[..., tuple[Tensor, ...]],
        kernel: Any,
        inputs: Sequence[Any],
        scalars: tuple[Any, ...],
    ) -> None:
        self.operator, self.kernel, self.scalars = operator, kernel, scalars
        self._function = function
        self.places = [k for k, t in enumerate(inputs) if t is not None]
        self.present = pick(self.places)
        self._records = any(inputs[k].requires_grad for k in self.places)
        self._itemsize = inputs[0].element_size()
        # stands for what a call of this kind does not have
        self.nothing = inputs[1].new_empty((0, inputs[1].shape[1]))
        self._ways: dict[Hashable, _Way] = {}

    def run(self, inputs: Sequence[Any], graph: Graph) -> Sequence[Tensor]:
        """The operator's outputs for its differentiable inputs."""
        _, num_edges, parts = graph.parts()
        kernel, count = self.kernel, self.operator.outputs
        record = kernel.record((*inputs, *parts))
        if not (self._records and torch.is_grad_enabled()):
            found = kernel.forward(record, inputs[0], inputs[1], 0)[:count]
            return [self.nothing if t is None else t for t in found]
        size = kernel.kept_size(record, num_edges)
        if size and size * self._itemsize > activation_budget():
            size = 0
        found = kernel.forward(record, inputs[0], inputs[1], size)
        constants = [self.nothing if t is None else t for t in found[count:]]
        outputs = tuple([found[k] for k in kernel.outputs])
        outputs = self._function((self, outputs, constants, parts), *self.present(inputs))
        if len(outputs) == count:
            return outputs
        spread = [self.nothing] * count
        for k, t in zip(kernel.outputs, outputs, strict=True):
            spread[k] = t
        return spread

    def backward(
        self, wanted: tuple[bool, ...], cotangents: Tensors, saved: tuple[Any, ...]
    ) -> Sequence[Tensor | None]:
        """The gradients of those inputs that are not None.

        ``saved`` holds what was kept, these inputs and the graph's four tensors.
        """
        absent = tuple([g is None for g in cotangents])
        kind = (wanted, absent, saved[-3] is None, saved[-2] is None)
        way = self._ways.get(kind)
        if way is None:
            way = self._ways[kind] = _Way(self, wanted, cotangents, saved)
        if not way.targets:
            return (None,) * len(self.places)
        given, full = way.given((*cotangents, None)), way.full((*saved, None))
        if not torch.is_grad_enabled() and ordinary() and way.knows(saved, cotangents):
            return way.run(given, saved, full)
        return self.present(self.operator.backward(way.wanted, given, full, self.scalars))


class _Way:
    """The backward of a plan, for some gradients wanted and some cotangents given."""

    def __init__(
        self, plan: Plan, wanted: Sequence[bool], cotangents: Tensors, saved: tuple[Any, ...]
    ) -> None:
        operator, places = plan.operator, plan.places
        self._kernel, self._constants = plan.kernel, operator.kept
        first, count = operator.kept, operator.n_diff
        at = {place: first + k for k, place in enumerate(places)}
        outputs = {place: k for k, place in enumerate(plan.kernel.outputs)}
        # from what is there to the operator's whole lists; the last place is None
        self.given = pick([outputs.get(k, -1) for k in range(operator.outputs)])
        graph = range(len(saved) - 4, len(saved))
        self.full = pick([*range(first), *(at.get(k, -1) for k in range(count)), *graph])
        self.wanted = [k in at and wanted[at[k] - first] for k in range(count)]
        given, full = self.given((*cotangents, None)), self.full((*saved, None))
        self.targets: list[int] = []
        if any(g is not None for g in given):
            needed = operator.reached(self.wanted, given, full[first : first + count])
            self.targets = [k for k, need in enumerate(needed) if need]
        self._like = pick([at[k] for k in self.targets])
        found = {place: k for k, place in enumerate(self.targets)}
        self._gradients = pick([found.get(k, -1) for k in range(count)])
        self._results = pick([found.get(k, -1) for k in places])
        free = [at[k] for k in plan.kernel.NODE_ROWS if k in at]
        self._nodes = pick(free)
        edges = [at[k] for k in plan.kernel.EDGE_ROWS if k in at]
        ends = range(len(saved), len(saved) + len(cotangents))
        self._rows = {*range(first), *free, *edges, *graph, *ends}
        self._any_strides = ends
        self._guard: Guard | None = None

    def knows(self, saved: tuple[Any, ...], cotangents: Tensors) -> bool:
        """Whether the kernel may read these: hooks may have put something else in their place."""
        tensors = (*saved, *cotangents)
        if self._guard is None:
            if not can_learn(tensors):
                return False
            self._guard = Guard(tensors, self._rows, self._any_strides)
        if not self._guard.knows(tensors):
            return False
        return {tensor.shape[0] for tensor in self._nodes(saved)} == {saved[-4].shape[0] - 1}

    def run(
        self, given: Tensors, saved: tuple[Any, ...], full: tuple[Any, ...]
    ) -> tuple[Tensor | None, ...]:
        """The kernel's gradients of those inputs that are not None."""
        found = (*map(torch.empty_like, self._like(saved)), None)
        cotangents = [None if g is None else g.contiguous() for g in given]
        cotangents += full[: self._constants]
        self._kernel.backward(cotangents, full[self._constants :], self._gradients(found))
        return self._results(found)


def short_function(operator: Operator) -> Callable[..., tuple[Tensor, ...]]:
    """``function((plan, outputs, constants, graph parts), *inputs)``: the outputs, recorded."""

    class Short(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.plan, outputs, constants, parts = call
            ctx.set_materialize_grads(False)
            # in the order of the long way, so that a recomputation may take either
            ctx.save_for_backward(*constants, *tensors, *parts)
            found: tuple[Tensor, ...] = outputs
            return found

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            plan: Plan = ctx.plan
            wanted = ctx.needs_input_grad[1:]
            return (None, *plan.backward(wanted, cotangents, ctx.saved_tensors))

    named(Short, operator.function.__name__)
    # Function.apply in Python looks at each argument for transforms, of which there are none here
    return super(torch.autograd.Function, Short).apply

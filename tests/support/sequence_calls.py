"""One call of a sequence: how it is made, what surrounds it, and whether its results are right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import cycle
from typing import Any

import torch
from sequences import COUNT, LEFT_OUT, Edges, Layer, Record, Tensors, chosen, dense, numbers, place
from torch import Tensor
from torch.autograd import profiler_legacy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from egnn_fast import Graph, checks, set_activation_budget, use_backend

# (largest error, s): errors are relative to the tensor's largest element, but at least to s times
# the largest of all tensors that are judged together, because a sum that cancels loses digits.
# A wrong address gives errors of 1. Correct second derivatives in float32 have errors of up to
# 1e-4; bfloat16 has two digits.
BOUNDS = {"float64": (1e-11, 1e-2), "float32": (1e-3, 0.1), "bfloat16": (0.3, 1.0)}
LEAST = 0.1  # errors are relative to this size at least; the numbers are of size 1
COTANGENTS = (
    "dense",
    "zero",
    "lazy zero",
    "unused",
    "columns",
    "transposed",
    "rows",
    "same rows",
    "same columns",
    "negative",
)


@dataclass(frozen=True, repr=False)
class Way(Record):
    """How a call is made."""

    forms: tuple[str, ...] = ()  # of memory, for the tensors in turn; (): those of the call
    seed: int = 0
    what: str = "forward"  # see differentiate
    wanted: str = "all"
    cotangents: tuple[str, ...] = ("dense",)
    times: int = 1
    backend: str = "auto"
    budget: int | None = None
    around: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Call(Way):
    """What is asked of a layer, and how."""

    forms: tuple[str, ...] = ("dense",)
    face: str = "module"  # or "function", "edge pass"
    mode: str = "grad"
    requires: str = "all"
    mask: str | None = None
    node_mask: str | None = None
    no_outputs: bool = False

    def made(self, way: Way, **more: Any) -> Call:
        """This call, made in that way."""
        changed = {f.name: getattr(way, f.name) for f in fields(Way)}
        changed["forms"] = way.forms or self.forms
        return replace(self, **{**changed, **more})

    @property
    def records(self) -> bool:
        """Whether autograd records the call."""
        return self.mode == "grad"


class PassDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class PassFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _hooks(unpack: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack)


def _strided(t: Tensor) -> Tensor:
    spread = t.new_full((*t.shape, 2), 7 if not t.is_floating_point() else torch.nan)
    spread[..., 0] = t
    return spread[..., 0]


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "profiler": lambda: profiler_legacy.profile(),
    "dispatch mode": PassDispatch,
    "function mode": PassFunctions,
    "device cpu": lambda: torch.device("cpu"),
    "device meta": lambda: torch.device("meta"),
    "hooks clone": lambda: _hooks(Tensor.clone),
    "hooks strided": lambda: _hooks(_strided),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "checkpoint": nullcontext,  # around the layer alone: see forward
    "thread": nullcontext,  # around all: see inside
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def inside(call: Call, work: Callable[[], Any]) -> Any:
    """The result of ``work`` inside the blocks and modes of the call."""

    def enclosed() -> Any:
        with ExitStack() as stack:
            stack.enter_context(checks.poisoned_memory())
            stack.enter_context(use_backend(call.backend))
            if call.budget is not None:
                stack.enter_context(set_activation_budget(call.budget))
            stack.enter_context(MODES[call.mode]())
            for name in call.around:
                if name not in LEFT_OUT:
                    stack.enter_context(AROUND[name]())
            return work()

    if "thread" not in call.around:
        return enclosed()
    found: list[Any] = []
    failed: list[BaseException] = []

    def target() -> None:
        try:
            found.append(enclosed())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


class Begun:
    """A call whose forward has run."""

    def __init__(self, layer: Layer, edges: Edges, call: Call) -> None:
        self.layer, self.edges, self.call = layer, edges, call
        self.edits, self.edge_edits = layer.edits, edges.edits
        self.leaves = layer.leaves(call, edges)
        self.exact = {k: dense(t) for k, t in self.leaves.items()}
        # a Graph of its own: nothing is shared with the call
        self.exact_graph = Graph.from_edge_index(edges.dense(), edges.num_nodes)
        self.run()
        with MODES[call.mode]():
            self.right = layer.run(call, self.exact, self.exact_graph, True)

    def run(self) -> None:
        """Run the forward; also to repeat it."""
        COUNT.calls += 1
        self.outputs = inside(self.call, self.forward)

    def forward(self) -> Tensors:
        run, call = self.layer.run, self.call
        if "checkpoint" not in call.around:
            return run(call, self.leaves, self.edges.given, False)
        names: list[str] = []

        def outputs() -> tuple[Tensor, ...]:
            found = run(call, self.leaves, self.edges.given, False)
            names[:] = found
            return tuple(found.values())

        found = checkpoint(outputs, use_reentrant=False)
        return dict(zip(names, found, strict=True))

    def finish(self, call: Call, again: bool = False) -> None:
        """Differentiate and judge; ``again``: compare with the derivatives of the first time."""
        rule = "float32" if self.layer.kind.float32 else "float64"
        if "autocast" in self.call.around:
            rule = "bfloat16"
        judge(self.outputs, self.right, "outputs", rule)
        if call.what == "forward" or not (call.records and self.call.records):
            return
        forms = cycle(call.cotangents)
        used = [
            k
            for form, (k, t) in zip(forms, self.right.items(), strict=False)
            if form != "unused" and t.requires_grad
        ]
        wanted = [
            k
            for i, (k, t) in enumerate(self.leaves.items())
            if t.requires_grad and chosen(call.wanted, k, i)
        ]
        if not used or not wanted:
            return
        towards = [self.cotangent(call, i, k) for i, k in enumerate(used)]

        def found() -> dict[str, Tensors]:
            outputs, leaves = [self.outputs[k] for k in used], {k: self.leaves[k] for k in wanted}
            return differentiate(call, outputs, leaves, towards, self.layer.kind.dtype)

        if not again:
            outputs, leaves = [self.right[k] for k in used], {k: self.exact[k] for k in wanted}
            dense_towards = [dense(t) for t in towards]
            self.derivatives = differentiate(
                call, outputs, leaves, dense_towards, self.layer.kind.dtype
            )
        # the reference leaves out derivatives of constants: they are judged as zero
        for part, tensors in inside(call, found).items():
            judge(tensors, self.derivatives.get(part, {}), part, rule)

    def cotangent(self, call: Call, i: int, name: str) -> Tensor:
        form = call.cotangents[i % len(call.cotangents)]
        out = self.outputs[name]
        values = numbers(tuple(out.shape), call.seed + 20 + i).to(out.dtype)
        if form == "lazy zero":  # what PyTorch gives for the derivative of sgn
            return torch._efficientzerotensor(values.shape, dtype=values.dtype)
        return place(values, form) if form != "zero" else values.zero_()


def differentiate(
    call: Call,
    outputs: Sequence[Tensor],
    leaves: Tensors,
    towards: Sequence[Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensors]:
    """The derivatives that are asked for, of each kind by name."""

    def grads(of: Sequence[Any], by: Sequence[Any], at: Tensors, **how: Any) -> Tensors:
        found = torch.autograd.grad(of, list(at.values()), by, allow_unused=True, **how)
        return {k: t for k, t in zip(at, found, strict=True) if t is not None}

    if call.what == "backward":
        for t in leaves.values():
            t.grad = None
        torch.autograd.backward(outputs, towards, inputs=list(leaves.values()))
        return {"gradients": {k: t.grad for k, t in leaves.items() if t.grad is not None}}
    if call.what == "twice":
        first = grads(outputs, towards, leaves, retain_graph=True)
        return {"gradients": first, "gradients again": grads(outputs, towards, leaves)}
    if call.what == "batched":
        many = [torch.stack((t, -t, 2 * t)) for t in towards]
        return {"gradients": grads(outputs, many, leaves, is_grads_batched=True)}
    if call.what not in ("second", "force"):
        return {"gradients": grads(outputs, towards, leaves)}
    at = leaves
    if call.what == "force" and "x" in leaves:
        at = {"x": leaves["x"]}
    if call.what == "second":
        towards = [t.detach().clone().requires_grad_() for t in towards]
    first = grads(outputs, towards, at, create_graph=True)
    chain = {k: t for k, t in first.items() if t.requires_grad}
    if not chain:
        return {"gradients": first}
    directions = [
        numbers(tuple(t.shape), call.seed + 40 + i).to(dtype).to(t.dtype)
        for i, (k, t) in enumerate(at.items())
        if k in chain
    ]
    by = directions if call.what == "second" else [t.detach() for t in chain.values()]
    ends = leaves | {f"cotangent {i}": t for i, t in enumerate(towards) if t.requires_grad}
    return {"gradients": first, "second order": grads(list(chain.values()), by, ends)}


def judge(found: Tensors, right: Tensors, part: str, rule: str) -> None:
    """Assert that errors are within the bound; a missing gradient counts as zero."""
    bound, share = BOUNDS[rule]
    sizes = {k: float(t.detach().abs().max()) if t.numel() else 0.0 for k, t in right.items()}
    least = max(LEAST, share * max(sizes.values(), default=0.0))
    for name in {**right, **found}:
        a = found[name] if name in found else torch.zeros_like(right[name])
        b = right[name] if name in right else torch.zeros_like(a)
        assert a.shape == b.shape, f"{part}: {name} has shape {list(a.shape)}"
        if a.numel() == 0:
            continue
        error = float((a.detach().double() - b.detach()).abs().max())
        error /= max(sizes.get(name, 0.0), least) * bound
        assert error <= 1, f"{part}: {name} is off by {error * bound:.1e}, allowed {bound}"
        COUNT.note(f"{rule} {part}", error)


def perform(layer: Layer, edges: Edges, call: Call) -> None:
    """The call and its derivatives, as often as it says."""
    begun = Begun(layer, edges, call)
    begun.finish(call)
    for _ in range(call.times - 1):
        begun.run()
        begun.finish(call, again=True)


def transform(layer: Layer, edges: Edges, call: Call, which: str) -> None:
    """The gradient by x, or a batch of coordinates, by torch.func."""
    leaves = layer.leaves(call, edges)
    exact = {k: dense(t).requires_grad_(k == "x") for k, t in leaves.items()}
    graph = Graph.from_edge_index(edges.dense(), edges.num_nodes)
    COUNT.calls += 1
    rule = "float32" if layer.kind.float32 else "float64"
    if which == "vmap":

        def outputs(x: Tensor) -> Tensors:
            return layer.run(call, {**leaves, "x": x}, edges.given, False)

        many = torch.stack((leaves["x"], 2 * leaves["x"]))
        found = inside(call, lambda: torch.vmap(outputs)(many))
        both = [layer.run(call, {**exact, "x": dense(x)}, graph, True) for x in many]
        judge(found, {k: torch.stack([t[k] for t in both]) for k in both[0]}, "vmap", rule)
        return

    def value(t: Tensors, graph: Any, exact: bool) -> Tensor:
        found = layer.run(call, t, graph, exact)
        return sum(((k + 1) * t.square().sum() for k, t in enumerate(found.values())), t["x"].sum())

    def gradient() -> Tensors:
        by_x = torch.func.grad(lambda x: value({**leaves, "x": x}, edges.given, False))
        return {"x": by_x(leaves["x"])}

    found = inside(call, gradient)
    right = torch.autograd.grad(value(exact, graph, True), exact["x"])
    judge(found, {"x": right[0]}, "torch.func.grad", rule)

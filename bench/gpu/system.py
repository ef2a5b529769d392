"""Checks of how the kernels behave within PyTorch: same bits, CUDA graphs, compile, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.checks import EVERYTHING, ORDERS, at, judge_tensors, launched
from bench.gpu.setting import LEFT_OUT, Item, Outcome, Setting, autocast, deterministic, matmul
from egnn_fast import approximate_activations
from egnn_fast import nn as layers
from egnn_fast.checks import relative_error
from egnn_fast.checks.cases import Case
from egnn_fast.graph import Graph

RUNS = 5  # that must give the same bits
# bytes: many chunks of the edges of the case, and several of the few that the interpreter takes
_SMALL_CHUNK, _TINY_CHUNK = 4 << 20, 1 << 11
_WARM_UP = 3
_APPROXIMATE_ERROR = 1e-2  # an activation's is some 5e-4
Tensors = dict[str, Tensor]


def items(setting: Setting) -> Iterator[Item]:
    """All of them; on the CPU those that need no GPU."""
    precisions = ("highest", "bf16") if setting.on_gpu else ("highest",)
    for precision in precisions:
        for face in ("edge pass", "layer"):
            run = partial(_same_bits, face, precision)
            yield Item(f"same bits: {face}: {precision}", "checks", run)
        for kind in ("complete", "edge list"):
            run = partial(_cuda_graph, kind, precision)
            yield Item(f"CUDA graph: {kind}: {precision}", "checks", run)
            run = partial(_captured_first, kind, precision)
            yield Item(f"capture before any other call: {kind}: {precision}", "checks", run)
            run = partial(_graphed, kind, precision)
            yield Item(f"graphed: {kind}: {precision}", "checks", run)
            run = partial(_no_waiting, kind, precision)
            yield Item(f"no host synchronisation: {kind}: {precision}", "checks", run)
            run = partial(_compiled, kind, precision)
            yield Item(f"torch.compile: {kind}: {precision}", "checks", run, 40)
        for hidden in (64, 160) if setting.on_gpu else (16,):
            run = partial(_not_finite, hidden, precision)
            yield Item(f"NaN stays in its row: H {hidden}: {precision}", "checks", run)
        run = partial(_approximate, precision)
        yield Item(f"approximate activations: {precision}", "checks", run)


def _same_bits(face: str, precision: str, setting: Setting) -> Outcome:
    """Outputs and gradients of several runs, over several chunks of senders' sums."""
    from egnn_fast.backends.triton import call

    outcome = Outcome()
    nodes, edges, hidden = (6000, 500_000, 64) if setting.on_gpu else (12, 64, 16)
    case = Case(
        "same bits", "power", nodes, edges, hidden=hidden, attrs=1, options=EVERYTHING, mask="soft"
    )
    make: Callable[..., Any] = case.edge_pass if face == "edge pass" else case.layer
    problem = at(make(torch.float32, device=setting.device), precision, setting.device)

    def once() -> Tensors:
        leaves = {k: t.detach().clone().requires_grad_() for k, t in problem.leaves.items()}
        return _with_gradients(problem.run(leaves, "triton", 0), leaves)

    bytes_before = call.CHUNK_BYTES
    call.CHUNK_BYTES = _SMALL_CHUNK if setting.on_gpu else _TINY_CHUNK
    try:
        chunk = call.CHUNK_BYTES // (4 * (hidden + case.dim))
        if edges < 2 * chunk:
            outcome.fail(f"{edges} edges are a single chunk of {chunk}")
        with matmul(precision), deterministic(), launched(outcome, "forward", "backward"):
            first = once()
            for _ in range(RUNS - 1 if setting.on_gpu else 1):
                _compare_bits(outcome, first, once())
    finally:
        call.CHUNK_BYTES = bytes_before
    return outcome


def _with_gradients(outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Tensors:
    total = torch.stack([(t.float() * t.float()).sum() for t in outputs.values()]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return {k: t.detach() for k, t in outputs.items()} | named


def _compare_bits(outcome: Outcome, first: Tensors, again: Tensors) -> None:
    for name, right in first.items():
        if not bool(right.isfinite().all()):
            outcome.fail(f"{name} is not finite")
        if not torch.equal(right, again[name]):
            count = int((right != again[name]).sum())
            outcome.fail(f"{name}: {count} of {right.numel()} numbers differ between two runs")


class _Network:
    """A network of two layers and its inputs, on one backend or another."""

    def __init__(self, kind: str, setting: Setting) -> None:
        big = setting.on_gpu
        sizes = (5,) * 40 if big else (3, 2)
        nodes, edges, hidden = (500, 8000, 64) if big else (8, 40, 16)
        self.device = setting.device
        if kind == "complete":
            self.graph = Graph.complete(sizes, device=setting.device)
        else:
            case = Case(kind, nodes=nodes, edges=edges)
            self.graph = case.build_graph().to(setting.device)
        draw = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = layers.EGNN(
                4, hidden, 4, n_layers=2, attention=True, coord_norm=1.0, backend="triton"
            ).to(setting.device)
        count = self.graph.num_nodes
        self.inputs = {
            name: torch.randn(count, width, generator=draw).to(setting.device).requires_grad_()
            for name, width in (("h", 4), ("x", 3))
        }

    def like(self, backend: str, dtype: torch.dtype = torch.float32) -> _Network:
        """The same numbers on another backend or in another dtype."""
        other = object.__new__(_Network)
        other.device, other.graph = self.device, self.graph
        other.net = layers.EGNN(
            4, self.net.embedding_in.out_features, 4, n_layers=2, attention=True, coord_norm=1.0,
            backend=backend, dtype=dtype, device=self.device,
        )  # fmt: skip
        other.net.load_state_dict(self.net.state_dict())
        other.inputs = {k: t.detach().to(dtype).requires_grad_() for k, t in self.inputs.items()}
        return other

    def run(
        self, precision: str, net: nn.Module | None = None, order: Tensor | None = None
    ) -> Tensors:
        """Outputs, and gradients of inputs and weights; ``order``: the nodes in another order."""
        net = self.net if net is None else net  # the truth of a compiled one is not defined
        h, x, graph = self.inputs["h"], self.inputs["x"], self.graph
        if order is not None:
            h, x, back = h[order], x[order], order.argsort()
            graph = Graph.from_edge_index(back[graph.edge_index], graph.num_nodes)
        with autocast(precision, self.device):
            h, x = net(h, x, graph)
        if order is not None:
            h, x = h[back], x[back]
        return _with_gradients({"h": h, "x": x}, self.inputs | dict(self.net.named_parameters()))

    def expected(self, precision: str) -> tuple[list[Tensors], Tensors]:
        """Plain PyTorch at this precision, in several orders of summation, and the truth."""
        orders = [None] + [self._order(k) for k in range(ORDERS - 1)]
        return (
            [self.like("reference").run(precision, order=order) for order in orders],
            self.like("reference", torch.float64).run("highest"),
        )

    def _order(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randperm(self.graph.num_nodes, generator=draw).to(self.device)


def _cuda_graph(kind: str, precision: str, setting: Setting) -> Outcome:
    """Forward and backward, captured and replayed on other inputs, against a run without."""
    if not setting.on_gpu:
        return Outcome(LEFT_OUT, "needs a GPU")
    outcome, found = Outcome(), _Network(kind, setting)
    with matmul(precision), launched(outcome, "forward", "backward"):
        graph, held = captured(lambda: found.run(precision))
        with torch.no_grad():
            for t in found.inputs.values():
                t.mul_(1.25)
        graph.replay()
        torch.cuda.synchronize()
        replayed = {name: t.clone() for name, t in held.items()}
        plain, truth = found.expected(precision)
    judge_tensors(outcome, precision, "EGNN", f"CUDA graph, {kind}", replayed, plain, truth)
    return outcome


def _captured_first(kind: str, precision: str, setting: Setting) -> Outcome:
    """A graph whose first call is captured: later ones must not read what has no values yet."""
    if not setting.on_gpu:
        return Outcome(LEFT_OUT, "needs a GPU")
    outcome, found = Outcome(), _Network(kind, setting)
    with matmul(precision), launched(outcome, "forward", "backward"):
        found.run(precision)  # compiles
        like = _Network(kind, setting)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            like.run(precision)
        eager = like.run(precision)
        torch.cuda.synchronize()
        plain, truth = like.expected(precision)
    judge_tensors(outcome, precision, "EGNN", f"after a capture, {kind}", eager, plain, truth)
    return outcome


def _graphed(kind: str, precision: str, setting: Setting) -> Outcome:
    """``egnn_fast.nn.graphed``, called with other inputs than it was captured with."""
    if not setting.on_gpu:
        return Outcome(LEFT_OUT, "needs a GPU")
    outcome, found = Outcome(), _Network(kind, setting)
    with matmul(precision):
        with launched(outcome, "forward", "backward"), autocast(precision, found.device):
            run = layers.graphed(found.net, found.inputs["h"], found.inputs["x"], found.graph)
        with torch.no_grad():
            for t in found.inputs.values():
                t.mul_(1.25)
        with autocast(precision, found.device):
            h, x = run(found.inputs["h"], found.inputs["x"])
        leaves = found.inputs | dict(found.net.named_parameters())
        replayed = {k: t.clone() for k, t in _with_gradients({"h": h, "x": x}, leaves).items()}
        torch.cuda.synchronize()
        plain, truth = found.expected(precision)
    judge_tensors(outcome, precision, "EGNN", f"graphed, {kind}", replayed, plain, truth)
    return outcome


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a function after a warm-up on a side stream, and where its results lie."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    return graph, held


def _no_waiting(kind: str, precision: str, setting: Setting) -> Outcome:
    """After a first run neither forward nor backward waits for the GPU."""
    if not setting.on_gpu:
        return Outcome(LEFT_OUT, "needs a GPU")
    outcome, found = Outcome(), _Network(kind, setting)
    with matmul(precision):
        found.run(precision)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with launched(outcome, "forward", "backward"):
                found.run(precision)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return outcome


def _compiled(kind: str, precision: str, setting: Setting) -> Outcome:
    """The network compiled without a graph break."""
    outcome, found = Outcome(), _Network(kind, setting)
    torch.compiler.reset()
    backend = "inductor" if setting.on_gpu else "aot_eager"
    net: Any = torch.compile(found.net, fullgraph=True, backend=backend)
    with matmul(precision), launched(outcome, "forward", "backward"):
        compiled = found.run(precision, net)
        plain, truth = found.expected(precision)
    judge_tensors(outcome, precision, "EGNN", f"compiled, {kind}", compiled, plain, truth)
    return outcome


def _not_finite(hidden: int, precision: str, setting: Setting) -> Outcome:
    """What is not finite in an edge reaches its receiver's row and no other."""
    outcome = Outcome()
    nodes, edges = (500, 8000) if setting.on_gpu else (9, 40)
    case = Case("NaN", nodes=nodes, edges=edges, hidden=hidden, attrs=1)
    make: Callable[..., Any] = case.edge_pass
    problem = at(make(torch.float32, device=setting.device), precision, setting.device)
    for leaf, value in (("P", float("nan")), ("Q", float("inf")), ("edge_attr", float("nan"))):
        leaves = {k: t.clone() for k, t in problem.leaves.items()}
        leaves[leaf].view(-1)[0] = value
        with matmul(precision), launched(outcome, "forward"):
            found = problem.run(leaves, "triton", 0)
            right = problem.run(leaves, "reference", 0)
        for name, t in found.items():
            broken, expected = ((~u.isfinite()).any(dim=1) for u in (t, right[name]))
            if not torch.equal(broken, expected):
                outcome.fail(f"{name}, {leaf}: {int(broken.sum())} rows for {int(expected.sum())}")
    return outcome


def _approximate(precision: str, setting: Setting) -> Outcome:
    """SiLU from the tanh of 11 bits: near the truth, and on NVIDIA's GPUs not what it was."""
    outcome = Outcome()
    nodes, edges, hidden = (500, 8000, 64) if setting.on_gpu else (9, 40, 16)
    case = Case("approximate", nodes=nodes, edges=edges, hidden=hidden)
    make: Callable[..., Any] = case.edge_pass
    problem = at(make(torch.float32, device=setting.device), precision, setting.device)
    with matmul(precision), launched(outcome, "forward"):
        plain = problem.run(problem.leaves, "triton", 0)
        with approximate_activations():
            found = problem.run(problem.leaves, "triton", 0)
    for name, right in plain.items():
        error = relative_error(found[name], right)
        if not error < _APPROXIMATE_ERROR:
            outcome.fail(f"{name}: {error:.1e}")
        if setting.on_gpu and torch.version.hip is None and error == 0:
            outcome.fail(f"{name}: nothing was approximate")
    return outcome

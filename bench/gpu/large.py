"""Checks at full size: of every timed layer's edge pass, and beyond 2^31 numbers.

The reference would not fit into memory at once, so it runs over chunks of edges: the pass is a sum
over edges, and so is every gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import graphs
from bench.gpu.cases import timed
from bench.gpu.checks import judge_tensors, launched
from bench.gpu.setting import LEFT_OUT, Item, Outcome, Setting, autocast, low_type, matmul
from egnn_fast import functional, reference
from egnn_fast.graph import Graph
from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights

CHUNK_NUMBERS = 1 << 25  # of a tensor [chunk, H]
# of GPU memory at the peak of a check of 32 M edges, estimated: 15 at H = 64, 26 at 128
GIGABYTES_OF_CHANNEL = 0.22
END_ROWS = 1 << 20  # first and last edges whose gradients are compared
Tensors = dict[str, Tensor]


class Pass:
    """The edge pass on drawn numbers: inputs, weights and the cotangents of M and X."""

    def __init__(self, graph: Graph, hidden: int, attrs: int = 0) -> None:
        self.graph, n, device = graph, graph.num_nodes, graph.device
        draw = torch.Generator(device).manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device)

        def weight(*shape: int) -> Tensor:
            wide = (2 / shape[-1]) ** 0.5
            return (torch.rand(shape, generator=draw, device=device) * 2 - 1) * wide

        self.leaves = {"P": normal(n, hidden), "Q": normal(n, hidden), "x": normal(n, 3)}
        if attrs:
            self.leaves |= {
                "edge_attr": normal(graph.num_edges, attrs), "w_a": weight(hidden, attrs)
            }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {
            "w_r": (hidden,), "w2": (hidden, hidden), "b2": (hidden,),
            "w3": (hidden, hidden), "b3": (hidden,), "w_x": (hidden,),
        }  # fmt: skip
        self.leaves |= {name: weight(*shape) for name, shape in shapes.items()}
        # all of one sign: where a sum cancels, an error says little
        self.towards = [
            torch.rand(n, width, generator=draw, device=device) + 0.5 for width in (hidden, 3)
        ]

    def at(self, precision: str) -> Pass:
        """The same with P and Q as a layer has them: in autocast's dtype, where there is one."""
        found, low = copy.copy(self), low_type(precision)
        if low is not None:
            found.leaves = self.leaves | {name: self.leaves[name].to(low) for name in ("P", "Q")}
        return found

    def kernel(self, precision: str) -> Tensors:
        """What the Triton kernels give."""
        leaves = {k: t.detach().requires_grad_() for k, t in self.leaves.items()}
        with autocast(precision, self.graph.device.type):
            m, x = functional.egcl_messages(
                leaves["P"], leaves["Q"], leaves["x"], self.graph, _weights(leaves), Options(),
                edge_attr=leaves.get("edge_attr"), backend="triton",
            )  # fmt: skip
        assert x is not None
        found = torch.autograd.grad([m, x], list(leaves.values()), self.towards)
        return {"M": m.detach(), "X": x.detach()} | _named(leaves, found)

    def reference(self, precision: str | None) -> Tensors:
        """What plain PyTorch gives chunk by chunk; in float64 for None."""
        dtype = torch.float64 if precision is None else torch.float32
        leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in self.leaves.items()}
        towards = [t.to(dtype) for t in self.towards]
        receiver, sender = self.graph.receivers, self.graph.sorted_senders()
        order = None if self.graph.perm is None else self.graph.perm.long()
        m, x = (torch.zeros_like(t) for t in towards)
        totals = {k: torch.zeros_like(t) for k, t in leaves.items()}
        size = max(1, CHUNK_NUMBERS // leaves["P"].shape[1])
        for begin in range(0, self.graph.num_edges, size):
            part = slice(begin, begin + size)
            here = dict(leaves)
            if "edge_attr" in leaves:
                rows = part if order is None else order[part]
                here["edge_attr"] = leaves["edge_attr"].detach()[rows].requires_grad_()
            with autocast(precision or "highest", self.graph.device.type):
                some_m, some_x = reference.messages(
                    here["P"], here["Q"], here["x"], receiver[part], sender[part], _weights(here),
                    Options(), edge_attr=here.get("edge_attr"),
                )  # fmt: skip
            assert some_x is not None
            found = torch.autograd.grad([some_m, some_x], list(here.values()), towards)
            m += some_m.detach()
            x += some_x.detach()
            for name, grad in zip(here, found, strict=True):
                if name == "edge_attr":
                    totals[name][part if order is None else order[part]] = grad
                else:
                    totals[name] += grad
        if precision is not None:  # gradients have their tensors' dtypes
            totals = {k: t.to(self.leaves[k].dtype) for k, t in totals.items()}
        return {"M": m, "X": x} | _named(leaves, list(totals.values()))


def _weights(t: Tensors) -> EdgeWeights:
    return EdgeWeights(
        t["w_r"], t.get("w_a"), t["w2"], t["b2"], w3=t["w3"], b3=t["b3"], w_x=t["w_x"]
    )


def _named(leaves: Tensors, grads: Any) -> Tensors:
    named = {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    per_edge = named.get("gradient of edge_attr")
    if per_edge is not None and len(per_edge) > 2 * END_ROWS:
        # a comparison in float64 of all of it would not fit into memory
        named["gradient of edge_attr"] = torch.cat((per_edge[:END_ROWS], per_edge[-END_ROWS:]))
    return named


def items(setting: Setting) -> Iterator[Item]:
    """The checks beyond 2^31 numbers."""
    for name, run in (
        ("E H beyond 2^31", partial(_beyond, 34_000_000, 0)),
        ("E A beyond 2^31", partial(_beyond, 34_000_000, 64)),
        ("2 N H beyond 2^31", _far_rows),
    ):
        yield Item(name, "checks", run, seconds=15, limit=120, alone=True, gigabytes=60)


def timed_items(setting: Setting) -> Iterator[Item]:
    """For each graph, H and precision that is timed, the check that its times rest on."""
    for case in timed(setting):
        if case.is_one_pass and case.kind == "edges":
            for precision in case.precisions:
                run = partial(_timed, case.name, precision)
                name = f"at full size: {check_name(case.name)}: {precision}"
                size = GIGABYTES_OF_CHANNEL * case.hidden * case.num_edges / 32e6
                yield Item(name, "checks", run, 20, gigabytes=size + 2)


def check_name(case: str) -> str:
    """A layer and its edge pass have one check."""
    return case.removeprefix("edges-")


def _timed(name: str, precision: str, setting: Setting) -> Outcome:
    (case,) = (case for case in timed(setting) if case.name == name)
    if case.graph == "random":
        graph = graphs.random_graph(case.nodes, case.num_edges, setting.device)
    else:
        radius = graphs.cutoff(case.nodes, case.degree)
        graph = graphs.radius_graph(graphs.positions(case.nodes, radius, setting.device), radius)
    return _compare(Pass(graph, case.hidden), precision, check_name(name))


def _beyond(edges: int, attrs: int, setting: Setting) -> Outcome:
    nodes, hidden = 200_000, 64
    if not setting.on_gpu:
        nodes, edges, hidden, attrs = 9, 40, 16, min(attrs, 2)
    elif torch.cuda.mem_get_info()[0] < 60e9:
        return Outcome(LEFT_OUT, "less than 60 GB of memory are free")
    graph = graphs.random_graph(nodes, edges, setting.device)
    return _compare(Pass(graph, hidden, attrs), "bf16" if setting.on_gpu else "highest",
                    f"E = {edges}, H = {hidden}, A = {attrs}")  # fmt: skip


def _far_rows(setting: Setting) -> Outcome:
    """Edges among a few nodes at either end of so many that their rows need 64 bits."""
    nodes, ends, edges, hidden = 17_000_000, 500, 20_000, 64
    if not setting.on_gpu:
        nodes, ends, edges, hidden = 40, 4, 60, 16
    elif torch.cuda.mem_get_info()[0] < 60e9:
        return Outcome(LEFT_OUT, "less than 60 GB of memory are free")
    outcome, device = Outcome(), setting.device
    near = torch.arange(ends, device=device)
    places = torch.cat((near, near + (nodes - ends)))
    small = graphs.random_graph(2 * ends, edges, device)
    problem = Pass(small, hidden)
    spread = Pass.__new__(Pass)
    spread.graph = Graph.from_edge_index(places[small.shared_edge_index()], nodes)
    per_node = ("P", "Q", "x")
    spread.leaves = dict(problem.leaves)
    for name in per_node:
        spread.leaves[name] = _at_rows(problem.leaves[name], places, nodes)
    spread.towards = [_at_rows(t, places, nodes) for t in problem.towards]
    with matmul("highest"), launched(outcome, "forward", "backward"):
        found = spread.kernel("highest")
        for name in ("M", "X", *(f"gradient of {k}" for k in per_node)):
            rows = found[name][places]
            # elsewhere there is no edge
            if int(found[name].count_nonzero()) != int(rows.count_nonzero()):
                outcome.fail(f"{name}: rows without an edge are not zero")
            found[name] = rows
        plain, truth = problem.reference("highest"), problem.reference(None)
    judge_tensors(outcome, "highest", "edge pass", f"N = {nodes}", found, [plain], truth)
    return outcome


def _at_rows(values: Tensor, places: Tensor, rows: int) -> Tensor:
    found = values.new_zeros(rows, values.shape[1])
    found[places] = values
    return found


def _compare(problem: Pass, precision: str, name: str) -> Outcome:
    outcome, problem = Outcome(), problem.at(precision)
    with matmul(precision):
        with launched(outcome, "forward", "backward"):
            found = problem.kernel(precision)
        plain = problem.reference(precision)
        truth = problem.reference(None)
        judge_tensors(
            outcome, precision, "edge pass", name, found, [plain], truth,
            again=lambda: problem.kernel(precision),
        )  # fmt: skip
    return outcome

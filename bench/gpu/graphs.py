"""Graphs of the timed cases, made where they are used."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from egnn_fast.graph import Graph

SEED = 0


def _generator(device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def random_graph(nodes: int, edges: int, device: torch.device | str) -> Graph:
    """Both ends of every edge at random."""
    ends = torch.randint(nodes, (2, edges), generator=_generator(device), device=device)
    return Graph.from_edge_index(ends, nodes, validate=False)


def regular_graph(nodes: int, degree: int, device: torch.device | str) -> Graph:
    """``degree`` random senders for each node: nothing beside the graph itself is stored."""
    rowptr = torch.arange(nodes + 1, device=device) * degree
    draw = _generator(device)
    senders = torch.randint(
        nodes, (nodes * degree,), generator=draw, device=device, dtype=torch.int32
    )
    return Graph(rowptr, senders)


def cutoff(nodes: int, neighbours: float) -> float:
    """The radius within which a node has so many neighbours, far from the unit box's faces."""
    return float((3 * neighbours / (4 * math.pi * nodes)) ** (1 / 3))


def positions(nodes: int, radius: float, device: torch.device | str) -> Tensor:
    """Uniform in the unit box ``[N, 3]``, in the order of cells as wide as the radius."""
    x = torch.rand(nodes, 3, generator=_generator(device), device=device)
    cells = _per_side(radius)
    return x[_cell_index(_cells_of(x, cells), cells).argsort(stable=True)]


def radius_graph(x: Tensor, radius: float) -> Graph:
    """All pairs not further apart than the radius; ``x [N, 3]`` as :func:`positions` orders it."""
    n, cells = x.shape[0], _per_side(radius)
    place = _cells_of(x, cells)
    bounds = torch.arange(cells**3 + 1, device=x.device)
    start = torch.searchsorted(_cell_index(place, cells), bounds)
    low = (place[:, 2] - 1).clamp(min=0)
    high = (place[:, 2] + 1).clamp(max=cells - 1)
    found = []
    # cells along the last axis lie one after the other: three of them are one run of nodes
    for step in itertools.product((-1, 0, 1), repeat=2):
        across = place[:, :2] + torch.tensor(step, device=x.device)
        inside = ((across >= 0) & (across < cells)).all(dim=1)
        row = (across[:, 0] * cells + across[:, 1]).clamp(0, cells * cells - 1) * cells
        begin = start[row + low]
        count = torch.where(inside, start[row + high + 1] - begin, 0)
        receiver = torch.repeat_interleave(torch.arange(n, device=x.device), count)
        before = torch.repeat_interleave(count.cumsum(0) - count, count)
        turn = torch.arange(receiver.shape[0], device=x.device) - before
        sender = begin[receiver] + turn
        apart = (x[receiver] - x[sender]).square().sum(dim=1)
        near = (apart <= radius * radius) & (receiver != sender)
        found.append(torch.stack((receiver[near], sender[near])))
    return Graph.from_edge_index(torch.cat(found, dim=1), n, validate=False)


def with_edges(graph: Graph, edges: int) -> Graph:
    """The graph with so many of its edges, chosen at random.

    Raises
    ------
    ValueError
        It has fewer.
    """
    if graph.num_edges < edges:
        raise ValueError(f"edges: the graph has {graph.num_edges}, {edges} were asked for")
    keep = torch.randperm(graph.num_edges, generator=_generator("cpu"))[:edges].sort().values
    ends = graph.shared_edge_index()[:, keep.to(graph.device)]
    return Graph.from_edge_index(ends, graph.num_nodes, validate=False)


def _per_side(radius: float) -> int:
    return max(1, int(1 / radius))


def _cells_of(x: Tensor, cells: int) -> Tensor:
    return (x * cells).long().clamp(max=cells - 1)


def _cell_index(place: Tensor, cells: int) -> Tensor:
    return (place[:, 0] * cells + place[:, 1]) * cells + place[:, 2]

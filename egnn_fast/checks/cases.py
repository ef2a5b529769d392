"""The problems of ``egnn-fast check``, on which backends are compared with the reference.

The tests make their larger table of the same :class:`Case`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egnn_fast import functional, reference
from egnn_fast.graph import Graph
from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights, LayerWeights

Outputs = dict[str, Tensor]

# orders of summation: 0 runs a problem as it is, the others shuffle nodes, edges and hidden units
ORDERS = 6
# by name: whether rows, columns or both of a tensor are hidden units, nodes or edges
_HIDDEN_ROWS = {
    "w_r", "w_a", "b2", "b3", "w_x", "w_g",
    "edge_w1", "edge_b1", "edge_b2", "node_b1", "coord_b1", "vel_w1", "vel_b1",
}  # fmt: skip
_HIDDEN_COLUMNS = {"P", "Q", "att_w", "coord_w2", "vel_w2", "node_w2"}
_HIDDEN_BOTH = {"w2", "w3", "edge_w2", "coord_w1"}
_NODE_ROWS = {"P", "Q", "h", "x", "v", "node_attr", "node_mask"}
_EDGE_ROWS = {"edge_attr", "edge_mask"}


class Problem(NamedTuple):
    """A differentiable call.

    Attributes
    ----------
    leaves : dict of Tensor
        Its inputs and weights by name.
    run : callable
        ``run(leaves, backend, order)`` returns the outputs by name. The backend "reference" calls
        :mod:`egnn_fast.reference`, without :mod:`egnn_fast.functional`. All orders compute the same
        function of the leaves, but each adds in another order.
    """

    leaves: dict[str, Tensor]
    run: Callable[[dict[str, Tensor], str, int], Outputs]


@dataclass(frozen=True)
class Case:
    """A graph, sizes and options. The same case draws the same random numbers each time.

    Parameters
    ----------
    name : str
        What the case is about.
    graph : str
        How the edges are drawn:

        - ``"uniform"``: receivers and senders uniformly;
        - ``"power"``: node k as receiver in proportion to 1/(k + 1)^1.5;
        - ``"hub"``: all received by node 0;
        - ``"isolated"``: all received by a tenth of the nodes;
        - ``"sorted"``: uniformly, and listed in receiver order;
        - ``"loops"``: with self-loops and repeated edges;
        - ``"coincident"``: uniformly; every second node has the coordinates of the one before;
        - ``"complete"``: all pairs of each component in ``sizes``.
    nodes, edges : int
        N and E; for complete graphs they follow from ``sizes``, the nodes of each component.
    hidden, dim, attrs : int
        H, D and A.
    options : Options
        The layer's options.
    mask : {None, "binary", "soft"}
        The edge mask: none, zeros and ones, or numbers in (0, 1).
    features, node_attrs : int
        F and B, for :meth:`layer`.
    velocity, node_mask, carry : bool
        Whether :meth:`layer` has velocities and a node mask, and returns the new velocity.
    residual : bool
        Whether :meth:`layer` has a residual; O is F with it, F + 1 without.
    seed : int
        That of the random inputs and weights.
    """

    name: str
    graph: str = "uniform"
    nodes: int = 30
    edges: int = 200
    sizes: tuple[int, ...] = ()
    hidden: int = 16
    dim: int = 3
    attrs: int = 0
    options: Options = field(default_factory=Options)
    mask: str | None = None
    features: int = 5
    node_attrs: int = 0
    velocity: bool = False
    carry: bool = False
    node_mask: bool = False
    residual: bool = True
    seed: int = 2

    @property
    def num_nodes(self) -> int:
        """N, the number of nodes."""
        return sum(self.sizes) if self.graph == "complete" else self.nodes

    def build_graph(self, relabel: Tensor | None = None) -> Graph:
        """The case's graph; with ``relabel [N]`` int64, node i becomes node ``relabel[i]``."""
        if self.graph == "complete" and relabel is None:
            return Graph.complete(self.sizes)
        edges = self.edge_index()
        return Graph.from_edge_index(edges if relabel is None else relabel[edges], self.num_nodes)

    def edge_index(self) -> Tensor:
        """The case's edge list ``[2, E]``, int64.

        Raises
        ------
        ValueError
            ``graph`` is not one of the kinds above.
        """
        if self.graph == "complete":
            return Graph.complete(self.sizes).edge_index
        draw = torch.Generator("cpu").manual_seed(1)
        n, e = self.nodes, self.edges
        if n == 0:
            return torch.empty(2, 0, dtype=torch.int64, device="cpu")
        edges = torch.randint(n, (2, e), generator=draw, device="cpu")
        if self.graph == "power":
            weight = torch.arange(1, n + 1, device="cpu").double() ** -1.5
            edges[0] = torch.multinomial(weight, e, replacement=True, generator=draw)
        elif self.graph == "hub":
            edges[0] = 0
        elif self.graph == "isolated":
            edges[0] = edges[0] % max(1, n // 10) + n // 2
        elif self.graph == "sorted":
            edges[0] = edges[0].sort().values
        elif self.graph == "loops":
            edges[1, ::3] = edges[0, ::3]
            edges[:, 1::3] = edges[:, ::3][:, : edges[:, 1::3].shape[1]]
        elif self.graph not in ("uniform", "coincident"):
            raise ValueError(f"graph: no kind of graph is called {self.graph!r}")
        if self.graph != "loops" and n > 1:
            edges[1] = (edges[0] + 1 + edges[1] % (n - 1)) % n
        return edges

    def edge_pass(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Problem:
        """The edge pass: every input and weight of ``functional.egcl_messages`` is a leaf."""
        graph, draw, h = self.build_graph().to(device), _Draw(dtype, self.seed), self.hidden
        leaves = {
            "P": draw.normal(self.num_nodes, h),
            "Q": draw.normal(self.num_nodes, h),
            **self._edge_inputs(graph, draw),
            "w_r": draw.uniform(h, fan_in=4),
            "w2": draw.uniform(h, h, fan_in=h),
            "b2": draw.uniform(h, fan_in=h),
        }
        if self.attrs:
            leaves["w_a"] = draw.uniform(h, self.attrs, fan_in=self.attrs + 1)
        if self.options.attention:
            leaves |= {"w_g": draw.uniform(h, fan_in=h), "b_g": draw.uniform(1, fan_in=4)}
        if self.options.updates_coords:
            leaves |= {
                "w3": draw.uniform(h, h, fan_in=h),
                "b3": draw.uniform(h, fan_in=h),
                "w_x": draw.uniform(h, fan_in=h),
            }

        shuffles = {0: _Shuffle(graph, h, 0)}

        def run(leaves: dict[str, Tensor], backend: str, order: int) -> Outputs:
            # cached, because random numbers cannot be drawn inside a transform
            if order not in shuffles:
                shuffles[order] = _Shuffle(graph, h, order)
            shuffle = shuffles[order]
            t, edges = shuffle.leaves(leaves), shuffle.graph
            weights = EdgeWeights(
                t["w_r"], t.get("w_a"), t["w2"], t["b2"],
                *(t.get(name) for name in ("w_g", "b_g", "w3", "b3", "w_x")),
            )  # fmt: skip
            inputs: dict[str, Any] = {k: t.get(k) for k in ("edge_attr", "edge_mask")}
            if backend == "reference":
                receiver, sender = edges.shared_edge_index()
                m, x = reference.messages(
                    t["P"], t["Q"], t["x"], receiver, sender, weights, self.options, **inputs
                )
            else:
                m, x = functional.egcl_messages(
                    t["P"], t["Q"], t["x"], edges, weights, self.options, **inputs, backend=backend
                )
            return shuffle.outputs({"M": m} if x is None else {"M": m, "X": x})

        return Problem({name: t.to(device) for name, t in leaves.items()}, run)

    def layer(
        self,
        dtype: torch.dtype,
        relabel: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Problem:
        """A whole layer: every input and weight of ``functional.egcl`` is a leaf."""
        graph, draw = self.build_graph(relabel).to(device), _Draw(dtype, self.seed)
        h, f = self.hidden, self.features
        out = f if self.residual else f + 1
        shapes: dict[str, tuple[int, ...]] = {
            "edge_w1": (h, 2 * f + 1 + self.attrs), "edge_b1": (h,),
            "edge_w2": (h, h), "edge_b2": (h,),
            "node_w1": (h, f + h + self.node_attrs), "node_b1": (h,),
            "node_w2": (out, h), "node_b2": (out,),
        }  # fmt: skip
        if self.options.attention:
            shapes |= {"att_w": (1, h), "att_b": (1,)}
        if self.options.updates_coords:
            shapes |= {"coord_w1": (h, h), "coord_b1": (h,), "coord_w2": (1, h)}
        if self.velocity:
            shapes |= {"vel_w1": (h, f), "vel_b1": (h,), "vel_w2": (1, h), "vel_b2": (1,)}
        leaves = {"h": draw.normal(self.num_nodes, f), **self._edge_inputs(graph, draw)}
        leaves |= {name: draw.uniform(*s, fan_in=s[-1]) for name, s in shapes.items()}
        if self.node_attrs:
            leaves["node_attr"] = draw.normal(self.num_nodes, self.node_attrs)
        if self.velocity:
            leaves["v"] = draw.normal(self.num_nodes, self.dim)
        if self.node_mask:
            leaves["node_mask"] = draw.mask(self.num_nodes, "soft")

        shuffles = {0: _Shuffle(graph, h, 0)}

        def run(leaves: dict[str, Tensor], backend: str, order: int) -> Outputs:
            # cached, because random numbers cannot be drawn inside a transform
            if order not in shuffles:
                shuffles[order] = _Shuffle(graph, h, order)
            shuffle = shuffles[order]
            t, edges = shuffle.leaves(leaves), shuffle.graph
            weights = LayerWeights(**{name: t[name] for name in shapes})
            optional = ("edge_attr", "node_attr", "edge_mask", "node_mask", "v")
            inputs: dict[str, Any] = {k: t.get(k) for k in optional}
            inputs |= {"residual": self.residual, "carry_velocity": self.carry}
            if backend == "reference":
                maps = reference.maps_of(weights, self.options)
                new_h, new_x, new_v = reference.egcl(
                    t["h"], t["x"], edges, maps, self.options, **inputs
                )
            else:
                new_h, new_x, new_v = functional.egcl(
                    t["h"], t["x"], edges, weights, self.options, **inputs, backend=backend
                )
            out = {"h": new_h, "x": new_x}
            return shuffle.outputs(out if new_v is None else out | {"v": new_v})

        return Problem({name: t.to(device) for name, t in leaves.items()}, run)

    def _edge_inputs(self, graph: Graph, draw: _Draw) -> dict[str, Tensor]:
        x = draw.normal(self.num_nodes, self.dim)
        if self.graph == "coincident":
            x[1::2] = x[::2][: x[1::2].shape[0]]
        inputs = {"x": x}
        if self.attrs:
            inputs["edge_attr"] = draw.normal(graph.num_edges, self.attrs)
        if self.mask is not None:
            inputs["edge_mask"] = draw.mask(graph.num_edges, self.mask)
        return inputs


class _Shuffle:
    """Another order of a problem's nodes, edges and hidden units; order 0 changes nothing."""

    def __init__(self, graph: Graph, hidden: int, order: int) -> None:
        self.order, self.graph, self.hidden = order, graph, hidden
        if order == 0:
            return
        draw = torch.Generator("cpu").manual_seed(order)
        counts = (graph.num_nodes, graph.num_edges, hidden)
        self.nodes, self.edges, self.units = (
            torch.randperm(count, generator=draw, device="cpu").to(graph.device) for count in counts
        )
        renamed = self.nodes.argsort()[graph.edge_index[:, self.edges]]
        self.graph = Graph.from_edge_index(renamed, graph.num_nodes)

    def leaves(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs and weights in the new order."""
        if self.order == 0:
            return leaves
        return {name: self._leaf(name, t, leaves) for name, t in leaves.items()}

    def outputs(self, outputs: Outputs) -> Outputs:
        """Outputs back in the old order."""
        if self.order == 0:
            return outputs
        back = {name: t[self.nodes.argsort()] for name, t in outputs.items()}
        return {k: t[:, self.units.argsort()] if k == "M" else t for k, t in back.items()}

    def _leaf(self, name: str, t: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        units = self.units
        if name in _NODE_ROWS:
            t = t[self.nodes]
        elif name in _EDGE_ROWS:
            t = t[self.edges]
        if name in _HIDDEN_ROWS:
            return t[units]
        if name in _HIDDEN_COLUMNS:
            return t[:, units]
        if name in _HIDDEN_BOTH:
            return t[units][:, units]
        if name == "node_w1":
            features = leaves["h"].shape[1]
            columns = torch.arange(t.shape[1], device=t.device)
            columns[features : features + self.hidden] = features + units
            return t[units][:, columns]
        return t


class _Draw:
    """Random tensors, drawn in float64 and rounded: the same numbers for every dtype."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return self._rounded(
            torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        )

    def uniform(self, *shape: int, fan_in: int) -> Tensor:
        """Uniform in +-sqrt(2 / fan_in), somewhat wider than the weights of ``torch.nn.Linear``."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return self._rounded((values * 2 - 1) * (2 / fan_in) ** 0.5)

    def mask(self, rows: int, kind: str) -> Tensor:
        values = torch.rand(rows, generator=self.generator, dtype=torch.float64, device="cpu")
        return self._rounded(values if kind == "soft" else (values > 0.3).double())

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


# each option alone, and all of them: what the tests and the GPU suite run
EVERYTHING = Options(
    attention=True, coord_norm=0.7, coord_tanh=True, coord_clamp=0.05, coord_scale=0.6
)
SINGLE_OPTIONS = {
    "default": Options(),
    "relu": Options(activation="relu"),
    "leaky_relu": Options(activation="leaky_relu", negative_slope=0.2),
    "attention": Options(attention=True),
    "unit norm": Options(coord_norm="unit"),
    "float norm": Options(coord_norm=0.7),
    "tanh": Options(coord_tanh=True),
    "no head": Options(coord_agg=None),
    "sum": Options(coord_agg="sum"),
    "scale": Options(coord_scale=0.3),
    "inactive clamp": Options(coord_clamp=1e4),
    "active clamp": Options(coord_clamp=0.15),
    "everything": EVERYTHING,
}


def check_cases(quick: bool) -> tuple[Case, ...]:
    """The cases of ``egnn-fast check``: every option, every kind of graph, odd and even widths."""
    cases = (
        Case("plain, H 16"),
        Case(
            "edge attributes, soft masks, velocity",
            attrs=4,
            mask="soft",
            node_mask=True,
            velocity=True,
            carry=True,
            hidden=33,
        ),
        Case(
            "attention, tanh, unit norm, mean",
            options=Options(attention=True, coord_tanh=True, coord_norm="unit"),
            node_attrs=2,
        ),
        Case(
            "complete components, norm k, clamp, sum",
            graph="complete",
            sizes=(5, 1, 9, 2, 0, 12),
            attrs=2,
            mask="binary",
            options=Options(coord_norm=1.0, coord_clamp=0.1, coord_agg="sum", coord_scale=0.5),
        ),
        Case(
            "no coordinate head, attention, mask",
            options=Options(coord_agg=None, attention=True),
            mask="binary",
            node_mask=True,
            attrs=4,
            residual=False,
        ),
        Case("relu, isolated nodes", graph="isolated", options=Options(activation="relu")),
        Case(
            "leaky relu, self-loops",
            graph="loops",
            options=Options(activation="leaky_relu", negative_slope=0.2, coord_norm=0.5),
        ),
        Case("coincident points, D 2", graph="coincident", dim=2, options=Options(coord_norm=1.0)),
    )
    if quick:
        return cases
    return (
        *cases,
        Case("H 64", hidden=64, nodes=200, edges=4097, attrs=1),
        Case("H 128, D 8, degrees by a power law", "power", 150, 2000, hidden=128, dim=8),
        Case("H 5, D 1", hidden=5, dim=1),
        Case("D 16, sum", dim=16, hidden=20, options=Options(coord_agg="sum")),
        Case("one hub of 5,000 edges", "hub", 50, 5000, hidden=32, mask="soft"),
        Case("complete, H 64", "complete", sizes=(5,) * 40, hidden=64, attrs=2, velocity=True),
        Case("no edges", nodes=4, edges=0),
        Case("no nodes", nodes=0, edges=0, attrs=1),
        Case("one node, its own neighbour", "loops", 1, 1),
    )

"""What test_sequences.py is made of: tensors in many forms of memory, layers, edges, and a judge.

It knows the public interface alone. What is right comes from the reference in float64, on dense
copies of the numbers that a call was given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from egnn_fast import Graph, functional, nn, use_backend
from egnn_fast.weights import EdgeWeights, LayerWeights

if TYPE_CHECKING:
    from sequence_calls import Call

Tensors = dict[str, Tensor]
INPUTS = ("h", "P", "Q", "x", "v", "edge_attr", "edge_mask", "node_attr", "node_mask")
# Names of what not to draw: fill it in to find another failure than a known one.
LEFT_OUT: set[str] = set()


@dataclass
class Count:
    """What has been done so far, and the largest error over its bound."""

    calls: int = 0
    largest: dict[str, float] = field(default_factory=dict)

    def note(self, rule: str, error: float) -> None:
        self.largest[rule] = max(error, self.largest.get(rule, 0.0))

    def __str__(self) -> str:
        largest = ", ".join(f"{rule} {x:.1e}" for rule, x in sorted(self.largest.items()))
        return f"{self.calls} calls; largest error over its bound: {largest}"


COUNT = Count()

# ---- numbers, and where they lie ----------------------------------------------------------------
_TABLE = torch.randn(1 << 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
_NAN = math.nan
# Weights, which are edited in place, take the writable forms alone.
WRITABLE = ("dense", "columns", "transposed", "rows", "offset", "spread", "odd strides")
FORMS = (*WRITABLE, "same rows", "same columns", "negative", "Parameter", "inference")


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normally distributed, in float64, the same for the same seed."""
    count, start = math.prod(shape), seed * 997 % 4096
    assert start + count <= len(_TABLE)
    return _TABLE[start : start + count].clone().reshape(shape)


def place(values: Tensor, form: str) -> Tensor:
    """A tensor of the same numbers in memory of this form, NaN around it.

    "same rows" and "same columns" have the first row's or column's numbers everywhere.
    """
    shape, last = values.shape, values.shape[-1]
    if form == "Parameter":
        return torch.nn.Parameter(values, requires_grad=False)
    if form == "inference":
        with torch.inference_mode():
            return values.clone()
    if form == "negative" and values.dtype != torch.bfloat16:
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    if form == "same rows" and len(shape) == 2:
        row = values[:1] if len(values) else values.new_full((1, last), _NAN)
        return row.expand(shape)
    if form in ("same rows", "same columns"):
        column = values[..., :1] if last else values.new_full((*shape[:-1], 1), _NAN)
        return column.expand(shape)
    if form == "odd strides" and 1 in shape:
        strides = [7 if n == 1 else s for n, s in zip(shape, values.stride(), strict=True)]
        return values.clone().as_strided(shape, strides)
    if form == "transposed" and len(shape) == 2:
        return values.T.contiguous().T
    if form == "dense":
        return values
    if form == "offset":
        return values.new_full((values.numel() + 3,), _NAN)[3:].view(shape).copy_(values)
    if form == "rows" or len(shape) == 1:
        return values.new_full((2 * shape[0], *shape[1:]), _NAN)[::2].copy_(values)
    if form == "spread":
        return values.new_full((2 * shape[0], 2 * last), _NAN)[::2, ::2].copy_(values)
    return values.new_full((shape[0], last + 3), _NAN)[:, 1 : last + 1].copy_(values)


def dense(t: Tensor) -> Tensor:
    """A contiguous copy in float64; of integers, a copy."""
    if not t.is_floating_point():
        return t.clone()
    values = t.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return values.requires_grad_(t.requires_grad)


# ---- edges --------------------------------------------------------------------------------------
class Edges:
    """A graph in one of the forms that a call takes; raw lists may be edited."""

    def __init__(
        self, form: str, num_nodes: int, num_edges: int, seed: int, edges: Tensor | None = None
    ) -> None:
        self.form, self.num_nodes, self.edits = form, num_nodes, 0
        if form == "complete":
            sizes = [num_nodes // 2, num_nodes - num_nodes // 2]
            self.given: Any = Graph.complete(sizes)
        else:
            edges = draw_edges(num_nodes, num_edges, seed) if edges is None else edges
            self.given = {
                "Graph": lambda: Graph.from_edge_index(edges, num_nodes),
                "list": lambda: edges,
                "int32": lambda: edges.int(),
                "transposed": lambda: edges.T.contiguous().T,
                "pair": lambda: (edges[0].clone(), edges[1].clone()),
                "lists": lambda: edges.tolist(),
            }[form]()

    def dense(self) -> Tensor:
        """A copy of the edges as they are now: ``[2, E]``."""
        if isinstance(self.given, Graph):
            return self.given.edge_index
        if isinstance(self.given, Tensor):
            return self.given.long().clone(memory_format=torch.contiguous_format)
        return torch.stack([torch.as_tensor(row, dtype=torch.int64) for row in self.given])

    def edit(self, how: str, seed: int) -> None:
        """Other edges in the same tensor."""
        self.edits += 1
        for k, part in enumerate(self.given if self.form == "pair" else [self.given]):
            if not isinstance(part, Tensor) or part.numel() == 0:
                return
            count = part.shape[-1]
            edges = draw_edges(self.num_nodes, count, seed)
            new = (edges[k] if part.dim() == 1 else edges).to(part.dtype)
            if how == "in place":
                part.copy_(new)
            elif how == "data":
                part.data = new
            elif how == "data in place" and "edited unseen" not in LEFT_OUT:
                part.data.copy_(new)
            elif how == "NumPy" and "edited unseen" not in LEFT_OUT:
                part.numpy()[...] = new.numpy()


def draw_edges(num_nodes: int, num_edges: int, seed: int) -> Tensor:
    """Edges without self-loops if there are two nodes or more; none without nodes."""
    count = num_edges if num_nodes else 0
    drawn = (numbers((2, count), seed).abs() * 1e6).long()
    receiver = drawn[0] % max(num_nodes, 1)
    step = 1 + drawn[1] % (num_nodes - 1) if num_nodes > 1 else drawn[1]
    return torch.stack((receiver, (receiver + step) % max(num_nodes, 1)))


# ---- layers -------------------------------------------------------------------------------------
class Record:
    """A dataclass that is shown by its fields that differ from the defaults."""

    def __repr__(self) -> str:
        mine: Any = self
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(mine)
            if f.name != "salt" and getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Kind(Record):
    """What a layer is built from; ``salt`` tells the layers of one example from all others."""

    salt: float
    float32: bool = False
    features: int = 4
    hidden: int = 8
    outputs: int | None = None  # None: residual
    dim: int = 3
    attrs: int = 0
    node_attrs: int = 0
    velocity: bool = False
    carry: bool = False
    layers: int = 1
    activation: str = "silu"
    scaled: bool = False
    attention: bool = False
    coord_norm: str | float | None = None
    coord_tanh: bool = False
    coord_agg: str | None = "mean"
    coord_clamp: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.float32 else torch.float64

    def build(self) -> torch.nn.Module:
        acts: dict[str, Any] = {
            "silu": torch.nn.SiLU, "relu": torch.nn.ReLU,
            "leaky_relu": lambda: torch.nn.LeakyReLU(self.salt),
        }  # fmt: skip
        more: dict[str, Any] = {
            "edge_attr_dim": self.attrs, "node_attr_dim": self.node_attrs, "dtype": self.dtype,
            "activation": acts[self.activation](), "attention": self.attention,
            "coord_norm": self.coord_norm, "coord_tanh": self.coord_tanh,
            "coord_agg": self.coord_agg, "coord_clamp": self.coord_clamp,
            "coord_scale": self.salt if self.scaled else 1.0,
        }  # fmt: skip
        sizes = (self.features, self.outputs or self.features, self.hidden)
        if self.layers > 1:
            made: Any = nn.EGNN(self.features, self.hidden, 3, n_layers=self.layers, **more)
        elif self.velocity:
            more |= {"residual": self.outputs is None, "carry_velocity": self.carry}
            made = nn.EGCLVel(*sizes, **more)
        else:
            made = nn.EGCL(*sizes, residual=self.outputs is None, **more)
        for part in made.modules():
            if isinstance(part, nn.EGCL | nn.EGCLVel):
                # no effect on SiLU and ReLU, but the options differ from those of other examples
                part.options = replace(part.options, negative_slope=self.salt)
        return made


@lru_cache(maxsize=64)
def twin(kind: Kind) -> Any:
    """A module of this kind, which the reference runs with the weights it is given."""
    return kind.build()


class Layer:
    """A layer or network with weights of its own."""

    def __init__(self, kind: Kind, seed: int) -> None:
        self.kind, self.edits = kind, 0
        self.module: Any = kind.build()
        for k, name in enumerate(dict(self.module.named_parameters())):
            self.change(name, "in place", "dense", seed + k)
        self.options: Any = getattr(self.module, "options", None)

    def change(self, name: str, how: str, form: str, seed: int) -> None:
        """Give a parameter other numbers or other memory."""
        owner = self.module.get_submodule(name.rpartition(".")[0])
        parameter = owner.get_parameter(name.rpartition(".")[2])
        fan_in = parameter.shape[-1] if parameter.dim() == 2 else self.kind.hidden
        new = numbers(tuple(parameter.shape), seed).mul_(fan_in**-0.5).to(self.kind.dtype)
        self.edits += 1
        if how == "setattr":
            placed = torch.nn.Parameter(place(new, form), parameter.requires_grad)
            setattr(owner, name.rpartition(".")[2], placed)
        elif how == "data":
            parameter.data = place(new, form)
        elif how == "data in place":
            parameter.data.copy_(new)
        else:
            with torch.no_grad():
                parameter.copy_(new)

    def freeze(self, which: str) -> None:
        self.edits += 1
        for k, parameter in enumerate(self.module.parameters()):
            parameter.requires_grad_(which == "none" or (which == "every other" and k % 2 == 0))

    def leaves(self, call: Call, edges: Edges) -> Tensors:
        """Every tensor that a call takes, by name, in the forms that it asks for."""
        kind, n, e = self.kind, edges.num_nodes, edges.dense().shape[1]
        shapes: dict[str, tuple[int, ...]] = {"x": (n, kind.dim)}
        if call.face == "edge pass":
            shapes |= {"P": (n, kind.hidden), "Q": (n, kind.hidden)}
        else:
            shapes["h"] = (n, kind.features)
            if kind.velocity:
                shapes["v"] = (n, kind.dim)
            if kind.node_attrs:
                shapes["node_attr"] = (n, kind.node_attrs)
        if kind.attrs:
            shapes["edge_attr"] = (e, kind.attrs)
        values = {k: numbers(s, call.seed + k_) for k_, (k, s) in enumerate(shapes.items())}
        for name, rows, mask in (("edge_mask", e, call.mask), ("node_mask", n, call.node_mask)):
            if mask is not None and not (name == "node_mask" and call.face == "edge pass"):
                # eighths: their sums are exact, so that no rounding decides on max(sum, 1)
                soft = (numbers((rows,), call.seed + 9).abs() * 8).floor().remainder(9) / 8
                values[name] = soft.unsqueeze(1) if mask == "column" else soft
        values = {k: t.to(kind.dtype) for k, t in values.items()}
        if call.face == "edge pass":
            named = self.module.weights().split(kind.features)[2]._asdict()
            values |= {k: t.detach().clone() for k, t in named.items() if t is not None}
        elif call.face == "function":
            named = self.module.weights()._asdict()
            if call.no_outputs and kind.outputs is not None:
                named |= {k: named[k][:0] for k in ("node_w2", "node_b2")}
            values |= {k: t.detach().clone() for k, t in named.items() if t is not None}
        found = {}
        for k, (name, t) in enumerate(values.items()):
            form = call.forms[k % len(call.forms)]
            if name == "x" and form == "same rows" and kind.coord_norm == "unit":
                form = "columns"  # where points coincide, 1 / rho is 1e8
            if form == "inference" and call.records:
                form = "dense"
            found[name] = place(t, form)
            if call.records and chosen(call.requires, name, k):
                found[name] = found[name].detach().requires_grad_()
        if call.mask == "bool" and not found["edge_mask"].requires_grad:
            found["edge_mask"] = found["edge_mask"] > 0.3
        return found | (dict(self.module.named_parameters()) if call.face == "module" else {})

    def run(self, call: Call, t: Tensors, graph: Any, exact: bool) -> Tensors:
        """The outputs by name."""
        inputs: Any = {
            k: t[k] for k in ("edge_attr", "edge_mask", "node_attr", "node_mask") if k in t
        }
        named: Any = {"backend": "reference" if exact else None}
        if call.face == "edge pass":
            edge = EdgeWeights(**{k: t.get(k) for k in EdgeWeights._fields})  # type: ignore[arg-type]
            m, shift = functional.egcl_messages(
                t["P"], t["Q"], t["x"], graph, edge, self.options, **inputs, **named
            )
            return {"M": m} if shift is None else {"M": m, "X": shift}
        if call.face == "function":
            weights = LayerWeights(**{k: t.get(k) for k in LayerWeights._fields})  # type: ignore[arg-type]
            found = functional.egcl(
                t["h"], t["x"], graph, weights, self.options, v=t.get("v"),
                residual=self.kind.outputs is None, carry_velocity=self.kind.carry,
                **inputs, **named,
            )  # fmt: skip
        else:
            given = (t["h"], t["x"], graph, *((t["v"],) if "v" in t else ()))
            if exact:
                weights_of = {k: v for k, v in t.items() if k not in INPUTS}
                with use_backend("reference"):
                    found = torch.func.functional_call(twin(self.kind), weights_of, given, inputs)
            else:
                found = self.module(*given, **inputs)
        return {k: v for k, v in zip(("h", "x", "v"), found, strict=False) if v is not None}


def chosen(which: str, name: str, k: int) -> bool:
    """Whether a selection holds the k-th tensor."""
    if which in ("x", "inputs", "weights"):
        return {"x": name == "x", "inputs": name in INPUTS, "weights": name not in INPUTS}[which]
    return which == "all" or (which == "every other" and k % 2 == 0)

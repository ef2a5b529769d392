"""The arguments and results of each operator, in one table.

An operator takes its inputs, then the graph's tensors, then its scalars, in the order written here.
No other file counts positions. The C++ extension has the same names in ``csrc/core/args.h``;
:mod:`egnn_fast.backends.cpu` compares them when it is imported.

Dimensions: N nodes, E edges, H hidden features, D coordinate dimensions, A edge attributes, B node
attributes, F input and O output features.
"""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from egnn_fast.options import Options
from egnn_fast.weights import EdgeWeights, LayerWeights

ANY = -1  # a size that is not checked
_DIMENSIONS = ("N", "E", "H", "D", "A", "B", "F", "O")
# the tensors of a Graph that operators take: int64 [N + 1], then int32 [E], [E] and [N]
GRAPH = ("rowptr", "senders", "perm", "first")


class Input(NamedTuple):
    """A differentiable input of an operator.

    Attributes
    ----------
    name : str
        Its name in the schema; for a weight also in :mod:`egnn_fast.weights`.
    shape : str
        Its sizes in terms of the dimensions, such as ``"N, 2*H"``.
    optional : bool
        Whether it may be None.
    reached_by : str
        Names of the outputs that depend on it, separated by spaces. It has a gradient if one of
        them has a cotangent.
    by_head : str
        More such outputs, if the layer has a coordinate head.
    part : str or None
        The part of a layer to which a weight belongs: ``"gate"``, ``"head"`` or ``"velocity"``. The
        weight is None in layers without this part. None: all layers have the input.
    """

    name: str
    shape: str
    optional: bool = False
    reached_by: str = ""
    by_head: str = ""
    part: str | None = None


class Scalar(NamedTuple):
    """An argument that is not a tensor.

    Attributes
    ----------
    name : str
        Its name in the schema.
    type : str
        Its type in the schema.
    encode, decode : callable or None
        Convert the field of this name of :class:`egnn_fast.Options` to and from this type; None if
        the field has this type.
    """

    name: str
    type: str
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None


class Signature:
    """The arguments of an operator and of its derivative.

    Parameters
    ----------
    name : str
        The operator's name in the namespace ``egnn_fast``.
    inputs : sequence of Input
        The first arguments: the differentiable ones.
    outputs : sequence of str
        Names of the results that can be differentiated.
    constants : sequence of str
        Names of the results after them, which only the operator's derivative reads.
    scalars : sequence of Scalar
        The last arguments, after the graph's tensors.
    sizes : callable
        Takes an ``Arguments``; returns the call's dimensions N, E, H, D, A, B, F, O, or ``ANY``.

    Attributes
    ----------
    Arguments : type
        A named tuple of the operator's arguments.
    BackwardArguments : type
        A named tuple of the derivative's arguments: the outputs' cotangents (named ``g_`` and the
        output's name), the constants, the operator's arguments, and ``needed``, a bool for each
        input that says whether to compute its gradient.
    cotangents : tuple of str
        Names of the outputs' cotangents.
    n_inputs, n_tensors : int
        Number of inputs; of inputs and graph tensors.
    shapes : callable
        Takes N, E, H, D, A, B, F, O; returns the shape of each input.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[Input],
        outputs: Sequence[str],
        constants: Sequence[str],
        scalars: Sequence[Scalar],
        sizes: Callable[[Any], tuple[int, ...]],
    ) -> None:
        self.name, self.inputs = name, tuple(inputs)
        self.names = tuple(each.name for each in inputs)
        self.outputs, self.constants = tuple(outputs), tuple(constants)
        self.scalars, self.sizes = tuple(scalars), sizes
        self.cotangents = tuple(f"g_{output}" for output in outputs)
        self.n_inputs = len(self.names)
        self.n_tensors = self.n_inputs + len(GRAPH)
        names = (*self.names, *GRAPH, *(scalar.name for scalar in scalars))
        self._positions = {name: k for k, name in enumerate(names)}
        before = (*self.cotangents, *self.constants)
        self.Arguments: Any = namedtuple("Arguments", names)  # type: ignore[misc]
        self.BackwardArguments: Any = namedtuple(  # type: ignore[misc]
            "BackwardArguments", (*before, *names, "needed")
        )
        self.shapes = _shapes(each.shape for each in inputs)
        # a table for every case, because `reached` runs in every call
        self._reached = {
            (head, *has_cotangent): self._reached_through(head, has_cotangent)
            for head, *has_cotangent in itertools.product((False, True), repeat=1 + len(outputs))
        }
        self._head = next(k for k, each in enumerate(inputs) if each.part == "head")

    @property
    def schema(self) -> str:
        """The operator's arguments in the schema language of ``torch.library``."""
        inputs = [f"Tensor{'?' if each.optional else ''} {each.name}" for each in self.inputs]
        graph = [f"Tensor{'' if name == 'rowptr' else '?'} {name}" for name in GRAPH]
        return ", ".join([*inputs, *graph, *(f"{s.type} {s.name}" for s in self.scalars)])

    @property
    def backward_schema(self) -> str:
        """The derivative's arguments in that language, without ``needed``."""
        before = [f"Tensor? {name}" for name in self.cotangents]
        return ", ".join([*before, *(f"Tensor {name}" for name in self.constants), self.schema])

    def index(self, name: str) -> int:
        """The position of an argument of the operator."""
        return self._positions[name]

    def split_backward(
        self, args: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any], Sequence[bool]]:
        """The arguments of the derivative: cotangents and constants, the operator's own, needed."""
        first = len(self.outputs) + len(self.constants)
        return args[:first], args[first:-1], args[-1]

    def presence(self, *, gate: bool, head: bool, velocity: bool = False) -> tuple[bool, ...]:
        """For each input, whether a layer with these parts has it."""
        parts = {None: True, "gate": gate, "head": head, "velocity": velocity}
        return tuple(parts[each.part] for each in self.inputs)

    def reached(
        self, needed: Sequence[bool], cotangents: Sequence[Any], inputs: Sequence[Any]
    ) -> list[bool]:
        """For each input, whether it is needed and an output with a cotangent depends on it.

        ``cotangents`` has a tensor or None for each output. As in the official code, a parameter
        on which the loss does not depend has the gradient None, not zeros.
        """
        key = (inputs[self._head] is not None, *[g is not None for g in cotangents])
        return [a and b for a, b in zip(needed, self._reached[key], strict=True)]

    def _reached_through(self, head: bool, has_cotangent: Sequence[bool]) -> tuple[bool, ...]:
        sources = {name for name, has in zip(self.outputs, has_cotangent, strict=True) if has}
        return tuple(
            not sources.isdisjoint((each.reached_by + " " + each.by_head * head).split())
            for each in self.inputs
        )


def _shapes(shapes: Any) -> Callable[..., tuple[tuple[int, ...], ...]]:
    """A function from the dimensions to shapes; compiled once, because it runs in every call."""
    text = ", ".join(f"({shape},)" for shape in shapes)
    function: Callable[..., tuple[tuple[int, ...], ...]]
    function = eval(f"lambda {', '.join(_DIMENSIONS)}: ({text},)", {})
    return function


def _encode_norm(coord_norm: str | float | None) -> float:
    """``Options.coord_norm`` as a float: 0 for None, -1 for "unit", else k."""
    if coord_norm is None:
        return 0.0
    return -1.0 if isinstance(coord_norm, str) else float(coord_norm)


def _decode_norm(code: float) -> str | float | None:
    return None if code == 0 else "unit" if code < 0 else code


# the fields of Options that the edge pass needs, except those that follow from which weights exist
EDGE_OPTIONS = (
    Scalar("activation", "str"),
    Scalar("negative_slope", "float"),
    Scalar("coord_norm", "float", _encode_norm, _decode_norm),
    Scalar("coord_tanh", "bool"),
    Scalar("coord_clamp", "float", lambda bound: bound or 0.0, lambda code: code or None),
)
_BACKEND_SCALARS = (Scalar("backend", "str"), Scalar("precision", "str"))


def _encoder() -> Callable[[Options], tuple[Any, ...]]:
    """A function from Options to scalars, without a loop, because it runs in every call."""
    fields = [
        f"options.{each.name}" if each.encode is None else f"{each.name}(options.{each.name})"
        for each in EDGE_OPTIONS
    ]
    encoders = {each.name: each.encode for each in EDGE_OPTIONS}
    function: Callable[[Options], tuple[Any, ...]]
    function = eval(f"lambda options: ({', '.join(fields)},)", encoders)
    return function


#: ``encode_options(options)``: the values of the scalars ``EDGE_OPTIONS``
encode_options = _encoder()


def decode_options(arguments: Any, **others: Any) -> Options:
    """Options from an operator's ``Arguments``; ``others`` are fields that are not scalars."""
    fields = {
        each.name: getattr(arguments, each.name)
        if each.decode is None
        else each.decode(getattr(arguments, each.name))
        for each in EDGE_OPTIONS
    }
    return Options(**fields, **others)


def _messages_sizes(call: Any) -> tuple[int, ...]:
    attrs = 0 if call.w_a is None else call.w_a.shape[1]
    return call.pq.shape[0], ANY, call.pq.shape[1] // 2, call.x.shape[1], attrs, 0, 0, 0


def _layer_sizes(call: Any) -> tuple[int, ...]:
    (hidden, width), (_, node_width) = call.edge_w1.shape, call.node_w1.shape
    node_attrs = 0 if call.node_attr is None else call.node_attr.shape[1]
    # F follows from the weights, not from h, so that an error for a wrong h names h
    features = node_width - hidden - node_attrs
    attrs, out = width - 2 * features - 1, call.node_w2.shape[0]
    return call.h.shape[0], ANY, hidden, call.x.shape[1], attrs, node_attrs, features, out


_BOTH = "m x"
# the edge pass: pq holds P and Q side by side; the outputs m and x are the sums M and X
MESSAGES = Signature(
    "messages",
    inputs=(
        Input("pq", "N, 2*H", reached_by=_BOTH),
        Input("x", "N, D", reached_by=_BOTH),
        Input("edge_attr", "E, A", optional=True, reached_by=_BOTH),
        Input("edge_mask", "E", optional=True, reached_by=_BOTH),
        Input("w_r", "H", reached_by=_BOTH),
        Input("w_a", "H, A", optional=True, reached_by=_BOTH),
        Input("w2", "H, H", reached_by=_BOTH),
        Input("b2", "H", reached_by=_BOTH),
        Input("w_g", "H", optional=True, reached_by=_BOTH, part="gate"),
        Input("b_g", "1", optional=True, reached_by=_BOTH, part="gate"),
        Input("w3", "H, H", optional=True, reached_by="x", part="head"),
        Input("b3", "H", optional=True, reached_by="x", part="head"),
        Input("w_x", "H", optional=True, reached_by="x", part="head"),
    ),
    outputs=("m", "x"),
    constants=(),
    scalars=(*EDGE_OPTIONS, *_BACKEND_SCALARS),
    sizes=_messages_sizes,
)

# x and v depend on what edges compute only through the coordinate head
_EDGE: dict[str, Any] = {"reached_by": "h", "by_head": "x v"}
_GATE: dict[str, Any] = {**_EDGE, "optional": True, "part": "gate"}
_MOVE: dict[str, Any] = {"optional": True, "reached_by": "x v"}
_HEAD, _VELOCITY = {**_MOVE, "part": "head"}, {**_MOVE, "part": "velocity"}
# a whole layer: coord_weight is the factor of the mean; the outputs are the new h, x and v, the
# constants the sums M and X and the activations that the forward stored
LAYER = Signature(
    "layer",
    inputs=(
        Input("h", "N, F", reached_by="h x v"),
        Input("x", "N, D", reached_by="h x", by_head="v"),
        Input("v", "N, D", **_MOVE),
        Input("edge_attr", "E, A", optional=True, **_EDGE),
        Input("edge_mask", "E", optional=True, **_EDGE),
        Input("node_attr", "N, B", optional=True, reached_by="h"),
        Input("coord_weight", "N", **_MOVE),
        Input("edge_w1", "H, 2*F + 1 + A", **_EDGE),
        Input("edge_b1", "H", **_EDGE),
        Input("edge_w2", "H, H", **_EDGE),
        Input("edge_b2", "H", **_EDGE),
        Input("node_w1", "H, F + H + B", reached_by="h"),
        Input("node_b1", "H", reached_by="h"),
        Input("node_w2", "O, H", reached_by="h"),
        Input("node_b2", "O", reached_by="h"),
        Input("att_w", "1, H", **_GATE),
        Input("att_b", "1", **_GATE),
        Input("coord_w1", "H, H", **_HEAD),
        Input("coord_b1", "H", **_HEAD),
        Input("coord_w2", "1, H", **_HEAD),
        Input("vel_w1", "H, F", **_VELOCITY),
        Input("vel_b1", "H", **_VELOCITY),
        Input("vel_w2", "1, H", **_VELOCITY),
        Input("vel_b2", "1", **_VELOCITY),
    ),
    outputs=("h", "x", "v"),
    constants=("m", "shift", "activations"),
    scalars=(
        *EDGE_OPTIONS,
        Scalar("coord_scale", "float"),
        Scalar("residual", "bool"),
        Scalar("carry_velocity", "bool"),
        *_BACKEND_SCALARS,
        Scalar("stored_elements", "SymInt"),
    ),
    sizes=_layer_sizes,
)
FIRST_MESSAGES_WEIGHT = MESSAGES.n_inputs - len(EdgeWeights._fields)
FIRST_LAYER_WEIGHT = LAYER.n_inputs - len(LayerWeights._fields)
assert MESSAGES.names[FIRST_MESSAGES_WEIGHT:] == EdgeWeights._fields
assert LAYER.names[FIRST_LAYER_WEIGHT:] == LayerWeights._fields

"""Random sequences of calls: no call may change the results of a later one.

Hypothesis draws them, as in `tests/test_properties.py`. To run for longer, with other sequences in
each round of 100:

    python tests/test_sequences.py --minutes 60
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sequence_calls import AROUND, COTANGENTS, Begun, Call, Way, perform, transform
from sequences import COUNT, FORMS, LEFT_OUT, WRITABLE, Edges, Kind, Layer, Record

pytestmark = pytest.mark.native
EXAMPLES = settings.default.max_examples if settings.default is not None else 0
STEPS = 50  # of a sequence
_salts = itertools.count(1)

SEEDS = st.integers(0, 9)
NODES = st.sampled_from((5, 1, 2, 0, 9))
EDGES = st.sampled_from((12, 1, 0, 2, 30))
EDGE_FORMS = ("Graph", "complete", "list", "int32", "transposed", "pair", "lists")
SELECTIONS = ("all", "x", "inputs", "weights", "every other")
DERIVATIVES = [
    *[("forward", "all")] * 3,
    *itertools.product(
        ("grad", "grad", "backward", "twice", "second", "force", "batched"), ("all", *SELECTIONS)
    ),
]
SETTINGS = list(
    itertools.product(("auto", "cpu", "auto", "cpu", "reference"), (None, 0, 2000), (1, 2, 3))
)
MEMORY = st.lists(st.sampled_from(FORMS), min_size=1, max_size=4).map(tuple)
EDITS = ("in place", "data", "data in place", "NumPy")
CHANGES = [
    *itertools.product(("edges",), EDITS),
    *itertools.product(("weight",), ("setattr", *EDITS[:3])),
    *itertools.product(("freeze",), ("none", "all", "every other")),
    *itertools.product(("threads",), "112"),
]
# most calls have nothing around them
SURROUNDINGS: list[tuple[str, ...]] = [
    *[()] * 100,
    *[(name,) for name in AROUND],
    *itertools.combinations(AROUND, 2),
]


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """A layer's widths and options, except the salt."""
    float32 = draw(st.booleans())
    layers = draw(st.sampled_from((1, 1, 1, 2)))
    velocity, carry = draw(st.sampled_from(((False, False), (True, False), (True, True))))
    # in float32 rounding would decide on which side of a kink a number lies
    activation = draw(st.sampled_from(("silu", "relu", "leaky_relu")))
    clamp = draw(st.sampled_from((None, 0.2)))
    return Kind(
        salt=0,
        float32=float32,
        features=draw(st.sampled_from((4, 1, 2))),
        hidden=draw(st.sampled_from((8, 1, 7, 17))),
        outputs=draw(st.sampled_from((None, 1, 3))) if layers == 1 else None,
        dim=draw(st.sampled_from((3, 1, 2))),
        attrs=draw(st.sampled_from((0, 1, 3))),
        node_attrs=draw(st.sampled_from((0, 1, 2))),
        velocity=velocity and layers == 1,
        carry=carry and layers == 1,
        layers=layers,
        activation="silu" if float32 else activation,
        scaled=draw(st.booleans()),
        attention=draw(st.booleans()),
        coord_norm=draw(st.sampled_from((None, 0.7, "unit"))),
        coord_tanh=draw(st.booleans()),
        coord_agg=draw(st.sampled_from(("mean", "sum", None))),
        coord_clamp=None if float32 else clamp,
    )


@st.composite
def calls_of(draw: st.DrawFn) -> Call:
    """Which tensors there are, in which memory, and which of them autograd follows."""
    return Call(
        face=draw(st.sampled_from(("module", "function", "edge pass"))),
        mode=draw(st.sampled_from(("grad", "grad", "grad", "no_grad", "inference"))),
        requires=draw(st.sampled_from((*SELECTIONS, "none"))),
        mask=draw(st.sampled_from((None, None, "soft", "column", "bool"))),
        node_mask=draw(st.sampled_from((None, None, None, None, "soft", "column"))),
        no_outputs=draw(st.booleans()),
        forms=draw(MEMORY),
    )


@st.composite
def ways(draw: st.DrawFn) -> Way:
    """The rest of a call: numbers, derivatives and what is around it."""
    what, wanted = draw(st.sampled_from(DERIVATIVES))
    backend, budget, times = draw(st.sampled_from(SETTINGS))
    cotangents = st.lists(st.sampled_from(COTANGENTS), min_size=1, max_size=2)
    return Way(
        # mostly in the forms of memory that the call had before
        forms=draw(MEMORY) if draw(st.integers(0, 4)) == 4 else (),
        seed=draw(SEEDS),
        what=what,
        wanted=wanted,
        cotangents=tuple(draw(cotangents)) if what != "forward" else ("dense",),
        backend=backend,
        budget=budget,
        times=times,
        around=draw(st.sampled_from(SURROUNDINGS)),
    )


@dataclass(frozen=True, repr=False)
class Change(Record):
    """What is done to a layer, to edges or to the process between calls."""

    what: str = ""
    how: str = ""
    number: int = 0
    form: str = "dense"


@st.composite
def changes(draw: st.DrawFn) -> Change:
    what, how = draw(st.sampled_from(CHANGES))
    if what in ("freeze", "threads"):
        return Change(what, how)
    form = draw(st.sampled_from(WRITABLE)) if what == "weight" else "dense"
    return Change(what, how, draw(st.integers(0, 39)), form)


class Sequence(RuleBasedStateMachine):
    """Layers of few kinds, edges, and calls in any order."""

    layers = Bundle("layers")
    edges = Bundle("edges")
    calls = Bundle("calls")
    begun = Bundle("begun")

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        # options of its own, so that a failure follows from the steps of one sequence
        self.salt = 0.3 + 1e-7 * next(_salts)

    @initialize(target=layers, kind=kinds())
    def two_layers(self, kind: Kind) -> MultipleResults[Layer]:
        made = replace(kind, salt=self.salt)
        return multiple(Layer(made, 0), Layer(made, 1))

    @rule(target=layers, like=layers, kind=kinds(), place=st.integers(0, 39))
    def another_layer(self, like: Layer, kind: Kind, place: int) -> Layer:
        """With the same widths and options, or with one or all of them changed."""
        names = [f.name for f in fields(Kind) if f.name != "salt"]
        name = [*names, "all", *["none"] * 99][place]
        made = like.kind
        if name in ("velocity", "carry", "layers", "float32", "all"):
            made = replace(kind, salt=self.salt)
        elif name != "none" and not (made.float32 and name in ("activation", "coord_clamp")):
            made = replace(made, **{name: getattr(kind, name)})
        if made.layers > 1:
            made = replace(made, outputs=None)
        return Layer(made, 2 + place)

    @initialize(target=edges, form=st.sampled_from(EDGE_FORMS), nodes=NODES, count=EDGES)
    def first_edges(self, form: str, nodes: int, count: int) -> MultipleResults[Edges]:
        """Edges of any form, and a single node, whose rows are dense in any memory."""
        return multiple(Edges(form, nodes, count, 0), Edges("Graph", 1, 0, 0))

    @initialize(target=calls, call=calls_of())
    def first_call(self, call: Call) -> Call:
        return call

    @rule(target=calls, call=calls_of())
    def another_call(self, call: Call) -> Call:
        return call

    @rule(target=edges, form=st.sampled_from(EDGE_FORMS), nodes=NODES, count=EDGES, seed=SEEDS)
    def other_edges(self, form: str, nodes: int, count: int, seed: int) -> Edges:
        return Edges(form, nodes, count, seed)

    @rule(layer=layers, edges=edges, change=changes())
    def change(self, layer: Layer, edges: Edges, change: Change) -> None:
        if change.what == "edges":
            edges.edit(change.how, change.number)
        elif change.what == "weight":
            names = list(dict(layer.module.named_parameters()))
            name = names[change.number % len(names)]
            layer.change(name, change.how, change.form, change.number)
        elif change.what == "freeze":
            layer.freeze(change.how)
        else:
            torch.set_num_threads(int(change.how))

    # Few calls, each made in many ways, so that similar calls follow each other.
    @rule(
        layers=st.lists(layers, min_size=1, max_size=2),
        edges=st.lists(edges, min_size=1, max_size=3),
        call=calls,
        way=ways(),
    )
    def call(self, layers: list[Layer], edges: list[Edges], call: Call, way: Way) -> None:
        call = call.made(way)
        for layer, graph in itertools.product(layers, edges):
            if fits(layer, graph, call):
                perform(layer, graph, call)

    # drawn more often than all else
    call_2 = call_3 = call_4 = call

    @rule(target=begun, layer=layers, edges=edges, call=calls, way=ways())
    def begin(self, layer: Layer, edges: Edges, call: Call, way: Way) -> Any:
        call = call.made(way, mode="grad")
        return Begun(layer, edges, call) if fits(layer, edges, call) else multiple()

    @rule(begun=consumes(begun), way=ways())
    def finish(self, begun: Begun, way: Way) -> None:
        # what autograd has saved must not have been written to
        if begun.edits != begun.layer.edits:
            return
        # a checkpoint's backward runs the forward again, on edges edited since
        if "checkpoint" in begun.call.around and begun.edge_edits != begun.edges.edits:
            return
        around = without(way.around, "autocast", "checkpoint")
        call = begun.call.made(way, around=around)
        if "checkpoint" in begun.call.around:  # its forward runs again now
            call = replace(call, backend=begun.call.backend)
            if "checkpoint elsewhere" in LEFT_OUT:
                call = replace(call, budget=begun.call.budget)
        if "batched" not in LEFT_OUT or call.what != "batched":
            begun.finish(call)

    @rule(
        layer=layers, edges=edges, call=calls, way=ways(), which=st.sampled_from(("grad", "vmap"))
    )
    def transform(self, layer: Layer, edges: Edges, call: Call, way: Way, which: str) -> None:
        # torch.func takes no hooks on saved tensors
        around = without(way.around, "autocast", "checkpoint", "hooks clone", "hooks strided")
        call = call.made(way, around=around, requires="none", mode="grad")
        if "transform" not in LEFT_OUT and fits(layer, edges, call):
            transform(layer, edges, call, which)

    def teardown(self) -> None:
        torch.set_num_threads(1)


def without(names: tuple[str, ...], *left: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left)


def fits(layer: Layer, edges: Edges, call: Call) -> bool:
    """Whether the call can be made, and judged."""
    kind = layer.kind
    if call.face != "module" and kind.layers > 1:
        return False
    if kind.coord_norm == "unit" and edges.num_nodes == 1:
        return False  # a loop's 1 / rho is 1e8
    if "batched" in LEFT_OUT and call.what == "batched":
        return False
    if "checkpoint elsewhere" in LEFT_OUT and "checkpoint" in call.around and len(call.around) > 1:
        return False
    # autocast leaves too few digits to judge a second derivative
    return "autocast" not in call.around or (kind.float32 and call.what not in ("second", "force"))


def run(examples: int, number: int | None = None, **how: Any) -> None:
    machine: Any = Sequence if number is None else seed(number)(Sequence)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
        deadline=None,
        **how,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_no_call_changes_the_results_of_another() -> None:
    run(EXAMPLES * 2)
    assert COUNT.calls > EXAMPLES
    print(COUNT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run random sequences of calls.")
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default: 0)")
    parser.add_argument(
        "--as-found", action="store_true", help="print a failure as found: shrinking might crash"
    )
    given = parser.parse_args()
    how = {"phases": [Phase.generate]} if given.as_found else {}
    start = time.monotonic()
    for number in itertools.count(given.seed):
        run(100, number, database=None, derandomize=False, **how)
        minutes = (time.monotonic() - start) / 60
        print(f"seed {number}: {minutes:.1f} min, {COUNT}", flush=True)
        if minutes >= given.minutes:
            return


if __name__ == "__main__":
    main()

"""The one table of cases: what every backend is compared with the reference on."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from egnn_fast.checks import Row
from egnn_fast.checks.cases import EVERYTHING as EVERYTHING
from egnn_fast.checks.cases import SINGLE_OPTIONS as SINGLE_OPTIONS
from egnn_fast.checks.cases import Case, check_cases
from egnn_fast.options import Options
from egnn_fast.runtime import native

# Backends are named whether they are there or not: without one of them the tests fail. Those that
# run every case in every dtype:
FUSED_BACKENDS = ("cpu",)
# Triton's interpreter takes about 60 ms for a block of edges: for tests that ask for little.
# Triton's wheels are for Linux alone.
INTERPRETED_BACKENDS = ("triton",) if sys.platform == "linux" else ()
DTYPES = (torch.float64, torch.float32)
# a backend with each dtype that it takes
BACKENDS_AND_DTYPES = (
    *itertools.product(FUSED_BACKENDS, DTYPES),
    *itertools.product(INTERPRETED_BACKENDS, (torch.float32,)),
)


def _marked(*values: Any) -> Any:
    marks = [pytest.mark.interpreted] if values[0] in INTERPRETED_BACKENDS else []
    name = "-".join(str(v).removeprefix("torch.") for v in values)
    return pytest.param(*values, marks=marks, id=name)


interpreted = pytest.mark.parametrize("backend", [_marked(name) for name in INTERPRETED_BACKENDS])
even_interpreted = pytest.mark.parametrize(
    "backend", [_marked(name) for name in (*FUSED_BACKENDS, *INTERPRETED_BACKENDS)]
)
even_interpreted_or_reference = pytest.mark.parametrize(
    "backend", [_marked(name) for name in (*FUSED_BACKENDS, *INTERPRETED_BACKENDS, "reference")]
)
even_interpreted_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"), [_marked(*pair) for pair in BACKENDS_AND_DTYPES]
)


def _widths() -> Iterator[Case]:
    """H, D and A: whole vectors and not, each D and A with each kind of H."""
    for k, hidden in enumerate((1, 7, 8, 16, 33, 64, 128, 200)):
        dim, attrs = (3, 1, 16, 2, 8)[k % 5], (0, 1, 4)[k % 3]
        yield Case(f"H{hidden} D{dim} A{attrs}", hidden=hidden, dim=dim, attrs=attrs, mask="soft")
    for dim, attrs in itertools.product((1, 2, 3, 8, 16), (0, 1, 4)):
        yield Case(f"all options, D{dim} A{attrs}", dim=dim, attrs=attrs, options=EVERYTHING)


def _single_options() -> Iterator[Case]:
    for name, options in SINGLE_OPTIONS.items():
        yield Case(f"option {name}", hidden=20, attrs=2, options=options, mask="soft")
        yield Case(f"option {name}, plain", hidden=20, options=options)
        yield Case(
            f"option {name}, complete", "complete", sizes=(6, 3, 9), hidden=20, attrs=2,
            options=options, mask="binary",
        )  # fmt: skip


def _degrees() -> Iterator[Case]:
    # only where no self-loop nor coincident pair makes 1/rho of the unit norm huge
    rich = replace(EVERYTHING, coord_norm="unit")
    full: dict[str, object] = {"attrs": 1, "mask": "soft"}
    for kind in ("uniform", "power", "isolated", "sorted"):
        yield Case(f"{kind} 300", kind, 40, 300, hidden=24, options=rich, attrs=1, mask="soft")
        yield Case(f"{kind} 3000", kind, 200, 3000, hidden=24, options=EVERYTHING, attrs=1)
    yield Case("hub 20000", "hub", 100, 20_000, hidden=32, attrs=1, mask="soft")
    yield Case("hub 20000, attention", "hub", 500, 20_000, hidden=9, options=EVERYTHING)
    for kind in ("loops", "coincident"):
        yield Case(kind, kind, 30, 400, options=EVERYTHING, attrs=1, mask="soft")
    yield Case("few edges among many nodes", nodes=5000, edges=40)
    yield Case("complete, equal", "complete", sizes=(5,) * 100, hidden=24, **full)  # type: ignore[arg-type]
    yield Case("complete, ragged", "complete", sizes=(1, 40, 0, 2, 17, 1, 3), attrs=1, mask="soft")
    yield Case("complete, one of 60", "complete", sizes=(60,), hidden=24, options=rich)
    yield Case("complete, of 1 only", "complete", sizes=(1, 1, 1), attrs=1)
    yield Case("complete, none", "complete", sizes=(), attrs=1, mask="soft")
    yield Case("complete, degrees 47 to 49", "complete", sizes=(48, 49, 50), options=EVERYTHING)
    yield Case("no nodes", nodes=0, edges=0, attrs=1, mask="soft", options=EVERYTHING)
    yield Case("no edges", nodes=5, edges=0, attrs=1, mask="soft", options=EVERYTHING)
    yield Case("one node, no edge", nodes=1, edges=0, options=EVERYTHING)
    yield Case("one node, self-loop", "loops", 1, 1, options=EVERYTHING)
    yield Case("two nodes, one edge", nodes=2, edges=1, attrs=1, mask="soft")


def _block_bounds() -> Iterator[Case]:
    """Around the sizes of register tiles, blocks and tasks: in many rows, and in one."""
    sizes = [k * unit + off for unit in (16, 48, 64) for k in (1, 2, 3) for off in (-1, 0, 1)]
    sizes += [middle + off for middle in (480, 768, 1024, 4096, 7680) for off in (-1, 0, 1)]
    for edges in sorted(set(sizes)):
        yield Case(f"E{edges}", nodes=max(3, edges // 7), edges=edges, attrs=1, mask="soft")
        yield Case(
            f"E{edges} in one row", "hub", edges // 3 + 2, edges, hidden=8, options=EVERYTHING
        )


CASES = (*_widths(), *_single_options(), *_degrees(), *_block_bounds())
# whole layers: the node MLP, mean, scale, velocity and node masks around the edge pass
LAYER_CASES: tuple[Case, ...] = (
    *check_cases(quick=False),
    *(
        Case(
            f"layer {name}", attrs=k % 2, options=options, mask=(None, "binary", "soft")[k % 3],
            node_attrs=k % 4, velocity=k % 3 > 0, carry=k % 3 == 1, node_mask=k % 2 == 0,
            residual=k % 5 > 0,
        )
        for k, (name, options) in enumerate(SINGLE_OPTIONS.items())
    ),
    *(
        Case(
            f"layer F{features} H{hidden} B{node_attrs} N{nodes}", nodes=nodes, edges=5 * nodes,
            features=features, hidden=hidden, node_attrs=node_attrs, attrs=1, velocity=True,
            carry=True, mask="soft", residual=residual,
        )
        for features, hidden, node_attrs, nodes, residual in (
            (1, 8, 0, 3, True), (2, 33, 1, 47, False), (16, 16, 0, 48, True), (7, 1, 3, 49, False),
            (64, 64, 0, 97, True), (33, 20, 9, 100, False), (128, 40, 1, 145, True),
            (1, 64, 0, 500, True), (40, 7, 0, 700, False),
        )
    ),
    Case("layer complete", "complete", sizes=(5,) * 60, attrs=2, velocity=True, features=64,
         hidden=64),
    Case("layer of a hub", "hub", 300, 3000, attrs=1, velocity=True, carry=True, mask="soft",
         options=EVERYTHING, node_attrs=2, node_mask=True),
    Case("layer without edges", nodes=50, edges=0, attrs=1, velocity=True, carry=True),
)  # fmt: skip
# run on every instruction set: remainders of every vector width, every option, every graph
ISA_CASES = (
    *_widths(),
    *_single_options(),
    *(case for case in _degrees() if case.edges <= 3000),
    *(case for case in _block_bounds() if case.edges in (47, 48, 49, 65, 481, 769)),
)


def option_grid() -> Iterator[tuple[Options, str | None, int]]:
    """Every combination of options, with mask and number of edge attributes."""
    heads = [
        {"coord_norm": norm, "coord_tanh": tanh, "coord_clamp": clamp}
        for norm, tanh, clamp in itertools.product((None, "unit", 0.7), (False, True), (None, 0.05))
    ]
    for act, attention, head, mask, attrs in itertools.product(
        ("silu", "relu", "leaky_relu"),
        (False, True),
        [*heads, {"coord_agg": None}],
        (None, "soft"),
        (0, 2),
    ):
        options = Options(activation=act, negative_slope=0.2, attention=attention, **head)  # type: ignore[arg-type]
        yield options, mask, attrs


def describe(options: Options) -> str:
    """The options that differ from the defaults."""
    default = Options()
    changed = [
        f"{name}={value}"
        for name, value in vars(options).items()
        if value != getattr(default, name)
    ]
    return " ".join(changed) or "default"


def widest(backend: str) -> torch.dtype:
    """The widest dtype that a backend takes."""
    return torch.float32 if backend == "triton" else torch.float64


def assert_passed(rows: Sequence[Row]) -> None:
    assert len(rows) > 0
    failed = [
        f"{r.case}, {r.dtype}: {r.quantity}, {r.worst}: {r.error:.2e} > {r.bound:.2e}"
        for r in rows
        if not r.passed
    ]
    assert not failed, "\n".join(failed)


@contextmanager
def kernel_calls(
    forward: int | None = None, backward: int | None = None, backend: str = "cpu"
) -> Iterator[None]:
    """Assert how often a backend's kernels run inside the block; None: at least once."""
    before = _counts(backend)
    yield
    after = _counts(backend)
    for name, wanted in (("forward", forward), ("backward", backward)):
        found = after[name] - before[name]
        if wanted is None:
            assert found > 0, f"the {name} kernel did not run"
        else:
            assert found == wanted, f"the {name} kernel ran {found} times, not {wanted}"


def _counts(backend: str) -> Mapping[str, int]:
    """How often a backend's kernels have run; the reference's, which has none, are the CPU's."""
    if backend == "triton":
        # Triton is imported only where it is used
        from egnn_fast.backends import triton as triton_backend

        return dict(triton_backend.launches)
    assert native.core is not None, native.load_error
    return dict(zip(("forward", "backward"), native.core.calls(), strict=True))

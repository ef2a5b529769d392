"""The cases that Triton's interpreter runs: small, as it takes about 60 ms for a block of edges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cases import EVERYTHING, SINGLE_OPTIONS

from egnn_fast import Options
from egnn_fast.checks.cases import Case

SMALL = Case("small", nodes=12, edges=70, attrs=2, mask="soft", options=EVERYTHING)


def _widths() -> Iterator[Case]:
    """Whole tiles and padded ones; each D and A with some H."""
    for k, hidden in enumerate((1, 7, 16, 33, 64, 100, 120, 128)):
        dim, attrs = (1, 2, 3, 8, 16)[k % 5], (0, 1, 4, 20)[k % 4]
        options = EVERYTHING if k % 2 else Options()
        yield Case(
            f"H{hidden} D{dim} A{attrs}", nodes=9, edges=40, hidden=hidden, dim=dim, attrs=attrs,
            mask="soft", options=options,
        )  # fmt: skip
    for k, dim in enumerate((1, 2, 3, 8, 16)):
        for attrs in ((0, 4), (1, 20))[k % 2]:
            yield replace(SMALL, name=f"all options, D{dim} A{attrs}", dim=dim, attrs=attrs)


def _wide() -> Iterator[Case]:
    """Widths that run in stages: whole tiles and padded ones, each option."""
    for k, hidden in enumerate((129, 160, 200, 256)):
        dim, attrs = (1, 3, 8, 16)[k], (0, 1, 4, 20)[k]
        options = EVERYTHING if k % 2 else Options()
        yield Case(
            f"H{hidden} D{dim} A{attrs}", nodes=9, edges=40, hidden=hidden, dim=dim, attrs=attrs,
            mask="soft", options=options,
        )  # fmt: skip
    for name, options in SINGLE_OPTIONS.items():
        yield Case(
            f"wide, option {name}", nodes=12, edges=40, hidden=130, attrs=1, options=options,
            mask="soft",
        )  # fmt: skip
    yield Case("wide, hub", "hub", 24, 70, hidden=130, attrs=1, options=EVERYTHING)
    yield Case("wide, complete", "complete", sizes=(4, 1, 6), hidden=130, mask="binary")
    yield Case("wide, no edges", nodes=5, edges=0, hidden=130, options=EVERYTHING)


def _options() -> Iterator[Case]:
    for name, options in SINGLE_OPTIONS.items():
        yield Case(
            f"option {name}", nodes=12, edges=40, hidden=20, attrs=2, options=options, mask="soft"
        )
        yield Case(
            f"option {name}, complete", "complete", sizes=(4, 1, 6), options=options, mask="binary"
        )


def _graphs() -> Iterator[Case]:
    # only where no self-loop nor coincident pair makes 1/rho of the unit norm huge
    rich = replace(EVERYTHING, coord_norm="unit")
    for kind in ("uniform", "power", "isolated", "sorted"):
        yield Case(kind, kind, 40, 150, hidden=24, options=rich, attrs=1, mask="soft")
    yield Case("hub 600", "hub", 100, 600, attrs=1, mask="soft")
    yield Case("hubs beside each other", "power", 6, 300, options=EVERYTHING)
    for kind in ("loops", "coincident"):
        yield Case(kind, kind, 20, 80, options=EVERYTHING, attrs=1, mask="soft")
    yield Case("few edges among many nodes", nodes=1000, edges=40)
    yield Case("complete, equal", "complete", sizes=(5,) * 8, hidden=24, attrs=1, mask="soft")
    yield Case("complete, ragged", "complete", sizes=(1, 12, 0, 2, 7, 1, 3), attrs=1, mask="soft")
    yield Case("complete, one of 17", "complete", sizes=(17,), options=rich)
    yield Case("complete, of 1 only", "complete", sizes=(1, 1, 1), attrs=1)
    yield Case("complete, none", "complete", sizes=(), attrs=1, mask="soft")
    yield Case("no nodes", nodes=0, edges=0, attrs=1, mask="soft", options=EVERYTHING)
    yield Case("no edges", nodes=5, edges=0, attrs=1, mask="soft", options=EVERYTHING)
    yield Case("one node, self-loop", "loops", 1, 1, options=EVERYTHING)
    yield Case("two nodes, one edge", nodes=2, edges=1, attrs=1, mask="soft")


def _block_bounds() -> Iterator[Case]:
    """Around the ends of blocks and of programs' runs of them: in many rows, and in one."""
    for edges in (15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 129):
        yield Case(f"E{edges}", nodes=max(3, edges // 7), edges=edges, attrs=1, mask="soft")
        yield Case(f"E{edges} in one row", "hub", edges // 3 + 2, edges, options=EVERYTHING)


# of the edge pass
CASES = (*_widths(), *_wide(), *_options(), *_graphs(), *_block_bounds())


def _layers() -> Iterator[Case]:
    """Each option of a layer, tiles of 16 and of 64 nodes, widths of one and more chunks."""
    plain = replace(SMALL, options=Options(), attrs=0, mask=None)
    yield replace(SMALL, name="all", velocity=True, carry=True, node_attrs=2, node_mask=True)
    yield replace(plain, name="plain")
    yield replace(plain, name="velocity", velocity=True, node_attrs=1)
    yield replace(plain, name="no residual", residual=False, features=33, node_attrs=40)
    yield replace(plain, name="64 features", features=64, hidden=64, options=EVERYTHING)
    yield replace(plain, name="many nodes", nodes=100, edges=60, velocity=True, features=5)
    # two products by three matrices each
    yield replace(SMALL, name="H 33", hidden=33, features=33, velocity=True, residual=False)
    yield replace(plain, name="wide", hidden=130, features=130, velocity=True, attrs=20)
    for agg, norm in (("sum", 0.7), (None, None)):
        options = Options(coord_agg=agg, coord_norm=norm, coord_scale=0.3)
        yield replace(plain, name=f"{agg}", options=options, node_attrs=2)
    moved = Options(coord_agg=None)
    yield replace(plain, name="velocity alone", options=moved, velocity=True, carry=True)
    for activation in ("relu", "leaky_relu"):
        options = Options(activation=activation, negative_slope=0.2)
        yield replace(plain, name=activation, options=options, velocity=True)
    yield Case("complete", "complete", sizes=(5,) * 5, attrs=2, velocity=True, features=16)
    yield replace(SMALL, name="no edges", edges=0, velocity=True, node_attrs=2)
    yield replace(SMALL, name="no nodes", nodes=0, edges=0, velocity=True)


# of whole layers
LAYERS = tuple(_layers())

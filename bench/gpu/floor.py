"""The least time that a pass can take on a GPU: its special functions, its products, its bytes.

The units work side by side, so the floor is the largest of their times. Counts of work are those
of :mod:`egnn_fast.bench.floor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from egnn_fast.bench import floor
from egnn_fast.bench.cases import Case

# special functions that a multiprocessor does in a cycle (sm_70 to sm_90)
MUFU_PER_CYCLE = 16
# of them for a SiLU: an exponential and a reciprocal; one reciprocal for two; or tanh.approx
MUFU_PER_SILU = {"ex2 + rcp": 2.0, "shared rcp": 1.5, "tanh.approx": 1.0}
# the fewest at full accuracy; some kernels take ex2 + rcp
FLOOR_ASSUMES = "shared rcp"
TF32_PRODUCTS = 3  # that make up one as accurate as float32
COORDINATES = 3
OPERAND_BYTES = {"bf16": 2, "fp16": 2}  # of P and Q; else 4


class Work(NamedTuple):
    """What a pass has to do: flop of products, SiLUs, bytes at least, bytes of gathered rows."""

    flop: float
    activations: float
    bytes: float
    gathered: float


class Chip(NamedTuple):
    """What the GPU can do.

    Attributes
    ----------
    multiprocessors : int
    clock_hz : float
        The highest clock of the multiprocessors.
    copy : float
        Bytes read and written per second by a large copy, measured.
    flop : mapping
        Flop per second of a large product in each precision, measured.
    """

    multiprocessors: int
    clock_hz: float
    copy: float
    flop: Mapping[str, float]

    def mufu_seconds(self, activations: float, kind: str = FLOOR_ASSUMES) -> float:
        """Time of SiLUs."""
        cycles = activations * MUFU_PER_SILU[kind] / MUFU_PER_CYCLE
        return cycles / (self.multiprocessors * self.clock_hz)

    def product_rate(self, precision: str) -> float:
        """Flop per second; as accurate as float32 the better of FMA and three tf32 products."""
        if precision == "highest":
            return max(self.flop["highest"], self.flop["high"] / TF32_PRODUCTS)
        return self.flop[precision]

    def seconds(self, work: Work, precision: str, gathers: bool) -> dict[str, float]:
        """Each unit's time, by its name."""
        moved = work.bytes + (work.gathered if gathers else 0.0)
        return {
            "special functions": self.mufu_seconds(work.activations),
            "products": work.flop / self.product_rate(precision),
            "memory": moved / self.copy,
        }


def edge_cycles(hidden: int, kind: str, head: bool = True) -> float:
    """Cycles of a multiprocessor's special units for one edge forward."""
    return (3 if head else 2) * hidden * MUFU_PER_SILU[kind] / MUFU_PER_CYCLE


def work(
    kind: str, measured: str, nodes: int, edges: int, hidden: int, layers: int, head: bool = True,
    precision: str = "highest",
) -> Work:  # fmt: skip
    """Of all layers; a kind of :class:`egnn_fast.bench.cases.Case`, or "network"."""
    velocity = kind == "nbody"

    def of(degree: int) -> floor.Work:
        case = Case("", "", kind, nodes=1, degree=degree, hidden=hidden, layers=layers, head=head,
                    velocity=velocity)  # fmt: skip
        return floor.pass_work(case, measured)

    # all of it grows with N and with E
    node, edge = of(0), of(1)
    passes = edge.bytes - node.bytes
    per_edge = layers * ((hidden + COORDINATES) * 4 + 4)
    # forward a sender's row is read; backward it is read again, and its gradient, float32, added to
    rows = passes / per_edge
    narrower = (4 - OPERAND_BYTES.get(precision, 4)) * hidden
    gathered = layers * (rows * (hidden + COORDINATES) * 4 - min(rows, 2.0) * narrower)
    passes = gathered + layers * rows * 4
    return Work(
        nodes * node.flop + edges * (edge.flop - node.flop),
        nodes * node.activations + edges * (edge.activations - node.activations),
        nodes * node.bytes + edges * (passes - gathered),
        edges * gathered,
    )

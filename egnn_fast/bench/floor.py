"""The least time that a pass can take: its products at the BLAS's rate, its SiLUs at ours.

An edge costs two H x H products forward (one without a coordinate head), and three times those
backward: recomputed, and one each for the input's and the weight's gradient. Nodes count P and Q,
phi_h and phi_v in the same way. Left out are the terms of an edge that do not grow with H squared
(distance, edge_attr, gate, sums) and everything outside the layers: the floor is a little too low,
a share of it never flatters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from egnn_fast.bench.cases import BACKWARD, INFERENCE, RECORDING, STEP, TRAINING, Case
from egnn_fast.runtime import native

SQUARE = 1536  # a product that runs at the BLAS's best
TALL = 65_536  # rows of the layer's own shape: tall, H wide
SILU_PER_THREAD = 4096  # numbers, which stay in the first-level cache
_REPEATS = 5
_COPY_BYTES = 1 << 28  # beyond any cache


@dataclass(frozen=True)
class Work:
    """What one pass has to do.

    Attributes
    ----------
    flop : float
        Of the matrix products; a multiply-add is two.
    activations : float
        SiLUs, or their derivatives.
    bytes : float
        The least memory traffic: node tensors once, a sender's row for every edge.
    """

    flop: float = 0.0
    activations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.flop + other.flop, self.activations + other.activations, self.bytes + other.bytes
        )


@dataclass(frozen=True)
class Rates:
    """What this machine reaches, in this process, with its threads.

    Attributes
    ----------
    blas : float
        Flop of ``torch.mm`` per second, of a large square or the layer's shape, the better one.
    silu : float or None
        SiLUs per second of the extension's own vectorised code; None without the extension.
    copy : float
        Bytes read and written per second by a copy of a large tensor.
    """

    blas: float
    silu: float | None
    copy: float

    def seconds(self, work: Work) -> float | None:
        """The floor of some work; None where the rate of SiLU is unknown."""
        if self.silu is None:
            return None
        return work.flop / self.blas + work.activations / self.silu


def forward_work(case: Case) -> Work:
    """Of all layers of a case, forward."""
    n, e, h, layers = case.num_nodes, case.num_edges, case.hidden, case.layers
    products = 2 if case.head else 1
    edge_flop = products * 2 * h * h
    edge_activations = (products + 1) * h
    # the sender's row of Q and its coordinates; the graph counts 4 bytes an edge
    edge_bytes = (h + 3) * case.itemsize + 4
    if case.kind == "edges":  # P and Q are given, M and X are what comes out
        node = Work(bytes=(2 * h + h) * case.itemsize)
    else:
        phi_h = 2 * 2 * h * h + 2 * h * h  # [h ; M] -> H -> H
        phi_v = 2 * h * h + 2 * h if case.velocity else 0
        node = Work(
            flop=2 * h * 2 * h + phi_h + phi_v,
            activations=h * (2 if case.velocity else 1),
            # h; P and Q written and read; M written and read; h'
            bytes=(h + 4 * h + 2 * h + h) * case.itemsize,
        )
    return Work(
        layers * (n * node.flop + e * edge_flop),
        layers * (n * node.activations + e * edge_activations),
        layers * (n * node.bytes + e * edge_bytes),
    )


def backward_work(case: Case) -> Work:
    """Of all layers of a case, backward, recomputing what was not kept."""
    forward = forward_work(case)
    # Q is gathered again, and each edge adds a row to its sender's gradient
    return Work(3 * forward.flop, forward.activations, 2 * forward.bytes)


def pass_work(case: Case, measured: str) -> Work:
    """Of a pass: forward, backward or both."""
    if measured in (INFERENCE, RECORDING):
        return forward_work(case)
    if measured == BACKWARD:
        return backward_work(case)
    if measured in (TRAINING, STEP):
        return forward_work(case) + backward_work(case)
    raise ValueError(f"measured: no pass is called {measured!r}")


class Probes:
    """What the rates are measured with, run in turn with what they are to judge.

    A rate taken at another moment, or as the best of many while times are medians, would compare
    two different machines: neighbours and clock rates come and go.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of the numbers.
    hidden : int
        H, for the layer's own shape ``[65536, H] @ [H, H]``.
    threads : int
        Of PyTorch and of the SiLU; must be what ``torch.get_num_threads()`` says.
    """

    def __init__(self, dtype: str, hidden: int, threads: int) -> None:
        if threads != torch.get_num_threads():
            raise ValueError(f"threads: PyTorch runs on {torch.get_num_threads()}, got {threads}")
        kind: torch.dtype = getattr(torch, dtype)
        products = [_product(SQUARE, SQUARE, kind), _product(TALL, hidden, kind)]
        # the shape that the BLAS is better at
        self._product, self._flop = min(products, key=lambda p: _seconds(p[0]) / p[1])
        silu = _silu(kind, threads)
        self._silu = None if silu is None else silu[0]
        self._silus = 0.0 if silu is None else silu[1]
        self._copy = _copy_rate(kind)

    def functions(self) -> dict[str, Callable[[], object]]:
        """The probes by name, to be timed along."""
        found: dict[str, Callable[[], object]] = {"blas": self._product}
        return found if self._silu is None else {**found, "silu": self._silu}

    def rates(self, seconds: Mapping[str, float]) -> Rates:
        """The rates, given how long each probe took."""
        silu = None if self._silu is None else self._silus / seconds["silu"]
        return Rates(self._flop / seconds["blas"], silu, self._copy)


def _product(rows: int, inner: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    a, b = (
        torch.randn(rows, inner, dtype=dtype, device="cpu"),
        torch.randn(inner, inner, dtype=dtype, device="cpu"),
    )
    out = torch.empty(rows, inner, dtype=dtype, device="cpu")
    times = max(1, SQUARE**3 // (rows * inner * inner))

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return run, times * 2.0 * rows * inner * inner


def _silu(dtype: torch.dtype, threads: int) -> tuple[Callable[[], object], float] | None:
    if native.core is None:
        return None
    silu = native.core.silu
    count, repeats = SILU_PER_THREAD * threads, 2000
    source, target = (
        torch.randn(count, dtype=dtype, device="cpu"),
        torch.empty(count, dtype=dtype, device="cpu"),
    )
    double = dtype == torch.float64

    def run() -> None:
        silu(source.data_ptr(), target.data_ptr(), count, double, threads, repeats)

    return run, float(count * repeats)


def _copy_rate(dtype: torch.dtype) -> float:
    source = torch.ones(_COPY_BYTES // dtype.itemsize, dtype=dtype, device="cpu")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source))


def _seconds(run: Callable[[], object]) -> float:
    """The median of a few runs."""
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)

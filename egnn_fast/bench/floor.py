"""The floor: the least time of a pass, with products at the BLAS's rate and SiLUs at ours.

An edge costs two H x H products forward (one without a coordinate head). Backward it costs three
times as many: the forward's again, one for each input's gradient, and one for each weight's. P and
Q, phi_h and phi_v count in the same way, per node. The terms of an edge that do not grow with H
squared (distance, edge_attr, gate, sums) and everything outside the layers are left out. So the
floor is a little too low, and so is the share of it that a pass reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from egnn_fast.bench.cases import BACKWARD, INFERENCE, RECORDING, STEP, TRAINING, Case
from egnn_fast.runtime import native

SQUARE = 1536  # side of a square product, large enough for the BLAS's best rate
TALL = 65_536  # rows of a product of the layer's shape, [TALL, H] @ [H, H]
SILU_PER_THREAD = 4096  # numbers of the SiLU probe; they stay in the first-level cache
_REPEATS = 5
_COPY_BYTES = 1 << 28  # size of the copy probe, larger than any cache


@dataclass(frozen=True)
class Work:
    """The work of one pass.

    Attributes
    ----------
    flop : float
        Floating-point operations of the matrix products; a multiply-add counts as two.
    activations : float
        Number of SiLUs, or of their derivatives.
    bytes : float
        The least memory traffic: every node tensor once, and a sender's row for every edge.
    """

    flop: float = 0.0
    activations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """The work of both passes together."""
        return Work(
            self.flop + other.flop, self.activations + other.activations, self.bytes + other.bytes
        )


@dataclass(frozen=True)
class Rates:
    """The rates of this machine in this process, on its threads.

    Attributes
    ----------
    blas : float
        Flop per second of ``torch.mm``, for a large square or the layer's shape, whichever is
        faster.
    silu : float or None
        SiLUs per second of the extension's own vectorised code; None without the extension.
    copy : float
        Bytes read and written per second by a copy of a large tensor.
    """

    blas: float
    silu: float | None
    copy: float

    def seconds(self, work: Work) -> float | None:
        """The floor of some work in seconds; None if the rate of SiLU is unknown."""
        if self.silu is None:
            return None
        return work.flop / self.blas + work.activations / self.silu


def forward_work(case: Case) -> Work:
    """The work of all layers of a case, forward."""
    n, e, h, layers = case.num_nodes, case.num_edges, case.hidden, case.layers
    products = 2 if case.head else 1
    edge_flop = products * 2 * h * h
    edge_activations = (products + 1) * h
    # the sender's row of Q, its coordinates, and 4 bytes of the graph
    edge_bytes = (h + 3) * case.itemsize + 4
    if case.kind == "edges":  # P and Q read, M written
        node = Work(bytes=(2 * h + h) * case.itemsize)
    else:
        phi_h = 2 * 2 * h * h + 2 * h * h  # [h ; M] -> H -> H
        phi_v = 2 * h * h + 2 * h if case.velocity else 0
        node = Work(
            flop=2 * h * 2 * h + phi_h + phi_v,
            activations=h * (2 if case.velocity else 1),
            # h read; P and Q written and read; M written and read; h' written
            bytes=(h + 4 * h + 2 * h + h) * case.itemsize,
        )
    return Work(
        layers * (n * node.flop + e * edge_flop),
        layers * (n * node.activations + e * edge_activations),
        layers * (n * node.bytes + e * edge_bytes),
    )


def backward_work(case: Case) -> Work:
    """The work of all layers of a case, backward, with the forward's products run again."""
    forward = forward_work(case)
    # twice the bytes: Q is gathered again, and each edge adds a row to its sender's gradient
    return Work(3 * forward.flop, forward.activations, 2 * forward.bytes)


def pass_work(case: Case, measured: str) -> Work:
    """The work of a pass: forward, backward or both.

    Raises
    ------
    ValueError
        There is no such pass.
    """
    if measured in (INFERENCE, RECORDING):
        return forward_work(case)
    if measured == BACKWARD:
        return backward_work(case)
    if measured in (TRAINING, STEP):
        return forward_work(case) + backward_work(case)
    raise ValueError(f"measured: no pass is called {measured!r}")


class Probes:
    """Functions that measure the rates. They are timed in turn with the passes.

    The machine's speed changes with its load and clock rate. So a rate must be measured at the same
    time as the passes, and be a median as their times are.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Dtype of the numbers.
    hidden : int
        H, for the product of the layer's shape, ``[65536, H] @ [H, H]``.
    threads : int
        Threads of PyTorch and of the SiLU; must equal ``torch.get_num_threads()``.

    Raises
    ------
    ValueError
        PyTorch has another number of threads.
    """

    def __init__(self, dtype: str, hidden: int, threads: int) -> None:
        if threads != torch.get_num_threads():
            raise ValueError(f"threads: PyTorch runs on {torch.get_num_threads()}, got {threads}")
        kind: torch.dtype = getattr(torch, dtype)
        products = [_product(SQUARE, SQUARE, kind), _product(TALL, hidden, kind)]
        # the shape with the higher rate
        self._product, self._flop = min(products, key=lambda p: _seconds(p[0]) / p[1])
        silu = _silu(kind, threads)
        self._silu = None if silu is None else silu[0]
        self._silus = 0.0 if silu is None else silu[1]
        self._copy = _copy_rate(kind)

    def functions(self) -> dict[str, Callable[[], object]]:
        """The functions to time, by name."""
        probes: dict[str, Callable[[], object]] = {"blas": self._product}
        return probes if self._silu is None else {**probes, "silu": self._silu}

    def rates(self, seconds: Mapping[str, float]) -> Rates:
        """The rates, from the seconds that each of :meth:`functions` took."""
        silu = None if self._silu is None else self._silus / seconds["silu"]
        return Rates(self._flop / seconds["blas"], silu, self._copy)


def _product(rows: int, inner: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A function that multiplies ``[rows, inner] @ [inner, inner]`` some times, and its flop."""
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
    """A function that computes SiLUs, and their number; None without the extension."""
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
    """Bytes read and written per second."""
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

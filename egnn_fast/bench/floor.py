"""The least time that a pass can take: its products at the BLAS's rate, its SiLUs at ours.

An edge costs two H x H products forward (one without a coordinate head), and three times those
backward: recomputed, and one each for the input's and the weight's gradient. Nodes count P and Q,
phi_h and phi_v in the same way. Left out are the terms of an edge that do not grow with H squared
(distance, edge_attr, gate, sums) and everything outside the layers: the floor is a little too low,
a share of it never flatters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from egnn_fast import _native
from egnn_fast.bench.cases import BACKWARD, INFERENCE, RECORDING, STEP, TRAINING, Case

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
        Flop of ``torch.mm`` per second: the better of a large square and the layer's shape.
    silu : float or None
        SiLUs per second of the extension's own vectorised code; None without the extension.
    copy : float
        Bytes read and written per second by a copy of a large tensor.
    """

    blas: float
    silu: float | None
    copy: float

    def best(self, other: Rates) -> Rates:
        """The better of two measurements: what disturbs the machine only makes it slower."""
        silu = None if self.silu is None or other.silu is None else max(self.silu, other.silu)
        return Rates(max(self.blas, other.blas), silu, max(self.copy, other.copy))

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


def rates(dtype: str, hidden: int, threads: int) -> Rates:
    """Measure this machine's rates, in about a second.

    Parameters
    ----------
    dtype : {"float32", "float64"}
        Of the numbers.
    hidden : int
        H, for the layer's own shape ``[65536, H] @ [H, H]``.
    threads : int
        Of PyTorch and of the SiLU; must be what ``torch.get_num_threads()`` says.
    """
    if threads != torch.get_num_threads():
        raise ValueError(f"threads: PyTorch runs on {torch.get_num_threads()}, got {threads}")
    kind: torch.dtype = getattr(torch, dtype)
    blas = max(
        _product_rate(rows, inner, kind) for rows, inner in ((SQUARE, SQUARE), (TALL, hidden))
    )
    return Rates(blas, _silu_rate(kind, threads), _copy_rate(kind))


def _product_rate(rows: int, inner: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, inner, dtype=dtype)
    out = torch.empty(rows, inner, dtype=dtype)
    times = max(1, SQUARE**3 // (rows * inner * inner))

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return times * 2 * rows * inner * inner / _fastest(run)


def _silu_rate(dtype: torch.dtype, threads: int) -> float | None:
    if _native.core is None:
        return None
    silu = _native.core.silu
    count, repeats = SILU_PER_THREAD * threads, 2000
    source, target = torch.randn(count, dtype=dtype), torch.empty(count, dtype=dtype)
    double = dtype == torch.float64

    def run() -> None:
        silu(source.data_ptr(), target.data_ptr(), count, double, threads, repeats)

    return count * repeats / _fastest(run)


def _copy_rate(dtype: torch.dtype) -> float:
    source = torch.ones(_COPY_BYTES // dtype.itemsize, dtype=dtype)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _fastest(lambda: target.copy_(source))


def _fastest(run: Callable[[], object]) -> float:
    """The least seconds of several runs: a rate is what the machine can do."""
    best = math.inf
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best

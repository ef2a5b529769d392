"""Count what the edge pass launches, and predict the host's time for it.

A pass takes the longer of the GPU's time and of the host's time for its launches. The count is that
of a call without options, with dense tensors and whole widths, on a graph that an earlier call
cached; backward, of one with all gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from egnn_fast.backends.triton import call, staged
from egnn_fast.kernels.blocks import blocks_for
from egnn_fast.kernels.records import padded, row_width, weight_parts

# Seconds of the host, measured with Triton 3.7 and PyTorch 2.13: Triton's launcher with some forty
# arguments in records; an operation of PyTorch or the BLAS. They depend on the host.
TRITON_SECONDS, TORCH_SECONDS = 22e-6, 9e-6
COORDINATES = 3
_FLOAT = 4


@dataclass(frozen=True)
class Launches:
    """Numbers of launches: Triton's kernels, and PyTorch's operations."""

    triton: int = 0
    torch: int = 0

    def __add__(self, other: Launches) -> Launches:
        return Launches(self.triton + other.triton, self.torch + other.torch)

    def __mul__(self, times: int) -> Launches:
        return Launches(self.triton * times, self.torch * times)

    @property
    def seconds(self) -> float:
        """The host's time."""
        return self.triton * TRITON_SECONDS + self.torch * TORCH_SECONDS


def operand_bytes(precision: str) -> int:
    """Bytes of a number in the products' operands."""
    return 2 if precision in ("bf16", "fp16") else _FLOAT


def held_bytes(direction: str, hidden: int, precision: str, *, staged_pass: bool,
               ordered: bool = False) -> int:  # fmt: skip
    """Bytes that a pass holds for each edge of a chunk; 0: there are no chunks."""
    backward = direction == "backward"
    tiles = staged._TILES_BACKWARD if backward else staged._TILES_FORWARD
    held = tiles * row_width(hidden, True) * operand_bytes(precision) if staged_pass else 0
    if backward and staged_pass:  # of d and of the mask
        held += _FLOAT * (COORDINATES + 1)
    if backward and ordered:
        held += _FLOAT * (row_width(hidden, staged_pass) + COORDINATES)
    return held


def chunks_of(edges: int, block: int, held: int) -> int:
    """Chunks that :meth:`egnn_fast.backends.triton.call.Call.chunks` cuts edges into, by bytes.

    Its limit on edges does not bind at the sizes that are predicted.
    """
    blocks = -(-edges // block)
    return -(-blocks // max(1, call.CHUNK_BYTES // held // block)) if held else 1


def launches_of(
    direction: str, hidden: int, precision: str, edges: int, *,
    ordered: bool = False, arch: str = "sm_90",
) -> Launches:  # fmt: skip
    """The launches of a pass, ``"forward"`` or ``"backward"``.

    ``ordered``: with deterministic sums over senders.
    """
    row = blocks_for(direction, precision, padded(hidden), arch)
    ordered = ordered and direction == "backward"
    held = held_bytes(direction, hidden, precision, staged_pass=row.staged, ordered=ordered)
    chunks = chunks_of(edges, row.edges, held)
    # weights rounded to the operands' type are packed; dense float32 ones are read in place
    packed = operand_bytes(precision) == 2 or precision == "high"
    around = Launches(triton=int(packed)) + _finished(chunks)
    if direction == "forward":
        # the sums M and X begin at 0
        return around + Launches(torch=2) + _chunk_forward(row.staged) * chunks
    of_chunk = Launches(triton=1)
    if row.staged:
        of_chunk = _chunk_backward(precision)
    if ordered:
        of_chunk += Launches(triton=2)  # sums over senders, and their shared rows
    # buffers set to 0: P and Q, x as receiver and as sender, the weights; then gradients from them
    return around + of_chunk * chunks + Launches(torch=4 + _collected(hidden, row.staged))


def _finished(chunks: int) -> Launches:
    """The sums of rows that programs share, and the concatenation of several chunks' slots."""
    groups = [min(call.FINISHED_TOGETHER, chunks - begin)
              for begin in range(0, chunks, call.FINISHED_TOGETHER)]  # fmt: skip
    return Launches(len(groups), sum(group > 1 for group in groups))


def _chunk_forward(staged_pass: bool) -> Launches:
    return Launches(3, 2) if staged_pass else Launches(1)


def _chunk_backward(precision: str) -> Launches:
    """Two products again, two back, two for the weights; in 16 bits these are added apart."""
    return Launches(5, 4 + 2 * (2 if operand_bytes(precision) == 2 else 1))


def _collected(hidden: int, staged_pass: bool) -> int:
    """x's gradient, the programs' sums for the weights, a copy of each of their parts."""
    parts = len(weight_parts(hidden, 0, staged_pass))
    # in stages the sums for w2 and w3 begin at 0 too, and those of their runs of edges are added up
    return 2 + parts + 4 * staged_pass

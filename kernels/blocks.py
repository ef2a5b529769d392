"""Block sizes: edges of a block, warps of a program, programs of a multiprocessor.

One row for each pass, padded width and precision, with its source; Ampere, consumer cards and
Blackwell have rows of their own. A width without a row takes that of the next larger one. No tuning
at import.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """How a kernel is launched.

    Attributes
    ----------
    edges : edges of a block
    warps : warps of a program
    programs : programs of a multiprocessor
    in_memory : backward: how many of the sums for w2 and w3, in this order, are in memory, not in
        registers
    source : how the row was chosen
    streamed : how many of w3 and w2, in this order, are loaded again for each block, because they
        do not fit into shared memory
    staged : whether the pass runs in stages with products by the BLAS between them; the row is then
        that of the stages
    split : ``input_precision`` of products as accurate as float32, on NVIDIA's GPUs
    paired : whether one reciprocal serves two activations: less work for the special function
        units, more for others
    shared_slopes : backward: how many layers, from the first, hold their slopes in shared memory,
        not in registers; 0 if products are as accurate as float32
    prefetch : backward: whether L2 loads the rows that the next block gathers ahead
    """

    edges: int
    warps: int
    programs: int
    in_memory: int
    source: str
    streamed: int = 0
    staged: bool = False
    split: str = "tf32x3"
    paired: bool = True
    shared_slopes: int = 0
    prefetch: bool = False

    def launch_options(self, direction: str, nvidia: bool) -> dict[str, int]:
        """Triton's options for compiling a pass.

        The programs of a multiprocessor share its registers. Without ``maxnreg`` NVIDIA's assembler
        takes fewer than a program's share forward, as if more programs came, and spills.
        """
        # one stage: Triton's pipeliner, which starts the next block's loads early, fails on inline
        # assembly
        options = {"num_warps": self.warps, "num_stages": 1}
        if nvidia and direction == "forward" and not self.staged:
            share = _REGISTERS // (_LANES * self.warps * self.programs)
            options["maxnreg"] = min(share // 8 * 8, _MOST_REGISTERS)
        return options


# registers of a multiprocessor, threads of a warp, the most registers of a thread
_REGISTERS, _LANES, _MOST_REGISTERS = 1 << 16, 32, 255
_KINDS, _WIDTHS = ("16", "high", "highest"), (16, 32, 64, 128, 256)
_LEAST = "offline: the least predicted time on sm_90, Triton 3.7"
# at the row's own width; narrower layers and fp16 were not timed
_H200 = "measured: NVIDIA H200, 2026-11-28, Triton 3.6, ptxas 13.5"
_FITS = "offline: fits into shared memory, compiled for {}, Triton 3.7"
_HOLDS = "offline: the least predicted time of what spills nothing on {}, Triton 3.7"


def _staged(kind: str, width: int, source: str) -> Blocks:
    """A row for stages; wide tiles of float32 take the most registers."""
    if width <= 128:
        return Blocks(32, 4, 4, 0, source, staged=True)
    return Blocks(32 if kind == "16" else 16, 8, 2, 0, source, staged=True)


# (pass, precision, largest padded width) in ascending width; "16": bf16 and fp16
TABLE: dict[tuple[str, str, int], Blocks] = {
    ("forward", "16", 64): Blocks(64, 4, 4, 0, _H200, paired=False),
    ("forward", "16", 128): Blocks(64, 4, 2, 0, _LEAST, paired=False),
    ("forward", "16", 256): _staged("16", 256, _LEAST),
    ("forward", "high", 64): Blocks(64, 4, 4, 0, _H200, paired=False),
    ("forward", "high", 128): Blocks(128, 8, 1, 0, _LEAST, streamed=2),
    ("forward", "high", 256): _staged("high", 256, _LEAST),
    ("forward", "highest", 64): Blocks(64, 4, 3, 0, _H200, split="bf16x6", paired=False),
    # three bfloat16 parts take less shared memory than two of tf32
    ("forward", "highest", 128): Blocks(128, 8, 1, 0, _LEAST, streamed=2, split="bf16x6"),
    ("forward", "highest", 256): _staged("highest", 256, _LEAST),
    ("backward", "16", 32): Blocks(64, 4, 2, 0, _LEAST, paired=False),
    ("backward", "16", 64): Blocks(64, 4, 2, 0, _H200, shared_slopes=1, prefetch=True),
    ("backward", "16", 128): Blocks(
        128, 8, 1, 0, _H200, streamed=1, paired=False, shared_slopes=2, prefetch=True
    ),
    ("backward", "16", 256): _staged("16", 256, _LEAST),
    ("backward", "high", 32): Blocks(64, 4, 1, 0, _HOLDS.format("sm_90"), shared_slopes=1),
    ("backward", "high", 64): Blocks(
        32, 4, 2, 0, _H200, paired=False, shared_slopes=1, prefetch=True
    ),
    ("backward", "high", 128): Blocks(128, 8, 1, 2, _LEAST, streamed=2, paired=False),
    ("backward", "high", 256): _staged("high", 256, _LEAST),
    ("backward", "highest", 16): Blocks(32, 2, 4, 0, _LEAST),
    ("backward", "highest", 32): Blocks(32, 2, 3, 0, _LEAST),
    ("backward", "highest", 64): Blocks(32, 4, 1, 2, _H200, paired=False, prefetch=True),
    ("backward", "highest", 128): _staged("highest", 128, _LEAST),
    ("backward", "highest", 256): _staged("highest", 256, _LEAST),
}

# Ampere: less shared memory, and matrix units whose operands lie in registers
AMPERE: dict[tuple[str, str, int], Blocks] = {
    ("forward", "highest", 64): Blocks(64, 4, 2, 0, _LEAST, paired=False),
    ("forward", "16", 64): Blocks(64, 4, 2, 0, _FITS.format("sm_80"), paired=False),
    ("forward", "high", 64): Blocks(64, 4, 2, 0, _FITS.format("sm_80")),
    ("forward", "16", 128): Blocks(64, 4, 1, 0, _HOLDS.format("sm_80"), paired=False),
    ("forward", "high", 128): Blocks(64, 8, 1, 0, _HOLDS.format("sm_80"), streamed=2, paired=False),
    ("forward", "highest", 128): Blocks(32, 8, 1, 0, _FITS.format("sm_80"), streamed=2),
    ("backward", "16", 32): Blocks(
        64, 4, 2, 0, _HOLDS.format("sm_80"), paired=False, shared_slopes=1
    ),
    ("backward", "16", 64): Blocks(
        64, 4, 2, 0, _HOLDS.format("sm_80"), paired=False, shared_slopes=1
    ),
    ("backward", "high", 32): Blocks(64, 4, 1, 0, _HOLDS.format("sm_80"), shared_slopes=1),
    ("backward", "high", 64): Blocks(64, 4, 1, 1, _HOLDS.format("sm_80"), shared_slopes=1),
    ("backward", "highest", 64): _staged("highest", 64, _FITS.format("sm_80")),
} | {
    ("backward", kind, 128): _staged(kind, 128, _FITS.format("sm_80")) for kind in _KINDS
}  # fmt: skip


def _blackwell(direction: str, kind: str, width: int) -> Blocks:
    """A row for sm_100.

    For 64 rows and more its matrix units use a memory of their own, which Triton 3.7 cannot lay out
    for all of these kernels: blocks are smaller.
    """
    source = "offline: compiles for sm_100, Triton 3.7"
    if width > 128 or (direction, kind, width) == ("backward", "highest", 128):
        return _staged(kind, width, source)
    if (direction, width) == ("backward", 32) and kind != "highest":
        source = _HOLDS.format("sm_100")
        # high would spill without
        return Blocks(32, 2, 4, 0, source, paired=kind == "high", shared_slopes=2)
    if width <= 64:
        slopes = int(direction == "backward" and kind != "highest")
        warps, programs = (2, 4) if width <= 32 else (4, 2)
        return Blocks(32, warps, programs, 0, source, shared_slopes=slopes)
    return Blocks(32, 8, 1, 2 if direction == "backward" else 0, source, streamed=2)


_LITTLE = "offline: the least predicted time on sm_89 and sm_120, spills and all, Triton 3.7"
# Ada and other consumer cards, on top of Ampere's: less shared memory still
CONSUMER: dict[tuple[str, str, int], Blocks] = {
    ("forward", "highest", 64): Blocks(
        64, 4, 1, 0, _FITS.format("sm_89"), split="bf16x6", paired=False
    ),
    ("forward", "16", 128): Blocks(32, 8, 1, 0, _FITS.format("sm_89"), streamed=2),
    ("backward", "16", 32): Blocks(64, 4, 2, 0, _LITTLE, paired=False),
    ("backward", "16", 64): Blocks(64, 4, 1, 0, _LITTLE, paired=False),
    ("backward", "high", 32): Blocks(64, 4, 1, 0, _LITTLE, paired=False),
    ("backward", "high", 64): Blocks(64, 4, 1, 0, _FITS.format("sm_89"), streamed=2),
}

BLACKWELL = {(*key[:2], width): _blackwell(*key[:2], width) for key in TABLE for width in _WIDTHS}


def blocks_for(direction: str, precision: str, width: int, arch: str = "sm_90") -> Blocks:
    """The row for a pass, ``"forward"`` or ``"backward"``, a precision and a padded width.

    An architecture without rows of its own takes those of sm_90.
    """
    kind = "16" if precision in ("bf16", "fp16") else precision
    table = TABLE
    if arch in ("sm_80", "sm_87"):
        table = TABLE | AMPERE
    elif arch.startswith(("sm_8", "sm_12")):
        table = TABLE | AMPERE | CONSUMER
    elif arch.startswith("sm_10"):
        table = BLACKWELL
    fitting = [w for d, p, w in table if (d, p) == (direction, kind) and w >= width]
    return table[direction, kind, min(fitting)]


def staged_blocks(precision: str, width: int) -> Blocks:
    """The row for a call that runs in stages although its own row does not say so."""
    return _staged("16" if precision in ("bf16", "fp16") else precision, width, _LEAST)


def node_blocks(width: int, precision: str, few: bool, arch: str) -> tuple[int, int, int]:
    """``(nodes of a tile, columns multiplied at once, warps)`` of the kernels over nodes.

    Few nodes are spread over all multiprocessors. For many, larger tiles load weights less often,
    as far as registers and shared memory hold them. Blackwell: see :func:`_blackwell`.
    """
    if few or width > (64 if precision == "highest" else 128):
        tile = 16
    else:
        tile = 32 if arch.startswith("sm_10") else 64
    return tile, 32, 8 if width > 64 and tile > 16 else 4


def few_nodes(nodes: int, multiprocessors: int) -> bool:
    """Whether larger tiles than the smallest would leave multiprocessors without work."""
    return nodes <= 64 * multiprocessors


def sender_block(width: int) -> int:
    """Edges of a block in the sums over senders."""
    return 64 if width <= 64 else 32


def sender_options(nvidia: bool) -> dict[str, int]:
    """Triton's options for compiling the sums over senders."""
    return {"num_warps": 4} | ({"maxnreg": _MOST_REGISTERS} if nvidia else {})

"""Triton kernels of the fused layer, installed as ``egnn_fast.kernels``: one file a kernel.

What can be said of them without Triton stands here.
"""

from __future__ import annotations

import os

import torch

MAX_HIDDEN, MAX_DIM = 256, 16
# what a precision's name ends with where activations may be approximate
APPROXIMATE = "~"
# compute capabilities of the GPUs on which all checks passed: see bench/results
PROVEN: frozenset[tuple[int, int]] = frozenset()


# read once, at import, as Triton does
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return _INTERPRETING

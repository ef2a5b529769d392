"""Triton kernels of the fused layer and their launchers, installed as ``egnn_fast.kernels``.

This file has what is known of them without importing Triton. Kernels: ``forward``, ``backward``
(the edge pass), ``staged``, ``staged_backward`` (the same in stages), ``nodes``, ``sums``. Shared:
``device``, ``edges``, ``head``, ``rows``, ``gradients``, ``records``, ``blocks``.
"""

from __future__ import annotations

import os

import torch

MAX_HIDDEN, MAX_DIM = 256, 16
# the end of a precision's name if activations may be approximate
APPROXIMATE = "~"
# compute capabilities of the GPUs on which all checks passed: see bench/results
PROVEN: frozenset[tuple[int, int]] = frozenset()
# those on which some did
TRIED = frozenset({(9, 0)})


# read once, at import, as Triton does
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return _INTERPRETING

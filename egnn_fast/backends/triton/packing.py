"""The edge pass's weights as its kernels take them: dense, of whole tiles, rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast.kernels.nodes import PACKED_ROWS, pack_weights
from egnn_fast.kernels.records import Spec, Weights

_MATRICES = ("w2", "w3")


def packed(weights: Weights, spec: Spec, operand: torch.dtype) -> Weights:
    """Weights of any width, all in one launch if any of them changes.

    ``w_r`` and ``w_a`` are read in place where they are columns of the first linear's weight.
    """
    channels, width = weights.w2.shape[0], spec.H.value
    given = Weights(*(t if t is None else _readable(n, t) for n, t in weights._asdict().items()))
    rounded = operand != torch.float32 or spec.ROUND.value
    found: dict[str, Tensor] = {}
    for name, t in given._asdict().items():
        if t is None or name == "b_g":
            continue
        square = name in _MATRICES
        if width != channels or not t.is_contiguous() or (square and rounded):
            columns = () if t.dim() == 1 else (width if square else t.shape[1],)
            dtype = operand if square else torch.float32
            found[name] = t.new_empty((width, *columns), dtype=dtype)
    if found:
        # what is not packed is not told of: with or without it the same compiled kernel does
        read = Weights(*(t if n in found else None for n, t in given._asdict().items()))
        w_r, w_a = read.w_r, read.w_a
        r_stride = 0 if w_r is None else w_r.stride(0)
        a_stride, attrs = (0, 0) if w_a is None else (w_a.stride(0), w_a.shape[1])
        out = Weights(*map(found.get, Weights._fields))
        pack_weights[(-(-width // PACKED_ROWS),)](
            read._replace(w_r=None, w_a=None), w_r, r_stride, w_a, a_stride, out,
            channels, width, attrs, spec=spec.read_by("pack_weights"), ROWS=PACKED_ROWS,
        )  # fmt: skip
    return given._replace(**found)


def _readable(name: str, t: Tensor) -> Tensor:
    strided = name == "w_r" or (name == "w_a" and t.stride(1) == 1)
    return t if strided else t.contiguous()

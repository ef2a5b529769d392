"""The edge pass's weights as its kernels take them: dense, of whole tiles, rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast.backends.triton.products import operand_type
from egnn_fast.kernels.nodes import launch_pack_weights
from egnn_fast.kernels.records import Plan, Weights

_MATRICES = ("w2", "w3")


def packed(weights: Weights, plan: Plan) -> Weights:
    """Weights of any width, all in one launch if any of them changes.

    ``w_r`` and ``w_a`` may be columns of the first linear's weight: no copy is made of these first.
    """
    channels, width = weights.w2.shape[0], plan.spec.H.value
    operand = operand_type(plan.precision)
    source = Weights(*(t if t is None else _readable(n, t) for n, t in weights._asdict().items()))
    rounded = operand != torch.float32 or plan.spec.ROUND.value
    out: dict[str, Tensor] = {}
    for name, t in source._asdict().items():
        if t is None or name == "b_g":
            continue
        square = name in _MATRICES
        if width != channels or not t.is_contiguous() or (square and rounded):
            columns = () if t.dim() == 1 else (width if square else t.shape[1],)
            dtype = operand if square else torch.float32
            out[name] = t.new_empty((width, *columns), dtype=dtype)
    if out:
        launch_pack_weights(plan, source, Weights(*map(out.get, Weights._fields)))
    return source._replace(**out)


def _readable(name: str, t: Tensor) -> Tensor:
    strided = name == "w_r" or (name == "w_a" and t.stride(1) == 1)
    return t if strided else t.contiguous()

"""The precision of float32 matrix products that the user asked PyTorch for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from egnn_fast.kernels import APPROXIMATE
from egnn_fast.runtime.settings import Blocks

ENV_APPROXIMATE = "EGNN_FAST_APPROXIMATE"
_approximate_outside = os.environ.get(ENV_APPROXIMATE, "").lower() in ("1", "true", "on", "yes")
# what the open blocks set; a compiled region is guarded on it
_approximate = _approximate_outside

_setting = threading.RLock()
_FLOAT32 = ("high", "highest")
_AUTOCAST = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def matmul_precision(device: str) -> str:
    """Precision of matrix products on a device: autocast's, else that of float32 products.

    ``"bf16"`` or ``"fp16"`` under autocast; ``"highest"`` (float32) or ``"high"`` (tf32) otherwise;
    with a ``"~"`` at the end where :func:`approximate_activations` allowed them.
    """
    return _products(device) + (APPROXIMATE if _approximate else "")


@contextmanager
def approximate_activations(allowed: bool = True) -> Iterator[None]:
    """Let GPU kernels compute SiLU, inside the block, from a tanh of 11 bits.

    NVIDIA's special units have one (``tanh.approx``); it needs 3 instructions where SiLU takes 7.
    The error, some 5e-4 of an activation, is that of bf16 rounding: of use under autocast, where it
    is not the largest error. ``EGNN_FAST_APPROXIMATE=1`` allows it for the whole process. Other
    backends and activations take no notice.
    """
    block = _blocks.enter(allowed)
    try:
        yield
    finally:
        _blocks.leave(block)


def _publish(allowed: bool | None) -> None:
    global _approximate
    _approximate = _approximate_outside if allowed is None else allowed


_blocks: Blocks[bool] = Blocks(_publish)


def _products(device: str) -> str:
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype not in _AUTOCAST:
            raise TypeError(f"autocast: expected bfloat16 or float16, got {dtype}")
        return _AUTOCAST[dtype]
    return _float32_precision()


@torch.compiler.assume_constant_result  # a traced region is guarded by PyTorch on these settings
def _float32_precision() -> str:
    matmul = torch.backends.cuda.matmul
    try:
        return "high" if matmul.allow_tf32 else "highest"
    except RuntimeError:  # the newer setting was used, and the older one refuses to be read
        return "high" if matmul.fp32_precision == "tf32" else "highest"


def in_float32(precision: str) -> str:
    """The precision of float32 products in the second derivatives of a call."""
    return precision if precision.removesuffix(APPROXIMATE) in _FLOAT32 else "highest"


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Let PyTorch multiply float32 matrices on a GPU as ``precision`` says, inside the block.

    A pass backward may run under another setting than the one forward that it belongs to.
    """
    wanted = precision.removesuffix(APPROXIMATE)
    if wanted not in _FLOAT32:
        yield
        return
    with _setting:  # other threads' products wait: the setting is the whole process's
        restore = _set_float32_precision(wanted) if wanted != _float32_precision() else None
        try:
            yield
        finally:
            if restore is not None:
                restore()


def _set_float32_precision(precision: str) -> Callable[[], None]:
    """Set it; returns what brings the former setting back."""
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting was used; writing the older one would mix the two
        everywhere: Any = torch.backends
        value = matmul.fp32_precision
        # one that follows the general setting goes on doing so
        value = "none" if value == everywhere.fp32_precision else value
        matmul.fp32_precision = "tf32" if precision == "high" else "ieee"
        return lambda: setattr(matmul, "fp32_precision", value)
    general = getattr(matmul, "fp32_precision", None) == "none"
    torch.set_float32_matmul_precision(precision)

    def restore() -> None:
        torch.set_float32_matmul_precision(before)
        if general:  # it followed the general setting
            matmul.fp32_precision = "none"

    return restore

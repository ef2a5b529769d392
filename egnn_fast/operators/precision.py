"""The precision of matrix products that the user set in PyTorch, and approximate activations."""

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
_approximate_default = os.environ.get(ENV_APPROXIMATE, "").lower() in ("1", "true", "on", "yes")
# the value of the block entered last, or the default; torch.compile guards on this global
_approximate = _approximate_default

_setting_lock = threading.RLock()
_FLOAT32 = ("high", "highest")
_AUTOCAST = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def matmul_precision(device: str) -> str:
    """Precision of matrix products on a type of device, as the operators' scalar ``precision``.

    ``"bf16"`` or ``"fp16"`` under autocast, else ``"highest"`` (float32) or ``"high"`` (tf32). A
    ``"~"`` at the end says that :func:`approximate_activations` allows them.

    Raises
    ------
    TypeError
        Autocast uses another dtype than bfloat16 or float16.
    """
    return _product_precision(device) + (APPROXIMATE if _approximate else "")


@contextmanager
def approximate_activations(allowed: bool = True) -> Iterator[None]:
    """Let GPU kernels compute SiLU from an approximate tanh inside the block.

    NVIDIA's ``tanh.approx`` has 11 bits; SiLU then takes 3 instructions instead of 7. The error,
    about 5e-4 of an activation, is as large as that of rounding to bf16: use it under autocast,
    where it is not the largest error. ``EGNN_FAST_APPROXIMATE=1`` allows it for the whole process.
    It has no effect on other backends and activations.

    Parameters
    ----------
    allowed : bool
        False forbids it inside the block.
    """
    block = _blocks.enter(allowed)
    try:
        yield
    finally:
        _blocks.leave(block)


def _publish(allowed: bool | None) -> None:
    global _approximate
    _approximate = _approximate_default if allowed is None else allowed


_blocks: Blocks[bool] = Blocks(_publish)


def _product_precision(device: str) -> str:
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype not in _AUTOCAST:
            raise TypeError(f"autocast: expected bfloat16 or float16, got {dtype}")
        return _AUTOCAST[dtype]
    return _float32_precision()


@torch.compiler.assume_constant_result  # PyTorch itself guards compiled code on these settings
def _float32_precision() -> str:
    matmul = torch.backends.cuda.matmul
    try:
        return "high" if matmul.allow_tf32 else "highest"
    except RuntimeError:  # after the newer setting was used, PyTorch refuses to read the older one
        return "high" if matmul.fp32_precision == "tf32" else "highest"


def second_order_precision(precision: str) -> str:
    """Precision of products in the second derivatives of a call with this precision.

    These are computed in float32: in tf32 if the call was, else in full precision.
    """
    return precision if precision.removesuffix(APPROXIMATE) in _FLOAT32 else "highest"


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set the precision of PyTorch's float32 products on a GPU inside the block.

    A backward uses it to multiply with the precision of its forward, whatever is set by then.
    ``precision`` is that of the operators; ``"bf16"`` and ``"fp16"`` change nothing.
    """
    wanted = precision.removesuffix(APPROXIMATE)
    if wanted not in _FLOAT32:
        yield
        return
    # the setting belongs to the process, so one thread at a time
    with _setting_lock:
        restore = _set_float32_precision(wanted) if wanted != _float32_precision() else None
        try:
            yield
        finally:
            if restore is not None:
                restore()


def _set_float32_precision(precision: str) -> Callable[[], None]:
    """Set the precision of float32 products; returns a function that restores the old setting."""
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer setting was used; writing the older one would mix the two
        general: Any = torch.backends
        value = matmul.fp32_precision
        # if it equals the general setting, let it follow that again
        value = "none" if value == general.fp32_precision else value
        matmul.fp32_precision = "tf32" if precision == "high" else "ieee"
        return lambda: setattr(matmul, "fp32_precision", value)
    follows_general = getattr(matmul, "fp32_precision", None) == "none"
    torch.set_float32_matmul_precision(precision)

    def restore() -> None:
        torch.set_float32_matmul_precision(before)
        if follows_general:
            matmul.fp32_precision = "none"

    return restore

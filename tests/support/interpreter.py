"""Triton's interpreter with the arithmetic of a GPU: bfloat16, and sums of the matrix units.

Three things are wrong with the interpreter's bfloat16, which it holds as 16 bits of an integer:
float32 values are cut off, not rounded, and what is subnormal is lost; integers and bools are not
converted; products multiply the bits. :func:`bfloat16` puts that right, and lets the kernels sum
float32 values in parts of bfloat16, as on a GPU. :func:`truncation` lets products add as tensor
cores do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from egnn_fast.kernels import records

# The functions of the language that the interpreter replaces by its own, by the class or module
# they are in. Its own code looks through all members of each in every call of a device function,
# which takes half of its time.
_BUILTINS = {
    owner: [name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]
    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
}
# products that one matrix instruction adds to its sum at once
_SLICES = {16: 16, 32: 8}
_ARITHMETIC = ("binary_op", "ternary_op", "unary_op", "create_fma", "create_fabs")
_of_any = interpreter._convert_float


def _patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
    """As the interpreter's own, but looks at the members in ``_BUILTINS`` alone."""
    for name in _BUILTINS[owner]:
        member = getattr(owner, name)
        if tl.core.is_builtin(member):  # else it is replaced already
            interpreter._patch_attr(owner, name, member, builder, scope)


def know_builtins() -> None:
    """Tell the interpreter which functions it has to replace."""
    interpreter._patch_builtin = _patch_builtin


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _rounded(values: Any) -> Any:
    """Float32 values as the bits of the nearest bfloat16, ties to even."""
    values = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def _widened(bits: Any) -> Any:
    """The bits of bfloat16 values as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _values(handle: Any) -> Any:
    return _widened(handle.data) if _is_bfloat16(handle) else handle.data


def _convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        return _rounded(values.view(np.float32))
    if (source, target) == (tl.bfloat16, tl.float32):
        return _widened(values)
    return _of_any(values, source, target, mode)


def _from_integers(convert: Callable[..., Any]) -> Callable[..., Any]:
    def converted(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return convert(self, source, target)
        return TensorHandle(_rounded(source.data.astype(np.float32)), tl.bfloat16)

    return converted


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    def refused(self: Any, *args: Any) -> Any:
        handles = [arg for arg in args if isinstance(arg, TensorHandle)]
        moves = args[-1] is np.where  # a choice is no arithmetic
        if not moves and any(_is_bfloat16(handle) for handle in handles):
            raise NotImplementedError("bfloat16: the interpreter would add up its bits")
        return operation(self, *args)

    return refused


def _multiply(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
    """``total + a @ b``, rounded to nearest."""
    product = np.matmul(_values(a), _values(b), dtype=total.data.dtype)
    return TensorHandle(product + total.data, total.dtype.scalar)


def towards_zero(values: Any) -> Any:
    """Float64 values as the nearest float32 that is no larger in magnitude."""
    nearest = values.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def add_product(total: Any, a: Any, b: Any, at_once: int) -> Any:
    """``total + a @ b``, a slice of ``at_once`` products after the other, as tensor cores add.

    Products are exact; each sum of a slice and the total so far is cut off to a float32. Measured
    so by Fasi, Higham, Mikaitis & Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ
    Computer Science 7:e330, 2021), for Volta, Turing and Ampere. Left out is what they found
    beside it: summands lose digits as they are aligned with the largest, and Ampere takes half as
    many products at once. Both make the bias larger, not smaller.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[1], at_once):
        total = towards_zero(total + a[:, k : k + at_once] @ b[k : k + at_once])
    return total


def _multiply_truncating(self: Any, a: Any, b: Any, total: Any, precision: Any, _: Any) -> Any:
    at_once = _SLICES[a.dtype.primitive_bitwidth]
    split = precision != interpreter._ir.INPUT_PRECISION.TF32 and at_once == 8
    # products in parts begin at 0, and are added to the total by the vector units (Triton's ttgir)
    begin = np.zeros_like(total.data) if split else total.data
    found = add_product(begin, _values(a), _values(b), at_once)
    return TensorHandle(found + total.data if split else found, total.dtype.scalar)


@contextmanager
def bfloat16() -> Iterator[None]:
    """Compute bfloat16 rightly inside the block, and sum in parts of it."""
    builder: Any = InterpreterBuilder
    changes: dict[str, Any] = {name: _refusing(getattr(builder, name)) for name in _ARITHMETIC}
    changes |= {
        name: _from_integers(getattr(builder, name))
        for name in ("create_si_to_fp", "create_ui_to_fp")
    }
    with (
        mock.patch.object(interpreter, "_convert_float", _convert),
        mock.patch.multiple(builder, **changes, create_dot=_multiply),
        mock.patch.object(records, "PART", tl.bfloat16),
    ):
        yield


@contextmanager
def truncation() -> Iterator[None]:
    """The same, and let products add as tensor cores do: see :func:`add_product`."""
    builder: Any = InterpreterBuilder
    with bfloat16(), mock.patch.object(builder, "create_dot", _multiply_truncating):
        yield

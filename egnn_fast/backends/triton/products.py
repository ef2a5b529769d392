"""Products of matrices at the nodes, and of chunks of edges, by the BLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from egnn_fast.kernels import APPROXIMATE
from egnn_fast.operators.precision import float32_products

OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def operand_type(precision: str) -> torch.dtype:
    """The type of the products' operands."""
    return OPERANDS.get(precision.removesuffix(APPROXIMATE), torch.float32)


def multiply(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """``left @ right`` of operands rounded to the precision, summed and returned in float32.

    Two matrices, or two batches of them.
    """
    operand = operand_type(precision)
    left, right = left.to(operand), right.to(operand)
    if operand == torch.float32:
        with float32_products(precision):
            return left @ right
    if left.is_cuda and torch.version.hip is None:
        product = torch.mm if left.dim() == 2 else torch.bmm
        result: Tensor = product(left, right, out_dtype=torch.float32)
        return result
    return left.float() @ right.float()

"""The precision of float32 matrix products that the user asked PyTorch for."""

from __future__ import annotations

import torch

_AUTOCAST = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def matmul_precision(device: str) -> str:
    """Precision of matrix products on a device: autocast's, else that of float32 products.

    ``"bf16"`` or ``"fp16"`` under autocast; ``"highest"`` (float32) or ``"high"`` (tf32) otherwise.
    """
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

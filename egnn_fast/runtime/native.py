"""Loads the C++ extension once, or stores why it cannot be used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

# the type of the extension's module, whose interface is in csrc/bindings.cpp
Core = Any

core: Core | None = None
load_error: str | None = None  # not None if core is None


def reject(reason: str) -> None:
    """Count the extension as unusable from now on."""
    global core, load_error
    core, load_error = None, reason


try:
    core = import_module("egnn_fast._core")
    core.set_tensor_classes(torch.Tensor, torch.nn.Parameter)
except ImportError as error:
    reject(
        f"the C++ extension egnn_fast._core could not be imported ({error}); "
        "build it with `pip install .` from a checkout (needs a C++17 compiler)"
    )
except RuntimeError as error:
    reject(f"the C++ extension cannot read the tensors of PyTorch {torch.__version__}: {error}")

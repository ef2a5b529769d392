"""Faults planted on purpose, to see what the suite makes of them: ``--plant KIND=PATTERN``."""

from __future__ import annotations

import fnmatch
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu.setting import Setting

KINDS = ("wrong", "memory", "crash", "hang")
_HANG_SECONDS = 1e6
_EVERY, _FACTOR = 16, 1.5  # which rows of M are wrong, and by how much


def wrong_use(planted: str) -> str | None:
    """What is wrong with a value of the option; None if nothing is."""
    kind, sign, pattern = planted.partition("=")
    if kind in KINDS and sign and pattern:
        return None
    return f"--plant: expected KIND=PATTERN, KIND one of {', '.join(KINDS)}, got {planted!r}"


@contextmanager
def planted(name: str, setting: Setting) -> Iterator[None]:
    """Run an item with the faults that were planted for it."""
    kinds = {
        kind
        for kind, _, pattern in (each.partition("=") for each in setting.planted)
        if fnmatch.fnmatchcase(name, pattern)
    }
    if "crash" in kinds:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in kinds:
        time.sleep(_HANG_SECONDS)
    if "memory" in kinds:
        raise torch.OutOfMemoryError("planted: out of memory")
    if "wrong" not in kinds:
        yield
        return
    from egnn_fast.backends import triton as triton_backend
    from egnn_fast.backends.triton import layers

    modules: tuple[Any, ...] = (triton_backend, layers)
    before = modules[0].run_forward

    def wrong(call: Any, m: Tensor, shift: Tensor | None) -> None:
        before(call, m, shift)
        m[::_EVERY, : m.shape[1] // 2] *= _FACTOR

    for module in modules:
        module.run_forward = wrong
    try:
        yield
    finally:
        for module in modules:
            module.run_forward = before

"""Where items run, and what they hand back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PASS, FAIL, LEFT_OUT = "pass", "fail", "left out"
PRECISIONS = ("highest", "high", "bf16", "fp16")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# half a unit in the last place of what products take: tf32 has ten bits behind the point
_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly.

    Attributes
    ----------
    device : {"cuda", "cpu"}
        On the CPU Triton interprets the kernels, times are wall clock, sizes are tiny.
    quick : bool
        A subset of the items.
    planted : tuple of str
        Faults to plant on purpose: see :mod:`bench.gpu.plant`.
    """

    device: str = "cuda"
    quick: bool = False
    planted: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether sizes and times mean something."""
        return self.device == "cuda"


@dataclass
class Outcome:
    """What an item found.

    Attributes
    ----------
    status : {"pass", "fail", "left out"}
    reason : str
        Why it is not "pass".
    rows : dict
        Rows for the results, by section.
    code : dict
        Machine code of kernels that were wrong, by its hash: see :mod:`bench.gpu.triage`.
    out_of_memory : bool
        Whether it ran out of GPU memory, beside other items maybe.
    hung : bool
        Whether it failed by taking too long: that says nothing of values.
    """

    status: str = PASS
    reason: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    out_of_memory: bool = False
    hung: bool = False

    def add(self, section: str, **row: Any) -> None:
        """One more row."""
        self.rows.setdefault(section, []).append(row)

    def fail(self, reason: str) -> None:
        """It failed; the first reason is kept."""
        if self.status != FAIL:
            self.status, self.reason = FAIL, reason

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Item:
    """A named thing to run.

    Attributes
    ----------
    name : str
        Unique.
    section : {"smoke", "checks", "times", "tune"}
        What ``--only`` chooses by.
    run : callable
        Gives the outcome; an exception is a failure.
    seconds : float
        Estimated for an H200: it is not begun with less time left.
    limit : float
        Seconds after which it is ended as hanging.
    alone : bool
        Whether nothing may run beside it.
    gigabytes : float
        GPU memory that it takes at most, about: what runs side by side must fit together.
    variant : str
        The variant of the compiler that it runs with; empty: the one that was chosen. See
        :mod:`bench.gpu.variants`.
    """

    name: str
    section: str
    run: Callable[[Setting], Outcome]
    seconds: float = 5.0
    limit: float = 150.0
    alone: bool = False
    gigabytes: float = 3.0
    variant: str = ""


def tf32(t: Any) -> Any:
    """Float32 tensors rounded to tf32; anything else as it is."""
    if not isinstance(t, Tensor) or t.dtype != torch.float32:
        return t
    bits = t.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32)


class Tf32Products(TorchDispatchMode):
    """PyTorch's products of float32 take operands rounded to tf32, on the CPU as on a GPU."""

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.products:
            self.seen += 1
            args = (*args[:-2], *map(tf32, args[-2:]))
        return func(*args, **(kwargs or {}))


def rounded_products(precision: str) -> Any:
    """The context in which PyTorch rounds as the kernels do, and so tells what error that makes.

    On the CPU it has no tf32, and on a GPU cuBLAS need not take it for every shape.
    """
    return Tf32Products() if precision == "high" else nullcontext()


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """Run float32 products at a precision; autocast's ones leave them at ``"highest"``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: str, device: str) -> Any:
    """The context of a forward: autocast where the precision is one of its types."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device, dtype=_AUTOCAST[precision])


def low_type(precision: str) -> torch.dtype | None:
    """What autocast's linears leave in a precision; None where it is float32."""
    return _AUTOCAST.get(precision)


def rounding(precision: str) -> float:
    """Of one operand of a product; see :func:`egnn_fast.checks.bound`."""
    return _ROUNDING[precision]


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def synchronize(setting: Setting) -> None:
    """Wait for the GPU: an error of a kernel shows here."""
    if setting.on_gpu:
        torch.cuda.synchronize()

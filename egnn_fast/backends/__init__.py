"""Which kernel runs for a call, and why another one does not."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

import torch

from egnn_fast.kernels import MAX_DIM, MAX_HIDDEN, PROVEN, assembler, interpreting
from egnn_fast.runtime import native
from egnn_fast.runtime.settings import Blocks, Entry

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENV_BACKEND = "EGNN_FAST_BACKEND"

# the blocks that are open in this thread or task
_override: ContextVar[tuple[Entry[str], ...]] = ContextVar("egnn_fast_backend", default=())
# the same for a traced region: Dynamo cannot read a ContextVar, but guards on a global
_traced_override: str | None = None
_warned: set[str] = set()
_INSIDE = ("egnn_fast.", "torch.")


class Call(NamedTuple):
    """What a backend needs to know of a call to say whether it can run it."""

    device: str
    dtype: torch.dtype
    hidden: int
    coord_dim: int
    activation: str | None  # None: a module that no kernel knows
    changed: str | None = None  # which submodule is not as it was built, and how

    def unknown_to_kernels(self) -> str | None:
        """Why plain PyTorch runs the layer on every backend; None if kernels know it."""
        if self.changed is not None:
            return (
                f"{self.changed}; the layer runs through its modules in plain PyTorch, without "
                "the fused kernels: slower, and with memory of size edges x hidden"
            )
        if self.activation is None:
            return "activation: only SiLU, ReLU and LeakyReLU run fused; using the reference"
        return None


class BackendInfo(NamedTuple):
    """A line of :func:`info`."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What would run a call: see :func:`explain_call`."""

    backend: str
    instruction_set: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)


class BackendError(RuntimeError):
    """A backend was named that cannot run the call."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every layer inside the block on the named backend.

    It goes before ``EGNN_FAST_BACKEND``; a ``backend=`` argument other than None goes before it.
    A block holds in its own thread or task. Compiled code takes the block that was entered last in
    any thread. A checkpoint that is recomputed after the block takes the backend that is set then,
    and PyTorch may raise: give ``backend=`` to the layer instead.
    """
    block = _blocks.enter(check_name(name, "name"))
    _override.set((*_override.get(), block))
    try:
        yield
    finally:
        _blocks.leave(block)
        # blocks of generators may end in any order, and in another context than they began in
        _override.set(tuple(other for other in _override.get() if other is not block))


def _publish(name: str | None) -> None:
    global _traced_override
    _traced_override = name


_blocks: Blocks[str] = Blocks(_publish)


def check_name(name: str, argument: str) -> str:
    """The name itself if it names a backend or is "auto"; ValueError otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected 'auto' or one of {BACKENDS}, got {name!r}")
    return name


def requested(argument: str | None) -> str:
    """What the user asked for: the argument, the context, the environment, else "auto"."""
    if argument is not None:
        return check_name(argument, "backend")
    if torch.compiler.is_compiling():
        if _traced_override is not None:
            return _traced_override
    elif override := _override.get():
        return override[-1].value
    return check_name(os.environ.get(ENV_BACKEND, "auto"), ENV_BACKEND)


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run anything here; None if it can."""
    if backend == "cpu":
        return native.load_error
    if backend == "triton":
        return _no_triton()
    if backend == "cuda":
        return "this version of egnn_fast has no CUDA kernels"
    return None


@torch.compiler.assume_constant_result
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'egnn-fast[triton]'"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, to check them"
    found = _doubt()
    return found.reason if found is not None and found.level == "refuse" else None


def _doubt() -> assembler.Doubt | None:
    """What speaks against the assembler of Triton's kernels on this GPU."""
    if interpreting() or not _on_nvidia():
        return None
    try:
        return assembler.doubt_here(_arch())
    except RuntimeError as error:  # there is none
        return assembler.Doubt("refuse", f"Triton has no assembler: {error}")


@torch.compiler.assume_constant_result
def _warning() -> str | None:
    """What to warn of before Triton's kernels run."""
    found = _doubt()
    return None if found is None else found.reason


def unproven(backend: str) -> str | None:
    """Why "auto" leaves a backend that could run a call alone; None if it does not."""
    if backend != "triton" or (_on_nvidia() and _architecture() in PROVEN):
        return None
    return (
        "it was compiled and interpreted, not yet run on such a GPU; backend='triton' or "
        f"{ENV_BACKEND}=triton names it"
    )


def _on_nvidia() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None


@torch.compiler.assume_constant_result
def _architecture() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _arch() -> int:
    major, minor = _architecture()
    return 10 * major + minor


def refusal(backend: str, call: Call) -> str | None:
    """Why a backend cannot run this call; None if it can."""
    if backend == "reference":
        return None
    missing = unavailable(backend)
    if missing is not None:
        return missing
    if call.changed is not None:
        return call.changed
    if call.activation is None:
        return "only SiLU, ReLU and LeakyReLU run fused"
    if backend == "cpu":
        if call.device != "cpu":
            return f"the tensors lie on {call.device}, not on the CPU"
        if call.dtype not in (torch.float32, torch.float64):
            return f"the CPU kernel takes float32 and float64, not {call.dtype}"
    if backend == "triton":
        return _triton_refusal(call)
    return None


def _triton_refusal(call: Call) -> str | None:
    device = "cpu" if interpreting() else "cuda"
    if call.device != device:
        return f"the tensors lie on {call.device}, not on {device}"
    if device == "cuda" and _on_nvidia() and _architecture() < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or later"
    if call.dtype != torch.float32:
        return f"the Triton kernels take float32 (bf16 and fp16 by autocast), not {call.dtype}"
    if call.hidden > MAX_HIDDEN:
        return f"the Triton kernels take at most {MAX_HIDDEN} hidden features"
    if call.coord_dim > MAX_DIM:
        return f"the Triton kernels take at most {MAX_DIM} coordinates"
    return None


def select(argument: str | None, call: Call) -> str:
    """The backend that runs a call.

    Raises
    ------
    BackendError
        A backend was named, by argument, context or environment, that cannot run the call.
    """
    chosen = _select(argument, call)
    if chosen == "triton" and (warning := _warning()) is not None:
        warn_once(warning)
    return chosen


def _select(argument: str | None, call: Call) -> str:
    name = requested(argument)
    # in every layer of every step: the usual case must be quick
    if name == "auto" and call.device == "cpu" and refusal("cpu", call) is None:
        return "cpu"
    unknown = call.unknown_to_kernels()
    if unknown is not None:
        # whatever backend is named; no warning if it is the reference, which runs
        if name != "reference":
            warn_once(unknown)
        return "reference"
    if name != "auto":
        reason = refusal(name, call)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run this call: {reason}")
        return name
    fused = _candidates(call.device)
    for candidate in fused:
        if refusal(candidate, call) is None and unproven(candidate) is None:
            return candidate
    if call.device == "meta":  # shapes alone: no need to warn
        return "reference"
    reason = refusal(fused[-1], call) or unproven(fused[-1])
    warn_once(f"no fused kernel for this call, using the reference: {reason}")
    return "reference"


def explain_call(argument: str | None, call: Call) -> Explanation:
    """What :func:`select` would choose, and why not the others."""
    refused = {}
    for backend in BACKENDS:
        reason = refusal(backend, call)
        if reason is not None:
            refused[backend] = reason
    name = requested(argument)
    if name == "auto":
        left_alone = {b: unproven(b) for b in _candidates(call.device) if b not in refused}
        refused |= {b: why for b, why in left_alone.items() if why is not None}
    unknown = call.unknown_to_kernels()
    if name != "auto" and name in refused and unknown is None:
        raise BackendError(f"backend {name!r} cannot run this call: {refused[name]}")
    if call.changed is not None:
        chosen, reason = "reference", str(unknown)
    elif name != "auto" and name not in refused:
        chosen, reason = name, "named by the caller"
    else:
        usable = [b for b in _candidates(call.device) if b not in refused]
        chosen = usable[0] if usable else "reference"
        reason = "the fastest that supports the call" if usable else "no fused kernel supports it"
    return Explanation(chosen, instruction_set(chosen), reason, refused)


def instruction_set(backend: str) -> str:
    """The instruction set that a backend's kernel runs with here."""
    if backend == "cpu" and native.core is not None:
        return str(native.core.instruction_set())
    if backend == "triton" and unavailable(backend) is None:
        if interpreting():
            return "interpreted on the CPU"
        found = assembler.in_use(_arch())
        return f"sm_{_arch()}" + (f", {found.label}" if found is not None else "")
    return "PyTorch's own"


def info() -> list[BackendInfo]:
    """Each backend with its state and the reason for it."""
    lines = []
    for backend in BACKENDS:
        reason = unavailable(backend)
        state = f"ready ({instruction_set(backend)})" if reason is None else reason
        lines.append(BackendInfo(backend, reason is None, state))
    return lines


def _candidates(device: str) -> tuple[str, ...]:
    return ("cpu",) if device == "cpu" else ("cuda", "triton")


@torch.compiler.assume_constant_result  # a traced call warns while it is traced
def warn_once(message: str) -> None:
    """Warn once with each message, at the caller's line outside this package and PyTorch."""
    if message in _warned:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "torch.").startswith(
        _INSIDE
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
    _warned.add(message)  # not if the warning is raised as an error

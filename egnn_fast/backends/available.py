"""What each backend can run here, and why it cannot run the rest."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from egnn_fast.backends.user_choice import ENV_BACKEND
from egnn_fast.kernels import MAX_DIM, MAX_HIDDEN, PROVEN, assembler, interpreting
from egnn_fast.runtime import native
from egnn_fast.runtime.backend_names import BACKENDS


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


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run anything here; None if it can."""
    if backend == "cpu":
        return native.load_error
    if backend == "triton":
        return _no_triton()
    return None


@torch.compiler.assume_constant_result
def _no_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
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
def warning() -> str | None:
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

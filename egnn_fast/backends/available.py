"""What each backend can run on this machine, and why it cannot run the rest."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch

from egnn_fast.backends.user_choice import ENV_BACKEND
from egnn_fast.kernels import MAX_DIM, MAX_HIDDEN, PROVEN, TRIED, assembler, interpreting
from egnn_fast.runtime import native
from egnn_fast.runtime.backend_names import BACKENDS


class Call(NamedTuple):
    """The properties of a call that decide which backends can run it.

    Attributes
    ----------
    device : str
        Type of the tensors' device, such as ``"cpu"``.
    dtype : torch.dtype
        That of the coordinates.
    hidden, coord_dim : int
        H and D.
    activation : str or None
        Its name; None for a module that no kernel implements.
    changed : str or None
        Which submodule of the layer is not as it was built, and how; None if all are.
    """

    device: str
    dtype: torch.dtype
    hidden: int
    coord_dim: int
    activation: str | None
    changed: str | None = None

    def unknown_to_kernels(self) -> str | None:
        """Why the reference runs the layer whatever backend is named; None if kernels can."""
        if self.changed is not None:
            return (
                f"{self.changed}; the layer runs through its modules in plain PyTorch, without "
                "the fused kernels: slower, and with memory of size edges x hidden"
            )
        if self.activation is None:
            return "activation: only SiLU, ReLU and LeakyReLU run fused; using the reference"
        return None


class BackendInfo(NamedTuple):
    """The state of one backend on this machine; ``reason`` explains it."""

    name: str
    available: bool
    reason: str


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run anything here; None if it can."""
    if backend == "cpu":
        return native.load_error
    if backend == "triton":
        return _triton_unavailable()
    return None


@torch.compiler.assume_constant_result
def _triton_unavailable() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, to check them"
    doubt = _assembler_doubt()
    return doubt.reason if doubt is not None and doubt.level == "refuse" else None


def _assembler_doubt() -> assembler.Doubt | None:
    """The reason to doubt the assembler that Triton uses for this GPU; None if there is none."""
    if interpreting() or not _on_nvidia():
        return None
    try:
        return assembler.doubt_here(_sm_number())
    except RuntimeError as error:
        return assembler.Doubt("refuse", f"Triton has no assembler: {error}")


@torch.compiler.assume_constant_result
def warning() -> str | None:
    """The warning to give before Triton's kernels run; None if there is none."""
    doubt = _assembler_doubt()
    return None if doubt is None else doubt.reason


def unproven(backend: str) -> str | None:
    """Why "auto" does not choose a backend that could run the call; None if it may."""
    if backend != "triton" or (_on_nvidia() and _architecture() in PROVEN):
        return None
    tried = _on_nvidia() and _architecture() in TRIED
    reason = (
        "not every check of its kernels has passed on such a GPU yet" if tried
        else "its kernels were compiled and interpreted, but not yet run on such a GPU"
    )  # fmt: skip
    return f"{reason}; backend='triton' or {ENV_BACKEND}=triton chooses it"


def _on_nvidia() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None


@torch.compiler.assume_constant_result
def _architecture() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _sm_number() -> int:
    """90 for sm_90."""
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
    """The instruction set of a backend's kernels on this machine, for users to read."""
    if backend == "cpu" and native.core is not None:
        return str(native.core.instruction_set())
    if backend == "triton" and unavailable(backend) is None:
        if interpreting():
            return "interpreted on the CPU"
        ptxas = assembler.in_use(_sm_number())
        return f"sm_{_sm_number()}" + (f", {ptxas.label}" if ptxas is not None else "")
    return "PyTorch's own"


def info() -> list[BackendInfo]:
    """The state of every backend on this machine, with the reason for it."""
    lines = []
    for backend in BACKENDS:
        reason = unavailable(backend)
        state = f"ready ({instruction_set(backend)})" if reason is None else reason
        lines.append(BackendInfo(backend, reason is None, state))
    return lines

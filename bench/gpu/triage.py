"""What is written down of a wrong result, so that its cause can be found without the GPU.

A layout's mistake hits the same rows and columns each time and with every assembler; a race differs
from run to run; an assembler's mistake is there with one assembler and not with another, from what
Triton made alike for both (the hash of its TTGIR), and can be read in the machine code, which is
kept.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu.setting import Outcome
from bench.offline.disassembly import code_hash
from egnn_fast import checks
from egnn_fast.checks.cases import Problem
from egnn_fast.kernels.assembler import in_use

PLACES = 8  # of wrong numbers, rows and columns that are named
# a warpgroup's tile has 64 rows, so a wrong layout repeats: places are counted modulo this
PERIOD = 64
KEPT_BYTES = 1 << 20  # of the compressed machine code of one item
Tensors = dict[str, Tensor]


def first_order(problem: Problem, backend: str, order: int = 0) -> Tensors:
    """Outputs of a problem and the gradients of everything, under one name each."""
    draw = torch.Generator().manual_seed(3)
    leaves = {k: t.detach().clone().requires_grad_() for k, t in problem.leaves.items()}
    outputs = problem.run(leaves, backend, order)
    # drawn on the CPU, the same for every device; positive: where sums cancel an error says little
    towards = [
        (torch.rand(t.shape, generator=draw, dtype=torch.float64) + 0.5).to(t.device, t.dtype)
        for t in outputs.values()
    ]
    grads = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), towards, allow_unused=True
    )
    found = {k: t.detach() for k, t in outputs.items()}
    for name, grad in zip(leaves, grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return found


@contextmanager
def kept(outcome: Outcome, case: str, precision: str) -> Iterator[None]:
    """Inside the block an exception, out of memory for instance, does not lose the outcome."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcome.add("triage", case=case, precision=precision, tensor="", wrong=0, stopped=reason)


def examine(
    outcome: Outcome,
    case: str,
    precision: str,
    found: Tensors,
    truth: Tensors,
    bounds: Mapping[str, float],
    again: Callable[[], Tensors],
) -> None:
    """Add rows about every tensor and every kernel of a wrong result.

    Parameters
    ----------
    found, truth : dict of Tensor
        What came out, and what is right, in float64.
    bounds : mapping
        The largest relative error of each tensor that passes.
    again : callable
        Computes what was found once more; the kernels that run are those written down.
    """
    forget_kernels()
    second: Tensors | None = None
    failure = ""
    try:
        second = again()
    except Exception as error:  # the first result is worth its rows anyway
        failure = f"{type(error).__name__}: {error}"[:300]
    for name, right in truth.items():
        row = judged(found[name], right, bounds[name])
        row["again"] = None if second is None else _difference(found[name], second[name], right)
        row["again_failed"] = failure
        outcome.add("triage", case=case, precision=precision, tensor=name, **row)
    for kernel in compiled_kernels():
        code = kernel.pop("code")
        outcome.add("triage_kernels", case=case, precision=precision, **kernel)
        if sum(map(len, outcome.code.values())) + len(code) <= KEPT_BYTES:
            outcome.code[kernel["hash"]] = code


def judged(found: Tensor, right: Tensor, bound: float) -> dict[str, Any]:
    """Where a tensor is wrong: how many numbers, the first of them, their rows and columns.

    ``by_row`` and ``by_column`` count wrong numbers by the row's and column's place modulo
    :data:`PERIOD`.
    """
    found, right = (t.detach().double().reshape(t.shape[0], -1) if t.dim() > 1 else
                    t.detach().double().reshape(-1, 1) for t in (found, right))  # fmt: skip
    scale = float(right.abs().max()) if right.numel() else 0.0
    difference = (found - right).abs()
    wrong = ~(difference <= bound * (scale if scale > 0 else 1.0))  # NaN is wrong
    places = wrong.nonzero()
    rows, columns = places[:, 0], places[:, 1]
    first = [
        {"row": i, "column": j, "found": float(found[i, j]), "right": float(right[i, j])}
        for i, j in places[:PLACES].tolist()
    ]
    return {
        "shape": list(found.shape), "error": _finite(checks.relative_error(found, right)),
        "bound": bound, "wrong": int(wrong.sum()), "numbers": found.numel(),
        "not_finite": int((~found.isfinite()).sum()),
        "wrong_rows": int(rows.unique().numel()), "wrong_columns": int(columns.unique().numel()),
        "first": first, "rows": rows.unique()[:PLACES].tolist(),
        "columns": columns.unique()[:PLACES].tolist(),
        "by_row": _histogram(rows), "by_column": _histogram(columns),
    }  # fmt: skip


def _histogram(places: Tensor) -> list[int]:
    return torch.bincount(places % PERIOD, minlength=PERIOD).tolist() if len(places) else []


def _difference(a: Tensor, b: Tensor, right: Tensor) -> float | None:
    """How far two runs differ, relative to max|right|; None if one is not finite."""
    scale = float(right.abs().max()) if right.numel() else 0.0
    error = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return _finite(error / scale if scale > 0 else error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _jit_functions() -> list[Any]:
    from bench.offline import configurations

    kernels = configurations.kernel_functions().values()
    # interpreted ones have no caches
    return [kernel for kernel in kernels if hasattr(kernel, "device_caches")]


def forget_kernels() -> None:
    """Let this process load each kernel anew when it is launched next."""
    for kernel in _jit_functions():
        kernel.device_caches.clear()


def compiled_kernels() -> list[dict[str, Any]]:
    """The kernels that ran in this process since :func:`forget_kernels`; none interpreted."""
    found = []
    for kernel in _jit_functions():
        for cache in kernel.device_caches.values():
            found += [_about(kernel.__name__, made) for made in cache[0].values()]
    return found


def _about(name: str, made: Any) -> dict[str, Any]:
    """A compiled kernel: what was compiled, by which assembler, into what."""
    code = made.asm.get("cubin", b"")
    assembly = made.asm.get("ptx", "").encode()
    metadata = made.metadata
    return {
        "kernel": name, "hash": code_hash(code) if code else digest(assembly),
        "ttgir_hash": digest(_without_places(made)),
        "ptxas": _assembler(), "triton_hash": made.hash,
        "registers": getattr(made, "n_regs", None), "spills": getattr(made, "n_spills", None),
        "shared": getattr(metadata, "shared", None), "warps": getattr(metadata, "num_warps", None),
        "wgmma": assembly.count(b"wgmma.mma_async"),
        "code": base64.b64encode(gzip.compress(code + b"\0PTX\0" + assembly)).decode(),
    }  # fmt: skip


def _without_places(made: Any) -> bytes:
    """Triton's code with its layouts (TTGIR), without the source lines that it names."""
    text = str(made.asm.get("ttgir", ""))
    lines = (line for line in text.splitlines() if not line.startswith("#loc"))
    return "\n".join(re.sub(r" loc\(#loc\d*\)", "", line) for line in lines).encode()


def digest(code: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(code).hexdigest()[:16]


def _assembler() -> str:
    """Version and path of the one that Triton calls for this GPU, or for Hopper without one."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    try:
        found = in_use(10 * major + minor)
    except RuntimeError as error:
        return str(error)
    return "none" if found is None else f"{found.version}: {found.path}"


def lines(rows: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """The worst tensors for people, a line each."""
    wrong = [row for row in rows if row.get("wrong")]
    wrong.sort(key=lambda row: -(row["error"] if row["error"] is not None else math.inf))
    found = []
    for row in wrong[:most]:
        error = "not finite" if row["error"] is None else f"{row['error']:.2e}"
        again = row["again"]
        same = (
            "a second run is not finite"
            if again is None
            else f"a second run differs by {again:.1e}"
        )
        if row["again_failed"]:
            same = f"a second run failed: {row['again_failed']}"
        found.append(
            f"{row['case']}, {row['precision']}: {row['tensor']} {row['shape']}: {error} (allowed "
            f"{row['bound']:.1e}), {row['wrong']} of {row['numbers']} numbers in "
            f"{row['wrong_rows']} rows {row['rows']} and {row['wrong_columns']} columns "
            f"{row['columns']}; {same}"
        )
    return found

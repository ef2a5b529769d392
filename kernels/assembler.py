"""The assembler that Triton calls, and which releases of it generate wrong code.

Triton leaves the last step of compilation to NVIDIA's ptxas: its own, or one that the environment
names. Some releases generated wrong Hopper code for kernels that use wgmma with its left operand in
registers, as these do. Triton is not imported before it is needed.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from typing import NamedTuple

ENV_ANY = "EGNN_FAST_ANY_ASSEMBLER"
# read once, at import, as TRITON_INTERPRET is
_ANY = os.environ.get(ENV_ANY, "").lower() in ("1", "true", "on", "yes")
_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "DISABLE_MMA_V3")
_SAFE = "13.3"  # the first release without a fault that is known


class Assembler(NamedTuple):
    """An assembler, and how Triton calls it.

    Attributes
    ----------
    path : the file
    version : in full, like "12.8.93"
    origin : who chose it: "Triton 3.7.0", or the environment variable
    variable : the environment variable that would choose another one
    wgmma : whether Triton emits Hopper's asynchronous matrix instructions
    """

    path: str
    version: str
    origin: str
    variable: str
    wgmma: bool

    @property
    def label(self) -> str:
        """For people: "ptxas 12.8.93 of Triton 3.7.0"."""
        return f"ptxas {self.version} of {self.origin}" + ("" if self.wgmma else ", without wgmma")


class Doubt(NamedTuple):
    """Why an assembler may generate wrong code; level is "refuse" (it was observed) or "warn"."""

    level: str
    reason: str


class Report(NamedTuple):
    """What was reported of the releases from ``since`` on and before ``before``.

    All reports are about sm_90 and wgmma with its left operand in registers. ``evidence`` names
    issues of Triton and of flash-linear-attention (fla), ``date`` the day of their last comment.
    """

    since: tuple[int, int]
    before: tuple[int, int]
    level: str
    what: str
    evidence: str
    date: str


REPORTS = (
    # on an H20, from the same PTX: one kernel had wrong sums, another wrote to wrong addresses; on
    # an H200 nine of nine smoke cases of these kernels, which 13.5 has right (bench/results/h200)
    Report((12, 8), (12, 9), "refuse", "made wrong sums, and writes outside of shared memory",
           "fla#1262, fla#984, triton#11366", "2026-09-20"),
    # on an H100, from the same PTX: a sum of 64 ones was 61
    Report((12, 9), (13, 0), "refuse", "overwrote registers that a product still read",
           "triton#11781, triton#11156", "2026-09-14"),
    # its sums were right where 12.8's were wrong
    Report((13, 0), (13, 1), "refuse", "made writes outside of shared memory",
           "fla#1262", "2026-09-20"),
    # right in fla#1262; but the order of the registers' writes is right from 13.3 on, not before
    Report((13, 1), (13, 3), "warn", "may overwrite registers that a product still reads",
           "triton#9433", "2026-05-28"),
    Report((0, 0), (12, 8), "warn", "may overwrite registers that a product still reads",
           "triton#9433", "2026-05-28"),
)  # fmt: skip


def in_use(arch: int) -> Assembler | None:
    """The assembler that Triton would call now for an architecture like 90; None on AMD.

    It reads the environment at each call, as Triton does when it compiles.

    Raises
    ------
    RuntimeError
        There is none, neither in Triton's package nor where the environment points.
    """
    import torch

    if torch.version.hip is not None:
        return None
    import triton
    from triton import knobs
    from triton._C.libtriton import getenv_bool
    from triton.backends.nvidia import compiler

    tool = compiler.get_ptxas(arch)
    special = tool == knobs.nvidia.ptxas_blackwell and tool != knobs.nvidia.ptxas
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if special else "TRITON_PTXAS_PATH"
    asked, origin = os.environ.get(variable), variable
    if asked != tool.path:
        origin = f"Triton {triton.__version__}"
        if asked:  # Triton takes its own without a word
            origin += f", as {variable} names no ptxas that runs: {asked}"
    version = version_of(tool.path) or tool.version
    return Assembler(tool.path, version, origin, variable, not getenv_bool("DISABLE_MMA_V3", False))


def version_of(path: str) -> str | None:
    """The version of a ptxas in full, like "12.8.93"; None if the file prints none.

    Triton itself knows the first two numbers only.
    """
    try:
        return _version(path, os.stat(path).st_mtime_ns)
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _version(path: str, changed: int) -> str | None:
    ran = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    return _full_version(ran.stdout)


def doubt(arch: int, assembler: Assembler) -> Doubt | None:
    """The reason to doubt an assembler on an architecture; None if nothing was reported."""
    if arch // 10 != 9 or not assembler.wgmma:
        return None
    major, minor, *_ = (int(number) for number in assembler.version.split("."))
    for report in REPORTS:
        if report.since <= (major, minor) < report.before:
            return Doubt(
                report.level,
                f"{assembler.label}: on sm_{arch} that release {report.what} ({report.evidence}); "
                f"{_ways_out(assembler)}",
            )
    return None


def _ways_out(assembler: Assembler) -> str:
    return (
        f"before Python starts, either set {assembler.variable} to ptxas {_SAFE} or newer (package "
        f"nvidia-cuda-nvcc), or set DISABLE_MMA_V3=1, which is slower; {ENV_ANY}=1 uses this ptxas "
        "anyway"
    )


def doubt_here(arch: int) -> Doubt | None:
    """The reason to doubt the assembler in use, or one that this process used before it.

    The version in Triton's cache key is that of the first ptxas of a process: after a change Triton
    may load kernels that an earlier one compiled. None if ``EGNN_FAST_ANY_ASSEMBLER`` is set.
    """
    if _ANY:
        return None
    return _doubt_with(arch, _named_by_triton(arch), *map(os.environ.get, _VARIABLES))


@functools.cache  # in every layer of every step
def _doubt_with(arch: int, named: str | None, *environment: str | None) -> Doubt | None:
    now = in_use(arch)
    if now is None:
        return None
    current = doubt(arch, now)
    before = None if named is None else doubt(arch, now._replace(version=named))
    refused = current is not None and current.level == "refuse"
    if named == now.version or before is None or refused:
        return current
    return Doubt(
        "refuse",
        f"{now.label}: chosen too late: Triton has already compiled with ptxas {named} in this "
        f"process, and may load those kernels from its cache; {_ways_out(now)}",
    )


def _named_by_triton(arch: int) -> str | None:
    """The ptxas version in the cache key of this process's Triton; None before it compiles."""
    import torch

    if torch.version.hip is not None:
        return None
    from triton.backends.nvidia import compiler

    told = compiler.get_ptxas_version
    if not told.cache_info().currsize:  # asking would settle it
        return None
    return _full_version(told(arch))


def _full_version(told: str) -> str | None:
    version = re.search(r"\bV(\d+\.\d+\.\d+)", told)
    return version[1] if version else None

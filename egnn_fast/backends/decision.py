"""Which backend runs a call, and why."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from egnn_fast.backends.available import Call, instruction_set, refusal, unproven, warning
from egnn_fast.backends.user_choice import requested
from egnn_fast.runtime.backend_names import AUTO, BACKENDS

_FASTEST = "the fastest that supports the call"
_warned: set[str] = set()
_INSIDE = ("egnn_fast.", "torch.")


class BackendError(RuntimeError):
    """A backend was named that cannot run the call."""


class Decision(NamedTuple):
    """What runs a call.

    Attributes
    ----------
    backend, reason : str
        Which one, and why.
    warning : str or None
        What the user should know if the call runs.
    error : str or None
        Why the named backend cannot run the call: nothing runs.
    """

    backend: str
    reason: str
    warning: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What would run a call: see :func:`explain_call`."""

    backend: str
    instruction_set: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)


def decide(argument: str | None, call: Call) -> Decision:
    """Which backend runs a call, given the user's argument; for :func:`select` and explanations."""
    name = requested(argument)
    # in every layer of every step: the usual case must be quick
    if name == AUTO and call.device == "cpu" and refusal("cpu", call) is None:
        return Decision("cpu", _FASTEST)
    unknown = call.unknown_to_kernels()
    if unknown is not None:
        # whatever backend is named; no warning if it is the reference, which runs
        named = name == "reference"
        reason = "named by the caller" if named else "no fused kernel supports it"
        reason = unknown if call.changed is not None else reason
        return Decision("reference", reason, None if named else unknown)
    if name != AUTO:
        error = refusal(name, call)
        if error is not None:
            return Decision(name, "", error=f"backend {name!r} cannot run this call: {error}")
        return Decision(name, "named by the caller", warning() if name == "triton" else None)
    fused = "cpu" if call.device == "cpu" else "triton"
    missing = refusal(fused, call) or unproven(fused)
    if missing is None:
        return Decision(fused, _FASTEST, warning() if fused == "triton" else None)
    without = f"no fused kernel for this call, using the reference: {missing}"
    # on "meta" there are shapes alone: no need to warn
    return Decision(
        "reference", "no fused kernel supports it", None if call.device == "meta" else without
    )


def select(argument: str | None, call: Call) -> str:
    """The backend that runs a call; warns once of what the user should know.

    Raises
    ------
    BackendError
        A backend was named, by argument, context or environment, that cannot run the call.
    """
    decision = decide(argument, call)
    if decision.error is not None:
        raise BackendError(decision.error)
    if decision.warning is not None:
        warn_once(decision.warning)
    return decision.backend


def explain_call(argument: str | None, call: Call) -> Explanation:
    """What :func:`select` would choose, and why not the others.

    Raises
    ------
    BackendError
        As :func:`select` does.
    """
    decision = decide(argument, call)
    if decision.error is not None:
        raise BackendError(decision.error)
    reasons = {backend: refusal(backend, call) for backend in BACKENDS}
    if requested(argument) == AUTO and call.device != "cpu":
        reasons["triton"] = reasons["triton"] or unproven("triton")
    refused = {backend: reason for backend, reason in reasons.items() if reason is not None}
    return Explanation(
        decision.backend, instruction_set(decision.backend), decision.reason, refused
    )


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

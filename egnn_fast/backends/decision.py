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
_warned: set[str] = set()  # messages that users have seen
# modules whose frames a warning skips, to point at the user's line
_SKIPPED_MODULES = ("egnn_fast.", "torch.")


class BackendError(RuntimeError):
    """The backend that the user named cannot run the call."""


class Decision(NamedTuple):
    """The backend for a call.

    Attributes
    ----------
    backend : str
        Its name.
    reason : str
        Why it was chosen.
    warning : str or None
        What to warn the user of before the call runs.
    error : str or None
        Why the backend that the user named cannot run the call; then nothing runs.
    """

    backend: str
    reason: str
    warning: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What would run a call, from :func:`explain_call`.

    Attributes
    ----------
    backend : str
        Its name.
    instruction_set : str
        That of its kernels.
    reason : str
        Why it was chosen.
    refused : dict
        For each backend that cannot run the call, or that "auto" does not choose yet, why.
    """

    backend: str
    instruction_set: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)


def decide(argument: str | None, call: Call) -> Decision:
    """The backend for a call; ``argument`` is the user's ``backend=``.

    Used by :func:`select` and :func:`explain_call`, so that they agree.

    Raises
    ------
    ValueError
        The user named a backend that does not exist.
    """
    name = requested(argument)
    # each layer asks in each step, so the usual case returns first
    if name == AUTO and call.device == "cpu" and refusal("cpu", call) is None:
        return Decision("cpu", _FASTEST)
    unknown = call.unknown_to_kernels()
    if unknown is not None:
        # the reference runs whatever backend the user named; it needs no warning if named itself
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
    missing, doubt = refusal(fused, call), unproven(fused)
    if missing is None and doubt is None:
        return Decision(fused, _FASTEST, warning() if fused == "triton" else None)
    reason = "no fused kernel supports it"
    message = f"no fused kernel for this call, using the reference: {missing}"
    if missing is None:
        reason = f"'auto' does not choose {fused!r} yet"
        message = f"'auto' uses the reference here: {doubt}"
    # meta tensors have no data: nothing is computed slowly, so there is nothing to warn of
    return Decision("reference", reason, None if call.device == "meta" else message)


def select(argument: str | None, call: Call) -> str:
    """The name of the backend for a call; gives the decision's warning once.

    Raises
    ------
    BackendError
        The backend named by argument, context or environment cannot run the call.
    ValueError
        The user named a backend that does not exist.
    """
    decision = decide(argument, call)
    if decision.error is not None:
        raise BackendError(decision.error)
    if decision.warning is not None:
        warn_once(decision.warning)
    return decision.backend


def explain_call(argument: str | None, call: Call) -> Explanation:
    """What :func:`select` would choose, and why it would not choose the others.

    Raises
    ------
    BackendError, ValueError
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


@torch.compiler.assume_constant_result  # traced code gives the warning during the trace
def warn_once(message: str) -> None:
    """Give each warning once, at the caller's line outside this package and PyTorch."""
    if message in _warned:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "torch.").startswith(
        _SKIPPED_MODULES
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
    _warned.add(message)  # last: a warning that is raised as an error is raised each time

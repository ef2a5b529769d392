"""The backends: what each can run, and which one runs a call.

``user_choice`` reads what the user asked for, ``available`` says what works here, and ``decision``
chooses. ``cpu`` and ``triton`` call the kernels.
"""

from importlib import import_module

from egnn_fast.backends.available import (
    BackendInfo,
    Call,
    info,
    instruction_set,
    refusal,
    unavailable,
)
from egnn_fast.backends.decision import (
    BackendError,
    Explanation,
    decide,
    explain_call,
    select,
    warn_once,
)
from egnn_fast.backends.user_choice import ENV_BACKEND, check_name, requested, use_backend
from egnn_fast.runtime.backend_names import AUTO, BACKENDS

__all__ = [
    "AUTO",
    "BACKENDS",
    "ENV_BACKEND",
    "BackendError",
    "BackendInfo",
    "Call",
    "Explanation",
    "check_name",
    "decide",
    "explain_call",
    "info",
    "instruction_set",
    "refusal",
    "requested",
    "select",
    "unavailable",
    "use_backend",
    "warn_once",
]

# an extension that was built from another version is refused here, before anybody asks for it
import_module("egnn_fast.backends.cpu")

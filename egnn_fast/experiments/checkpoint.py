"""Checkpoints: dictionaries of tensors and plain values. A damaged file raises an error.

Each file has a ``kind``, so that one cannot be loaded as another.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from egnn_fast.experiments.errors import CheckpointError
from egnn_fast.experiments.io import write_atomic

_SHOWN = 6  # keys named in an error


def save(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, in the format of ``torch.save``.

    Parameters
    ----------
    path : Path
        The file. An older version stays in place until the new one is complete.
    kind : str
        What the file holds; :func:`load` compares it.
    content : mapping
        Tensors, and values that ``torch.load(weights_only=True)`` accepts.
    """
    buffer = io.BytesIO()
    torch.save({"kind": kind, **content}, buffer)
    write_atomic(path, buffer.getbuffer())


def load(path: Path, kind: str, keys: Collection[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Parameters
    ----------
    path : Path
        The file.
    kind : str
        The ``kind`` that was passed to :func:`save`.
    keys : collection of str
        The keys that the file must have, no more and no fewer.

    Returns
    -------
    dict
        The content, without ``kind``.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, of another kind or has other keys.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check the CRCs
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"the checkpoint {path} is corrupt (at {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        raise CheckpointError(_unreadable(path, error)) from error
    stored_kind = content.get("kind") if isinstance(content, dict) else None
    if stored_kind != kind:
        wanted = f"the checkpoint {path} is of another kind: expected {kind!r}"
        got = stored_kind if isinstance(stored_kind, str) else "none"
        raise CheckpointError(f"{wanted}, got {got!r}")
    del content["kind"]
    problem = _key_difference(keys, content)
    if problem:
        raise CheckpointError(f"the checkpoint {path} does not fit: {problem}")
    return content


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights from the checkpoint ``path`` into a module.

    Raises
    ------
    CheckpointError
        Keys are missing or unexpected, or a shape differs. The module is unchanged then.
    """
    own = module.state_dict()
    is_mapping = isinstance(state, Mapping)
    problem = _key_difference(own, state) if is_mapping else "its state is no mapping"
    if not problem:
        wrong = [
            f"{key} {tuple(getattr(state[key], 'shape', ()))} for {tuple(value.shape)}"
            for key, value in own.items()
            if getattr(state[key], "shape", None) != value.shape
        ]
        problem = _listed("wrong shapes", wrong)
    if problem:
        raise CheckpointError(f"the checkpoint {path} does not fit the model: {problem}")
    module.load_state_dict(state)


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120]
    return f"the checkpoint {path} is corrupt or truncated ({type(error).__name__}: {reason})"


def _key_difference(expected: Collection[str], actual: Collection[str]) -> str:
    """The missing and unexpected keys in words; empty if there are none."""
    missing = [key for key in expected if key not in actual]
    extra = [str(key) for key in actual if key not in expected]
    parts = [_listed("missing keys", missing), _listed("unexpected keys", extra)]
    return "; ".join(part for part in parts if part)


def _listed(what: str, names: list[str]) -> str:
    """``what`` and the first names in words; empty if there are none."""
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}"

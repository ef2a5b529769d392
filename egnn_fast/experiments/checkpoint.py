"""Checkpoints that are whole or refused: a dictionary of tensors and plain values, with a kind."""

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
    """Write a checkpoint atomically; ``torch.load`` reads it.

    Parameters
    ----------
    path : Path
        The file; a previous version stays whole until the new one is.
    kind : str
        What it holds, so that another kind of file is told apart.
    content : mapping
        Tensors and plain values only.
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
        What :func:`save` was told.
    keys : collection of str
        The keys it must have, no more and no fewer.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, of another kind or has other keys.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the CRCs
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"the checkpoint {path} is corrupt (at {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the readers fail in any way
        raise CheckpointError(_unreadable(path, error)) from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        wanted = f"the checkpoint {path} is of another kind: expected {kind!r}"
        raise CheckpointError(f"{wanted}, got {found if isinstance(found, str) else 'none'!r}")
    del content["kind"]
    problem = _differing(keys, content)
    if problem:
        raise CheckpointError(f"the checkpoint {path} does not fit: {problem}")
    return content


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights from a checkpoint into a module.

    Raises
    ------
    CheckpointError
        Keys are missing or unexpected, or a shape differs; nothing was copied.
    """
    own = module.state_dict()
    problem = _differing(own, state) if isinstance(state, Mapping) else "its state is no mapping"
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


def _differing(wanted: Collection[str], found: Collection[str]) -> str:
    missing = [key for key in wanted if key not in found]
    extra = [str(key) for key in found if key not in wanted]
    parts = [_listed("missing keys", missing), _listed("unexpected keys", extra)]
    return "; ".join(part for part in parts if part)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(names[:_SHOWN])}{more}"

"""Files that are either the old version or the whole new one, and folders that can be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from egnn_fast.experiments.errors import UsageError

CACHE_VARIABLE = "EGNN_FAST_CACHE"
_TEMPORARY = ".tmp-"


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Replace a file by new content, so that a kill at any moment leaves one of the two, whole.

    Parameters
    ----------
    path : Path
        The file. Its folder must exist.
    content : bytes, memoryview or str
        All of it; str is written as UTF-8.
    """
    if isinstance(content, str):
        content = content.encode()
    handle, temporary = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed :func:`write_atomic` left in a folder."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def writable_folder(path: Path, option: str) -> Path:
    """Make a folder and prove that a file can be written there.

    Parameters
    ----------
    path : Path
        The folder; parents are made too.
    option : str
        What to call it in the error.

    Raises
    ------
    UsageError
        It cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=_TEMPORARY, dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{option}: cannot write to the folder {path}: {reason}") from error
    return path


def cache_folder() -> Path:
    """Where data sets are kept: ``EGNN_FAST_CACHE``, else ``egnn_fast`` in the XDG cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification: a relative path is to be ignored
    base = Path(xdg) if xdg and os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "egnn_fast"


def _umask() -> int:
    # it can only be read by setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask

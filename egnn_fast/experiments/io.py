"""Atomic writes, and checks that a folder can be written to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from egnn_fast.experiments.errors import UsageError

CACHE_VARIABLE = "EGNN_FAST_CACHE"
_TEMPORARY = ".tmp-"


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Replace a file's content atomically.

    If the process is killed, the file has either its old or its new content, in full.

    Parameters
    ----------
    path : Path
        The file. Its folder must exist.
    content : bytes, memoryview or str
        The whole new content; a str is written as UTF-8.
    """
    if isinstance(content, str):
        content = content.encode()
    handle, temporary = tempfile.mkstemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content must reach the disk before the new name does
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed :func:`write_atomic` left in a folder."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def writable_folder(path: Path, option: str) -> Path:
    """Make a folder and check that a file can be written there.

    Parameters
    ----------
    path : Path
        The folder; parents are made too.
    option : str
        The command-line option or variable that names the folder, for the error.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    UsageError
        The folder cannot be made or written to.
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
    """The folder of data sets: ``EGNN_FAST_CACHE``, else ``egnn_fast`` in the XDG cache folder."""
    configured = os.environ.get(CACHE_VARIABLE)
    if configured:
        return Path(configured).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification says to ignore a relative path
    base = Path(xdg) if xdg and os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "egnn_fast"


def _umask() -> int:
    # the umask can be read only by setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask

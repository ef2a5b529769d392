"""Ways to make machine code of the kernels: which assembler, with wgmma or without.

Others met wrong results on Hopper that came from the assembler (ptxas) and not from Triton: see
:mod:`bench.gpu.smoke`, which finds out which variant is right here and which of those is fastest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu import ROOT

OWN, NEWER, NO_WGMMA = "own ptxas", "newer ptxas", "no wgmma"
NAMES = (OWN, NEWER, NO_WGMMA)
PREFERRED = (NEWER, OWN, NO_WGMMA)  # where times do not tell
# of a newer ptxas; egnn_fast.kernels.assembler tells what others saw of older ones
LEAST = (13, 1, 80)
# which of the two paths counts for Hopper depends on Triton's version
_PATHS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
_NO_WGMMA, _CACHE = "DISABLE_MMA_V3", "TRITON_CACHE_DIR"
CONTROLLED = (*_PATHS, _NO_WGMMA, _CACHE)
# where a newer ptxas may lie: a folder that git ignores, or the package nvidia-cuda-nvcc
LOCAL = ROOT / ".ptxas" / "ptxas"
_IN_PACKAGE = ("cu13/bin/ptxas", "cuda_nvcc/bin/ptxas")
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes
    ----------
    name : str
        One of :data:`NAMES`.
    ptxas : str
        Path of the assembler; empty where there is none.
    version : str
        Its version, such as "13.1.80"; empty where unknown.
    settings : dict
        Environment variables that choose it.
    missing : str
        Why it cannot be tried; empty if it can.
    """

    name: str
    ptxas: str = ""
    version: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""

    @property
    def about(self) -> str:
        """In a line."""
        return self.missing or f"ptxas {self.version or 'of unknown version'}"

    def environment(self) -> dict[str, str]:
        """The environment of its processes."""
        kept = {k: v for k, v in os.environ.items() if k not in CONTROLLED}
        return {**kept, **self.settings}


def known(ptxas: Path | None, cache: Path) -> dict[str, Variant]:
    """All variants by name.

    Parameters
    ----------
    ptxas : Path, optional
        A newer assembler; without it one is looked for in :data:`LOCAL` and in the package
        nvidia-cuda-nvcc, never on the ``PATH``.
    cache : Path
        Triton's caches lie here, one for each variant.

    Raises
    ------
    ValueError
        ``ptxas`` is no ptxas, or an older one.
    """
    from egnn_fast.kernels.assembler import version_of

    own = own_ptxas()
    caches = {name: {_CACHE: str(cache / name.replace(" ", "-"))} for name in NAMES}
    own_version = version_of(own) or ""
    # named, too: Inductor points the variable to a ptxas of its own where it is not set
    named = {_PATHS[0]: own} if own else {}
    return {
        OWN: Variant(OWN, own, own_version, caches[OWN] | named),
        NEWER: _newer(ptxas, cache, caches[NEWER]),
        NO_WGMMA: Variant(NO_WGMMA, own, own_version, caches[NO_WGMMA] | named | {_NO_WGMMA: "1"}),
    }


def _newer(ptxas: Path | None, cache: Path, settings: Mapping[str, str]) -> Variant:
    from egnn_fast.kernels.assembler import version_of

    least = ".".join(map(str, LEAST))
    for place in [ptxas] if ptxas is not None else places():
        path = _executable(place, cache)
        version = version_of(str(path))
        chosen = dict.fromkeys(_PATHS, str(path))
        if version and _numbers(version) >= LEAST:
            return Variant(NEWER, str(path), version, {**settings, **chosen})
        if ptxas is not None:
            if not ptxas.is_file():
                raise ValueError(f"--ptxas: no such file: {ptxas}")
            got = f"version {version}" if version else "a file that tells no version"
            raise ValueError(f"--ptxas: expected ptxas {least} or newer, got {got}: {ptxas}")
    missing = f"no ptxas {least} or newer: give --ptxas FILE, or install nvidia-cuda-nvcc"
    return Variant(NEWER, missing=missing)


def _executable(path: Path, cache: Path) -> Path:
    """The file, or an executable copy of one that was copied here without its executable bit."""
    if not path.is_file() or os.access(path, os.X_OK):
        return path
    cache.mkdir(parents=True, exist_ok=True)
    copy = cache / "ptxas"
    shutil.copy(path, copy)
    copy.chmod(0o755)
    return copy


def places() -> list[Path]:
    """Files that may be a newer ptxas."""
    found = [LOCAL]
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        found += [Path(folder, inner) for inner in _IN_PACKAGE]
    return [path for path in found if path.is_file()]


def own_ptxas() -> str:
    """The assembler in Triton's package; empty where there is none."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return ""
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(path) if path.is_file() else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def default_cache() -> Path:
    """Where the caches lie unless ``--cache`` names another folder: a later run finds them."""
    return Path(tempfile.gettempdir()) / f"egnn-fast-gpu-suite-{os.getuid()}"


def standing(rows: Sequence[Row], items: Mapping[str, Row], able: Sequence[str]) -> list[Row]:
    """What the smoke items found of each variant that was tried, the best first.

    Parameters
    ----------
    rows : sequence of dict
        Of the section "speeds": ``variant``, ``seconds``.
    items : mapping
        Status of all items by name.
    able : sequence of str
        Variants that can be tried here.
    """
    found = []
    for name in able:
        mine = [row for key, row in items.items() if key.startswith(f"smoke: {name}: ")]
        times = [row["seconds"] for row in rows if row["variant"] == name]
        found.append({
            "variant": name, "right": sum(row["status"] == "pass" for row in mine),
            "wrong": [row["name"] for row in mine if row["status"] == "fail" and not row["hung"]],
            "tried": len(mine), "seconds": sum(times) if times else None,
        })  # fmt: skip
    # a time that has nothing to be compared with says nothing
    timed = all(row["seconds"] is not None for row in found if row["right"])
    return sorted(found, key=partial(_rank, timed=timed))


def _rank(row: Row, timed: bool) -> tuple[bool, int, int, float]:
    """Fewest wrong cases first, then fewest open ones, then the fastest; nothing right last."""
    speed = row["seconds"] if timed and row["right"] else PREFERRED.index(row["variant"])
    return row["right"] == 0, len(row["wrong"]), row["tried"] - row["right"], speed

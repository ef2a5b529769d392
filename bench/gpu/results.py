"""The results of a run: kept in files that are written anew after each item."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import egnn_fast
from bench.gpu import derive
from bench.gpu.setting import FAIL, LEFT_OUT, PASS, Item, Outcome, Setting
from egnn_fast.bench.results import _commit, _cpu_model
from egnn_fast.experiments.errors import UsageError
from egnn_fast.experiments.io import write_atomic

SCHEMA = 2
RESULTS, TABLE, TRIAGE, CODE = "results.json", "results.csv", "triage.json", "triage_code.zip"
# sections that are written to files of their own
_APART = ("triage", "triage_kernels")
TRIAGE_ROWS = 800  # that are kept of a run: the first ones; some MB
CODE_BYTES = 8 << 20  # of machine code that is kept of a run, compressed
COMMIT = Path(__file__).resolve().parent / "commit.txt"  # filled by git archive
# what must agree for results to be continued
_SAME = ("gpu", "torch", "triton", "commit", "egnn_fast", "quick", "device")
_CLOCK_QUERY = "clocks.max.sm"
Row = dict[str, Any]


def environment(setting: Setting, command: str, commit: str | None) -> Row:
    """Where and with what."""
    found: Row = {
        "device": setting.device, "quick": setting.quick, "command": command,
        "commit": commit or _commit() or exported_commit(), "egnn_fast": egnn_fast.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__, "triton": _version("triton"), "numpy": _version("numpy"),
        "cuda": torch.version.cuda, "hip": torch.version.hip, "cpu": _cpu_model(),
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        "gpu": None, "capability": None, "multiprocessors": None, "memory_bytes": None,
        "l2_bytes": None, "driver": None, "clock_mhz": None,
    }  # fmt: skip
    if setting.on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size, "driver": _ask_driver("driver_version"),
            "clock_mhz": _clock_mhz(gpu),
        }  # fmt: skip
    return found


def exported_commit() -> str | None:
    """The commit that this tree was exported from by ``git archive``; None where it was not."""
    try:
        found = COMMIT.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return None if not found or "$" in found else found


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ask_driver(field: str) -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _clock_mhz(gpu: Any) -> float:
    """The highest clock of the multiprocessors: from nvidia-smi, else from PyTorch."""
    try:
        return float(_ask_driver(_CLOCK_QUERY) or "")
    except ValueError:
        return float(getattr(gpu, "clock_rate", 1_980_000)) / 1000


class Results:
    """All that a run found.

    Parameters
    ----------
    folder : Path
        Where the files are.
    environment : dict
        See :func:`environment`.

    Attributes
    ----------
    items : dict
        By name: section, status, reason and seconds of each item.
    sections : dict
        Rows of what the items found; each names its item, and the variant that it ran with.
    code : dict
        Compressed machine code of kernels that were wrong, by hash.
    variants : list of dict
        What the smoke items found of each variant of the compiler, the best first.
    variant : str
        The one that everything else runs with.
    """

    def __init__(self, folder: Path, environment: Row) -> None:
        self.folder, self.environment = folder, environment
        self.items: dict[str, Row] = {}
        self.sections: dict[str, list[Row]] = {}
        self.code: dict[str, str] = {}
        self._apart: dict[str, list[Row]] | None = None  # what triage.json holds by this run
        self.variants: list[Row] = []
        self.variant = ""

    def resume(self) -> int:
        """Take over what a run with the same GPU and versions found; returns how many items.

        Raises
        ------
        UsageError
            There is a file that is something else, or from elsewhere.
        """
        path = self.folder / RESULTS
        if not path.exists():
            return 0
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
            theirs = content["environment"]
            items = {row["name"]: row for row in content["items"]}
            sections = {name: list(rows) for name, rows in content["found"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--resume: {path} holds no results of the suite: {error}") from error
        for name in _SAME:
            if theirs.get(name) != self.environment[name]:
                raise UsageError(
                    f"--resume: {path} is of another run: {name} was {theirs.get(name)!r}, "
                    f"is {self.environment[name]!r}"
                )
        # what was left out may fit now
        self.items = {n: row for n, row in items.items() if row["status"] != LEFT_OUT}
        self.sections = sections
        self._read_triage()
        self.drop(lambda row: False)
        return len(self.items)

    def _read_triage(self) -> None:
        """Read ``triage.json`` and ``triage_code.zip`` of an earlier run."""
        try:
            content = json.loads((self.folder / TRIAGE).read_text(encoding="utf-8"))
            self.sections |= {name: content[name] for name in _APART}
            with zipfile.ZipFile(self.folder / CODE) as archive:
                names = archive.namelist()
                self.code = {
                    Path(n).stem: base64.b64encode(archive.read(n)).decode() for n in names
                }
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return  # there was nothing wrong, or it was not written: the items say so anyway

    def drop(self, which: Callable[[Row], bool]) -> int:
        """Forget items, so that they run again, and their rows; returns how many."""
        before = len(self.items)
        self.items = {name: row for name, row in self.items.items() if not which(row)}
        self.sections = {
            name: [row for row in rows if row["item"] in self.items]
            for name, rows in self.sections.items()
        }
        return before - len(self.items)

    def add(self, item: Item, outcome: Outcome, seconds: float) -> None:
        """Take an item's outcome in, and write the files."""
        variant = item.variant or self.variant
        self.items[item.name] = {
            "name": item.name, "section": item.section, "status": outcome.status,
            "reason": outcome.reason, "seconds": round(seconds, 2), "variant": variant,
            "hung": outcome.hung, "fixed": bool(item.variant),
        }  # fmt: skip
        for name in {*self.sections, *outcome.rows}:
            kept = [row for row in self.sections.get(name, []) if row["item"] != item.name]
            new = [
                {"item": item.name, "variant": variant, **row} for row in outcome.rows.get(name, [])
            ]
            room = TRIAGE_ROWS if name in _APART else len(kept) + len(new)
            self.sections[name] = (kept + new)[:room]
        for name, code in outcome.code.items():
            if sum(map(len, self.code.values())) + len(code) <= CODE_BYTES * 4 / 3:
                self.code[name] = code
        self.save()

    def derived(self) -> tuple[list[Row], list[Row]]:
        """Times with ratios and floors, and the goals."""
        # copies: pictures are drawn by another thread
        sections, items = dict(self.sections), dict(self.items)
        times = derive.times(self.environment, sections, items)
        if not self.environment["gpu"]:  # the goals are of full sizes
            return times, []
        return times, list(derive.goals(times, sections.get("memory", [])))

    def count(self, status: str) -> int:
        """How many items have a status."""
        return sum(row["status"] == status for row in self.items.values())

    @property
    def passed(self) -> bool:
        """Whether something passed and nothing failed; failed tune items do not count."""
        rows = self.items.values()
        failed = any(row["status"] == FAIL and row["section"] != "tune" for row in rows)
        return not failed and any(row["status"] == PASS for row in rows)

    def save(self) -> None:
        """Write the files; a kill leaves each of them old or new, but whole."""
        times, goals = self.derived()
        told = {name: rows for name, rows in self.sections.items() if name not in _APART}
        apart = {name: self.sections.get(name, []) for name in _APART}
        content = {
            "schema": SCHEMA, "environment": self.environment, "variant": self.variant,
            "variants": self.variants, "passed": self.passed,
            "counts": {status: self.count(status) for status in (PASS, FAIL, LEFT_OUT)},
            "items": list(self.items.values()), "goals": goals, "times": times, "found": told,
        }  # fmt: skip
        # triage first: a run that is killed between two files keeps its failures
        stale = apart != self._apart and (self.folder / TRIAGE).exists()
        if stale or (apart != self._apart and any(apart.values())):
            environment = {"schema": SCHEMA, "environment": self.environment}
            write_atomic(self.folder / TRIAGE, _json(environment | apart))
            self._save_code()
            self._apart = apart
        write_atomic(self.folder / RESULTS, _json(content))
        write_atomic(self.folder / TABLE, _csv(list(self.items.values()), times, told))

    def _save_code(self) -> None:
        """``triage_code.zip``: for each hash, gzip of the cubin, b"\\0PTX\\0" and the PTX."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
            for name, code in self.code.items():
                archive.writestr(f"{name}.gz", base64.b64decode(code))
        write_atomic(self.folder / CODE, content.getvalue())


def _json(content: Row) -> str:
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _csv(items: list[Row], times: list[Row], sections: Mapping[str, list[Row]]) -> str:
    """One table of everything: a row's section says which of the columns it fills."""
    tables = {"item": items, **sections, "times": times}
    rows = [{"section": name, **_flat(row)} for name, found in tables.items() for row in found]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["section"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row) -> Row:
    """Without mappings inside."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}: {name}": inner for name, inner in value.items()}
        elif key != "section":
            flat[key] = value
    return flat

"""The results of a run: kept in files that are written anew after each item."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import egnn_fast
from bench.gpu import derive
from bench.gpu.setting import FAIL, PASS, SKIP, Item, Outcome, Setting
from egnn_fast.bench.results import _commit, _cpu_model
from egnn_fast.experiments.errors import UsageError
from egnn_fast.experiments.io import write_atomic

SCHEMA = 1
RESULTS, TABLE = "results.json", "results.csv"
# what must agree for results to be continued
_SAME = ("gpu", "torch", "triton", "commit", "egnn_fast", "quick", "device")
_CLOCK_QUERY = "clocks.max.sm"
Row = dict[str, Any]


def environment(setting: Setting, command: str, commit: str | None) -> Row:
    """Where and with what."""
    found: Row = {
        "device": setting.device, "quick": setting.quick, "command": command,
        "commit": commit or _commit(), "egnn_fast": egnn_fast.__version__,
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
    """The highest clock of the multiprocessors: the driver's word, else PyTorch's."""
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
        Rows of what the items found; each names its item.
    """

    def __init__(self, folder: Path, environment: Row) -> None:
        self.folder, self.environment = folder, environment
        self.items: dict[str, Row] = {}
        self.sections: dict[str, list[Row]] = {}

    def resume(self) -> int:
        """Take over what an earlier run with the same GPU and versions found: how many items.

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
                raise ValueError("its schema is another one")
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
        self.items = {n: row for n, row in items.items() if row["status"] != SKIP}
        self.sections = {
            name: [row for row in rows if row["item"] in self.items]
            for name, rows in sections.items()
        }
        return len(self.items)

    def add(self, item: Item, outcome: Outcome, seconds: float) -> None:
        """Take an item's outcome in, and write the files."""
        self.items[item.name] = {
            "name": item.name, "section": item.section, "status": outcome.status,
            "reason": outcome.reason, "seconds": round(seconds, 2),
        }  # fmt: skip
        for name in {*self.sections, *outcome.rows}:
            kept = [row for row in self.sections.get(name, []) if row["item"] != item.name]
            new = [{"item": item.name, **row} for row in outcome.rows.get(name, [])]
            self.sections[name] = kept + new
        self.save()

    def derived(self) -> tuple[list[Row], list[Row]]:
        """Times with ratios and floors, and the goals."""
        times = derive.times(self.environment, self.sections, self.items)
        if not self.environment["gpu"]:  # the goals are of full sizes
            return times, []
        return times, list(derive.goals(times, self.sections.get("memory", [])))

    def count(self, status: str) -> int:
        """How many items have a status."""
        return sum(row["status"] == status for row in self.items.values())

    @property
    def passed(self) -> bool:
        """Whether something was run and none of it failed; a block size may, when tuning."""
        rows = self.items.values()
        failed = any(row["status"] == FAIL and row["section"] != "tune" for row in rows)
        return not failed and any(row["status"] == PASS for row in rows)

    def save(self) -> None:
        """Write ``results.json`` and ``results.csv``: the old ones or the new ones are there."""
        times, goals = self.derived()
        content = {
            "schema": SCHEMA, "environment": self.environment, "passed": self.passed,
            "counts": {status: self.count(status) for status in (PASS, FAIL, SKIP)},
            "items": list(self.items.values()), "goals": goals, "times": times,
            "found": self.sections,
        }  # fmt: skip
        text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
        write_atomic(self.folder / RESULTS, text)
        write_atomic(self.folder / TABLE, _csv(list(self.items.values()), times, self.sections))


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

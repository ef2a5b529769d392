"""From the command line to the files: what is run in which order, within which time."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu.results import Results
    from bench.gpu.setting import Item, Outcome, Setting

BUDGET = 460.0  # seconds: a run ends within eight minutes
TUNE_BUDGET = 580.0
CPU_BUDGET = 3600.0
CHECKS_SHARE = 0.5  # of the budget, where times are wanted too
JOBS = 14
LINES = 24  # about kernels, on the terminal
SECTIONS = ("checks", "times", "tune")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="gpu_suite.py", description="Check and time the Triton kernels of egnn_fast."
    )
    option = found.add_argument
    option("--out", type=Path, help="folder for results.json, results.csv, pictures")
    option("--only", choices=SECTIONS, help="a part; without it, checks and times")
    told = f"leave out what does not fit ({BUDGET:.0f}; tune: {TUNE_BUDGET:.0f})"
    option("--budget", type=float, metavar="SECONDS", help=told)
    option("--quick", action="store_true", help="a subset")
    option("--resume", action="store_true", help="keep what --out already has")
    told = "items whose names match, such as 'times: nbody*'; repeatable"
    option("--case", action="append", metavar="PATTERN", help=told)
    told = "cpu: tiny sizes through Triton's interpreter, to try the suite itself"
    option("--device", choices=("cuda", "cpu"), default="cuda", help=told)
    told = "processes for the checks; 0: all in this one"
    option("--jobs", type=int, metavar="N", help=told)
    option("--commit", help="of this checkout, where git cannot tell")
    option("--list", action="store_true", help="print the items and end")
    option("--child", action="store_true", help=argparse.SUPPRESS)
    option("--memcheck-child", action="store_true", help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if nothing failed, 1 if something did, 2 for a wrong option."""
    options = parser().parse_args(arguments)
    reason = _wrong(options)
    if reason is not None:
        print(f"gpu_suite.py: {reason}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    _prepare(options.device)

    from bench.gpu import children, items, system
    from bench.gpu.setting import Setting
    from egnn_fast.experiments.errors import ExperimentError

    setting = Setting(options.device, options.quick)
    if options.memcheck_child:
        return system.memcheck_child(setting)
    missing = None if options.child or options.list else _missing(setting)
    if missing is not None:
        print(f"gpu_suite.py: {missing}", file=sys.stderr)
        return 2
    known = items.all_items(setting)
    if options.child:
        return children.serve(known, setting, sys.stdin, sys.stdout)
    chosen = _choose(known, options)
    if options.list:
        print("\n".join(chosen))
        return 0
    try:
        return _Run(options, setting, chosen, begin).run()
    except ExperimentError as error:
        print(f"gpu_suite.py: {error}", file=sys.stderr)
        return error.exit_code


def _wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the options; None if nothing is."""
    if options.budget is not None and options.budget <= 0:
        return f"--budget: expected more than 0 seconds, got {options.budget}"
    if options.jobs is not None and options.jobs < 0:
        return f"--jobs: expected at least 0, got {options.jobs}"
    if options.out is None and not (options.list or options.child or options.memcheck_child):
        return "--out: needed, the folder for the results"
    return None


def _prepare(device: str) -> None:
    """What must stand in the environment before PyTorch and Triton are loaded."""
    # cuBLAS needs it to give the same bits each time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def _missing(setting: Setting) -> str | None:
    """Why the kernels cannot run here; None if they can."""
    import torch

    from egnn_fast.backends import unavailable

    if setting.on_gpu and not torch.cuda.is_available():
        return "PyTorch sees no GPU; --device cpu tries the suite itself, at tiny sizes"
    return unavailable("triton")


def _choose(known: Mapping[str, Item], options: argparse.Namespace) -> dict[str, Item]:
    """The items that the options ask for."""
    sections = (options.only,) if options.only else ("checks", "times")
    found = {name: item for name, item in known.items() if item.section in sections}
    if options.only == "times":  # no speed of what was not checked
        found = {n: i for n, i in known.items() if n.startswith("at full size: ")} | found
    if options.case:
        found = {
            name: item
            for name, item in found.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.case)
        }
    return found


class _Run:
    """A run with its clock and its results."""

    def __init__(
        self, options: argparse.Namespace, setting: Setting, chosen: Mapping[str, Item],
        begin: float,
    ) -> None:  # fmt: skip
        from bench.gpu.results import Results, environment
        from egnn_fast.experiments.errors import UsageError
        from egnn_fast.experiments.io import remove_leftovers, writable_folder

        if not chosen:
            raise UsageError("--case: no item matches; --list prints them")
        self.options, self.setting, self.begin = options, setting, begin
        budget = options.budget or (TUNE_BUDGET if options.only == "tune" else BUDGET)
        if not setting.on_gpu and options.budget is None:
            budget = CPU_BUDGET
        self.budget, self.deadline = budget, begin + budget
        cores = os.cpu_count() or 1
        self.jobs = min(JOBS, max(1, cores - 1)) if options.jobs is None else options.jobs
        writable_folder(options.out, "--out")
        remove_leftovers(options.out)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.results: Results = Results(options.out, environment(setting, command, options.commit))
        kept = self.results.resume() if options.resume else 0
        if kept:
            self._say(f"{kept} items are kept from {options.out}")
        self.painter: threading.Thread | None = None
        self.waiting = [i for name, i in chosen.items() if name not in self.results.items]
        self._say(f"{len(self.waiting)} items, {self.jobs} processes, {budget:.0f} s")

    def run(self) -> int:
        """All that fits; the exit status."""
        from bench.gpu.children import skipped

        section = {name: [i for i in self.waiting if i.section == name] for name in SECTIONS}
        checks_end = self.deadline
        if section["times"]:
            checks_end = time.monotonic() + CHECKS_SHARE * (self.deadline - time.monotonic())
        left = self._go(section["checks"], self.jobs, checks_end)
        later = self._go(section["times"], min(self.jobs, 1), self.deadline)
        left = self._go(left, self.jobs, self.deadline) + later
        left += self._tune(section["tune"])
        for item in left:
            self._done(item, skipped(f"the budget of {self.budget:.0f} s left no time for it"), 0)
        if self.painter is not None:
            self.painter.join()
        self._draw()
        return self._report()

    def _go(self, items: Sequence[Item], jobs: int, deadline: float) -> list[Item]:
        from bench.gpu import children

        if not items:
            return []
        command = children.child_command(self.setting)
        return children.run(
            items, self.setting, jobs=jobs, deadline=deadline, done=self._done, command=command
        )

    def _tune(self, items: Sequence[Item]) -> list[Item]:
        """The trials side by side, then the races among those that were right."""
        from bench.gpu import tune

        trials = [item for item in items if not item.alone]
        races = [item for item in items if item.alone]
        share = time.monotonic() + 0.7 * (self.deadline - time.monotonic())
        left = self._go(trials, self.jobs, share if races else self.deadline)
        known = self.results.items
        every = [i.name for i in tune.candidate_items(self.setting)]
        wrong = [name for name in every if known.get(name, {}).get("status") != "pass"]
        os.environ[tune.WRONG] = json.dumps(wrong)
        left += self._go(races, min(self.jobs, 1), self.deadline)
        gpu = self.results.environment["gpu"] or "no GPU, interpreted"
        date = self.results.environment["date"][:10]
        for line in tune.table_rows(self.results.sections.get("tune", []), gpu, date):
            print(line, flush=True)
        return left

    def _done(self, item: Item, outcome: Outcome, seconds: float) -> None:
        self.results.add(item, outcome, seconds)
        reason = f": {outcome.reason}" if outcome.reason else ""
        self._say(f"{outcome.status}  {item.name} ({seconds:.1f} s){reason}")
        if item.section == "times" and outcome.rows:
            self._draw_meanwhile()

    def _draw_meanwhile(self) -> None:
        """Draw while the next item runs, unless that is being done."""
        if self.painter is None or not self.painter.is_alive():
            self.painter = threading.Thread(target=self._draw, daemon=True)
            self.painter.start()

    def _draw(self) -> None:
        """What is known by now, as pictures."""
        try:
            from bench.gpu import plots
        except ImportError as error:
            self._say(f"no pictures: {error}")
            return
        times, _ = self.results.derived()
        memory: list[dict[str, Any]] = list(self.results.sections.get("memory", []))
        plots.draw(times, memory, self.results.environment, self.options.out)

    def _report(self) -> int:
        times, goals = self.results.derived()
        for row in times:
            share = f", floor {row['floor_share']:.0%}" if row["floor_share"] else ""
            ratio = f", {row['ratio']:.2f} x ours" if row["ratio"] else ""
            what = f"{row['case']}, {row['precision']}, {row['measured']}, {row['peer']}"
            print(f"{what}: {row['median_s'] * 1e3:.4g} ms{ratio}{share}")
        kernels = sorted(
            self.results.sections.get("kernels", []), key=lambda row: -row["seconds_per_run"]
        )
        for row in kernels[:LINES]:
            what = f"{row['precision']}, {row['what']}, {row['kernel'][:60]}"
            print(
                f"{what}: {row['seconds_per_run'] * 1e3:.4g} ms in {row['calls_per_run']:g} calls"
            )
        for row in self.results.sections.get("reach", []):
            print(f"{row['peer']} trains on {row['edges']:,} edges; then {row['limit']}")
        for row in goals:
            sign = ">=" if row["at_least"] else "<="
            word = "met" if row["met"] else "not met"
            told = f"{row['value']:.4g} {row['unit']} ({sign} {row['goal']:g}: {word})"
            print(f"goal: {row['case']}: {row['what']}: {told}")
        failed = [row for row in self.results.items.values() if row["status"] == "fail"]
        for row in failed:
            print(f"fail: {row['name']}: {row['reason']}")
        counts = ", ".join(f"{self.results.count(s)} {s}" for s in ("pass", "fail", "skip"))
        self._say(f"{counts}; written to {self.options.out}")
        return 0 if self.results.passed else 1

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.begin:6.1f}] {line}", flush=True)

"""A run of the suite, phase by phase: what is begun until when, with which variant."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import children, plan, report
from bench.gpu.results import Results, environment
from bench.gpu.setting import LEFT_OUT, Item, Outcome, Setting
from bench.gpu.variants import NAMES, NEWER, OWN, Variant, standing
from egnn_fast.experiments.errors import UsageError
from egnn_fast.experiments.io import remove_leftovers, writable_folder, write_atomic

CPU_BUDGET = 3600.0
JOBS = 14
REPORT = "report.txt"
_USABLE = 0.85  # of the GPU's memory


class Run:
    """All that the options ask for.

    Parameters
    ----------
    options : Namespace
        Those of the command line.
    chosen : mapping
        Items by name.
    variants : mapping
        The variants of the compiler by name.
    begin : float
        By ``time.monotonic``: when the run began.
    """

    def __init__(
        self, options: argparse.Namespace, setting: Setting, chosen: Mapping[str, Item],
        variants: Mapping[str, Variant], begin: float,
    ) -> None:  # fmt: skip
        if not chosen:
            raise UsageError("--case: no item matches; --list prints them")
        self.options, self.setting, self.begin, self.variants = options, setting, begin, variants
        self.chosen = chosen
        usual = plan.FULL if setting.on_gpu else CPU_BUDGET
        self.budget = usual if options.minutes is None else 60.0 * options.minutes
        cores = os.cpu_count() or 1
        self.jobs = min(JOBS, max(1, cores - 1)) if options.jobs is None else options.jobs
        writable_folder(options.out, "--out")
        remove_leftovers(options.out)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.said: list[str] = []
        self.results = Results(options.out, environment(setting, command, options.commit))
        self.results.environment["assemblers"] = {v.name: v.about for v in variants.values()}
        memory = self.results.environment["memory_bytes"]
        self.gigabytes = _USABLE * memory / 1e9 if memory else float("inf")
        self.painter: threading.Thread | None = None
        self._begin()

    def _begin(self) -> None:
        """Take over what is kept, and choose a variant by what is known so far."""
        kept = self.results.resume() if self.options.resume else 0
        self._choose_variant()
        # items that ran with another variant than the chosen one run again
        kept -= self.results.drop(
            lambda row: not row["fixed"] and row["variant"] != self.results.variant
        )
        for line in report.heading(self.results):
            self._say(line)
        if kept:
            self._say(f"{kept} items are kept from {self.options.out}")
        known = self.results.items
        self.waiting = {n: i for n, i in self.chosen.items() if n not in known}
        self._say(f"{len(self.waiting)} items, {self.jobs} processes, {self.budget:.0f} s")
        if self.results.environment["commit"] is None:
            self._say("the commit is not known: give --commit")

    def run(self) -> int:
        """Run what fits into the time; returns the exit status."""
        left: list[Item] = []
        parts = plan.phases_of(self._without_tuning())
        times = plan.ends(self.budget, self.setting.on_gpu)
        for (phase, items), end in zip(parts, times, strict=True):
            if items:
                self._say(f"phase: {phase.name}, to {end:.0f} s")
            if phase.name == plan.FIRST_TIMES:  # nothing comes before them
                left += self._go(items, end)
                left = self._without_compiling(left)
            else:
                # first what the phases before had no time for
                left = self._go([*left, *items], end)
            if phase.name == "smoke":
                self._choose_variant()
            if items:
                self._write_report()
        left += self._tune([i for i in self.waiting.values() if i.section == "tune"])
        for item in left:
            reason = f"the budget of {self.budget:.0f} s left no time for it"
            self._done(item, Outcome(LEFT_OUT, reason), 0)
        if self.painter is not None:
            self.painter.join()
        self._draw()
        page, details = self._write_report()
        print("\n".join([*details, "", *page]), flush=True)  # a terminal shows the end
        self._say(f"written to {self.options.out}")
        return 0 if self.results.passed else 1

    def _write_report(self) -> tuple[list[str], list[str]]:
        """The first page and the details, after they were written."""
        page, details = report.first_page(self.results), report.details(self.results)
        text = "\n".join([*page, "", *details, "", *self.said])
        write_atomic(self.options.out / REPORT, text + "\n")
        return page, details

    def _without_compiling(self, left: list[Item]) -> list[Item]:
        """Without what compiles for times that have run by now."""
        late = [item for item in left if item.name.startswith("compile: ")]
        for item in late:
            self._done(item, Outcome(LEFT_OUT, "too late: what is timed was compiled by it"), 0)
        return [item for item in left if item not in late]

    def _without_tuning(self) -> dict[str, Item]:
        return {name: item for name, item in self.waiting.items() if item.section != "tune"}

    def _go(self, items: Sequence[Item], end: float) -> list[Item]:
        """Run items until ``end`` seconds after the start; returns those that were left."""
        able = []
        for item in items:
            variant = self.variants.get(item.variant)
            if variant is not None and variant.missing:
                self._done(item, Outcome(LEFT_OUT, variant.missing), 0)
            else:
                able.append(item)
        if not able:
            return []
        return children.run(
            able, self.setting, jobs=self.jobs, deadline=self.begin + end, done=self._done,
            command=children.child_command(self.setting), gigabytes=self.gigabytes,
            environment=self._environment,
        )  # fmt: skip

    def _environment(self, item: Item) -> dict[str, str]:
        return self.variants[item.variant or self.results.variant].environment()

    def _choose_variant(self) -> None:
        """The fewest wrong cases, then the fastest; before any is known, the newest ptxas."""
        results = self.results
        able = [name for name in NAMES if not self.variants[name].missing]
        results.variants = standing(results.sections.get("speeds", []), results.items, able)
        best = next((row for row in results.variants if row["right"]), None)
        usual = NEWER if NEWER in able else OWN
        before = results.variant
        results.variant = self.options.variant or (best["variant"] if best else usual)
        if self.variants[results.variant].missing:
            raise UsageError(f"--variant: {self.variants[results.variant].missing}")
        if before and best is not None:
            for line in report.standing_lines(results):
                self._say(line)

    def _tune(self, items: Sequence[Item]) -> list[Item]:
        """The trials side by side, then the races among those that were right."""
        from bench.gpu import tune

        trials = [item for item in items if not item.alone]
        races = [item for item in items if item.alone]
        now = time.monotonic() - self.begin
        left = self._go(trials, now + 0.7 * (self.budget - now) if races else self.budget)
        known = self.results.items
        every = [i.name for i in tune.candidate_items(self.setting)]
        wrong = [name for name in every if known.get(name, {}).get("status") != "pass"]
        os.environ[tune.WRONG] = json.dumps(wrong)
        left += self._go(races, self.budget)
        gpu = self.results.environment["gpu"] or "no GPU, interpreted"
        date = self.results.environment["date"][:10]
        for line in tune.table_rows(self.results.sections.get("tune", []), gpu, date):
            self._say(line)
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

    def _say(self, line: str) -> None:
        self.said.append(f"[{time.monotonic() - self.begin:6.1f}] {line}")
        print(self.said[-1], flush=True)

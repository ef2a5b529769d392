"""``egnn-fast bench``: run the cases, write and print the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from egnn_fast import backends
from egnn_fast.bench import cases, peers, plots, report
from egnn_fast.bench.run import run
from egnn_fast.experiments.errors import UsageError
from egnn_fast.experiments.io import remove_leftovers, writable_folder

REPEATS, QUICK_REPEATS = 7, 3
RESULTS = "results.json"


def command(
    console: Console,
    *,
    patterns: Sequence[str] | None,
    against: Sequence[str] | None,
    quick: bool,
    threads: int | None,
    repeats: int | None,
    out: Path,
) -> bool:
    """Run the cases, write ``results.json`` and the pictures, and print the results.

    The parameters are the options of the command. Returns whether all checks passed.

    Raises
    ------
    UsageError
        An option is wrong. Raised before anything is timed.
    """
    for name, value in (("--threads", threads), ("--repeats", repeats)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    chosen = cases.select(patterns, quick)
    peers.check_names(against)
    reason = backends.unavailable("cpu")
    if reason is not None:
        raise UsageError(f"there is nothing to time: {reason}")
    writable_folder(out, "--out")
    remove_leftovers(out)
    if threads is not None:
        torch.set_num_threads(threads)
    with console.status("starting") as status:
        results = run(
            chosen,
            against=against,
            repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
            quick=quick,
            tell=status.update,
            save=lambda results: results.save(out / RESULTS),
        )
    pictures = plots.draw(results, out)
    console.print(report.report(results))
    files = ", ".join(str(path) for path in (out / RESULTS, *pictures))
    console.print(f"written: {files}", soft_wrap=True, markup=False)
    return results.passed


def show_cases(console: Console) -> None:
    """Print the table of cases."""
    console.print(report.listing())

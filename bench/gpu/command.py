"""The command line of the suite."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu.setting import Item, Setting

SECTIONS = ("smoke", "checks", "times", "tune")


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="gpu_suite.py", description="Check and time the Triton kernels of egnn_fast."
    )
    option = found.add_argument
    option("--out", type=Path, metavar="FOLDER", help="for the results; needed but for --list")
    told = "a part; without it smoke, checks and times; times brings the checks at full size too"
    option("--only", choices=SECTIONS, help=told)
    told = "time limit of the run (default: 9, the whole plan; 4 runs its first half)"
    option("--minutes", type=float, metavar="N", help=told)
    option("--quick", action="store_true", help="fewer items")
    option("--resume", action="store_true", help="continue an interrupted run in --out")
    told = "items whose names match, such as 'times: nbody*'; repeatable"
    option("--case", action="append", metavar="PATTERN", help=told)
    told = "cpu: tiny sizes through Triton's interpreter, to try the suite itself"
    option("--device", choices=("cuda", "cpu"), default="cuda", help=told)
    told = "a ptxas of CUDA 13.1 or newer, to try beside Triton's own"
    option("--ptxas", type=Path, metavar="FILE", help=told)
    told = "use it for all but the smoke items: 'own ptxas', 'newer ptxas' or 'no wgmma'"
    option("--variant", metavar="NAME", help=told)
    told = "keep compiled kernels here (default: a folder in the system's temporary folder)"
    option("--cache", type=Path, metavar="FOLDER", help=told)
    told = "processes for the checks (default: cores - 1, at most 14); 0: all in this one"
    option("--jobs", type=int, metavar="N", help=told)
    option("--commit", help="of this tree, if neither git nor git archive tells it")
    option(
        "--plant",
        action="append",
        default=[],
        metavar="KIND=PATTERN",
        help="plant a fault in matching items, to test the suite: wrong, memory, crash or hang",
    )
    option("--list", action="store_true", help="print the items, by phase, and end")
    option("--child", action="store_true", help=argparse.SUPPRESS)
    option("--sanitized", metavar="NAME", help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 if something passed and nothing failed, 2 for a wrong option, 1 otherwise."""
    options = parser().parse_args(arguments)
    reason = _wrong(options)
    if reason is not None:
        return _refuse(reason)
    begin = time.monotonic()
    _prepare(options.device)

    from bench.gpu import children, items, sanitizer, variants
    from bench.gpu.run import Run
    from bench.gpu.setting import Setting
    from egnn_fast.experiments.errors import ExperimentError

    setting = Setting(options.device, options.quick, tuple(options.plant))
    if options.sanitized:
        return sanitizer.sanitized(options.sanitized, setting)
    known = items.all_items(setting)
    if options.child:
        return children.serve(known, setting, sys.stdin, sys.stdout)
    chosen = _choose(known, options)
    if options.list:
        return _list(chosen)
    missing = _missing(setting)
    if missing is not None:
        return _refuse(missing)
    try:
        found = variants.known(options.ptxas, options.cache or variants.default_cache())
        return Run(options, setting, chosen, found, begin).run()
    except ValueError as error:
        if not str(error).startswith("--"):
            raise
        return _refuse(str(error))
    except ExperimentError as error:
        _refuse(str(error))
        return error.exit_code


def _list(chosen: Mapping[str, Item]) -> int:
    """Print the items by phase."""
    from bench.gpu import plan

    if not chosen:
        return _refuse("--case: no item matches")
    for phase, mine in plan.phases_of(chosen):
        if mine:
            print(f"{phase.name}:", *(f"  {item.name}" for item in mine), sep="\n")
    return 0


def _refuse(reason: str) -> int:
    print(f"gpu_suite.py: {reason}", file=sys.stderr)
    return 2


def _wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the options; None if nothing is."""
    from bench.gpu import plant, variants

    if options.minutes is not None and not options.minutes > 0:
        return f"--minutes: expected more than 0, got {options.minutes}"
    if options.jobs is not None and options.jobs < 0:
        return f"--jobs: expected at least 0, got {options.jobs}"
    if options.variant is not None and options.variant not in variants.NAMES:
        return f"--variant: expected one of {', '.join(variants.NAMES)}, got {options.variant!r}"
    for planted in options.plant:
        reason = plant.wrong_use(planted)
        if reason is not None:
            return reason
    if options.out is None and not (options.list or options.child or options.sanitized):
        return "--out FOLDER is required"
    return None


def _prepare(device: str) -> None:
    """What must stand in the environment before PyTorch and Triton are loaded."""
    # cuBLAS needs it to give the same bits each time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # to judge the assembler is the purpose
    os.environ["EGNN_FAST_ANY_ASSEMBLER"] = "1"
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
    sections = (options.only,) if options.only else ("smoke", "checks", "times")
    found = {name: item for name, item in known.items() if item.section in sections}
    if options.only == "times":  # what the times rest on
        found = {n: i for n, i in known.items() if n.startswith("at full size: ")} | found
    if options.case:
        found = {
            name: item
            for name, item in found.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.case)
        }
    return found

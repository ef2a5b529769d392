"""Small cases under NVIDIA's compute-sanitizer: bad addresses, and races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu import smoke, triage
from bench.gpu.checks import at
from bench.gpu.children import child_command, end_with_parent
from bench.gpu.setting import FAIL, LEFT_OUT, Item, Outcome, Setting, matmul
from bench.gpu.variants import NO_WGMMA, OWN

LIMIT = 75  # seconds
EDGES = 2000
DONE = "all cases ran"
_SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error"),
}
_FIRST = {"memcheck": "Invalid", "racecheck": "hazard"}


class Check(NamedTuple):
    """A tool of compute-sanitizer, and the smoke case that it runs on, cut to few edges."""

    tool: str
    case: str
    precision: str
    variant: str

    @property
    def name(self) -> str:
        """Of its item."""
        return f"{self.tool}: {self.case}: {self.precision}"


# racecheck takes what wgmma's own unit reads and writes for races: without wgmma it can be trusted
CHECKS = (
    Check("memcheck", "all options", "bf16", OWN),
    Check("memcheck", "H 64", "highest", NO_WGMMA),
    Check("racecheck", "H 64", "bf16", NO_WGMMA),
)


def items(setting: Setting) -> Iterator[Item]:
    """All of them."""
    for check in CHECKS:
        run = partial(_run, check)
        yield Item(check.name, "smoke", run, 30, LIMIT + 15, gigabytes=2, variant=check.variant)


def _run(check: Check, setting: Setting) -> Outcome:
    tool = shutil.which("compute-sanitizer")
    if not setting.on_gpu:
        return Outcome(LEFT_OUT, "needs a GPU")
    if tool is None:
        return Outcome(LEFT_OUT, "no compute-sanitizer on the PATH")
    child = [*child_command(setting)[:2], "--sanitized", check.name]
    # the compiler's processes are not looked at; a start beside others may take long
    options = ["--tool", check.tool, "--target-processes", "application-only",
               "--launch-timeout", "0"]  # fmt: skip
    if check.tool == "memcheck":  # failed queries of the driver by libraries are no kernel errors
        options += ["--report-api-errors", "no"]
    command = [tool, *options, *child]
    # blocks of a memory pool lie side by side: what is read beyond one of them is in another
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment,
            timeout=LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome(LEFT_OUT, f"not done after {LIMIT} s")
    return outcome_of(check.tool, done.returncode, done.stdout + done.stderr)


def outcome_of(tool: str, status: int, said: str) -> Outcome:
    """What a run of compute-sanitizer means."""
    errors = [int(count) for count in _SUMMARY[tool].findall(said)]
    last = " ".join(said[-400:].split())
    if sum(errors) > 0:
        first = next((line for line in said.splitlines() if _FIRST[tool] in line), last)
        return Outcome(FAIL, f"{sum(errors)} errors: {' '.join(first.split())}")
    if not errors:
        return Outcome(LEFT_OUT, f"compute-sanitizer did not run (status {status}): {last}")
    if status or DONE not in said:
        return Outcome(FAIL, f"the cases ended with status {status}: {last}")
    return Outcome()


def sanitized(name: str, setting: Setting) -> int:
    """What runs under the tool: kernels alone, nothing compared."""
    end_with_parent()  # the tool, when it takes too long
    (check,) = (check for check in CHECKS if check.name == name)
    wanted = (check.case, check.precision)
    (found,) = (s for s in smoke.cases(setting) if (s.name, s.precision) == wanted)
    # few blocks for few programs: more would take minutes
    case = replace(found.case, edges=EDGES, nodes=200)
    problem = at(case.edge_pass(torch.float32, setting.device), check.precision, setting.device)
    with matmul(check.precision):
        triage.first_order(problem, "triton")
    torch.cuda.synchronize()
    print(DONE, file=sys.stderr)
    return 0

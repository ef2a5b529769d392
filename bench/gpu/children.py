"""Runs items in processes of their own.

What breaks a CUDA context, or hangs, takes one item with it; and kernels compile side by side.
A child reads names, a line each, and answers each by a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch

from bench.gpu.setting import FAIL, SKIP, Item, Outcome, Setting

MARK = "@@ "  # before an answer: whatever else is printed is not one
BROKEN = 3  # exit status of a child whose CUDA context is
GRACE = 20.0  # seconds beyond the deadline for what was begun before
PATIENCE = 10.0  # with the interpreter
_TAIL = 400  # characters of what a dying child said
Done = Callable[[Item, Outcome, float], None]


def run_here(item: Item, setting: Setting) -> Outcome:
    """Run an item in this process; an exception is a failure."""
    try:
        return item.run(setting)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(f"{type(error).__name__}: {error}".split())[:_TAIL]
        return Outcome(FAIL, f"{line} ({Path(place.filename).name}:{place.lineno})")
    finally:
        if setting.on_gpu and torch.cuda.is_available():
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


def serve(items: Mapping[str, Item], setting: Setting, source: IO[str], target: IO[str]) -> int:
    """A child's life: names in, outcomes out; the exit status."""
    for line in source:
        outcome = run_here(items[line.strip()], setting)
        broken = _broken(setting)
        if broken is not None:
            outcome.fail(f"CUDA cannot go on: {broken}")
        target.write(MARK + json.dumps(outcome.record()) + "\n")
        target.flush()
        if broken is not None:
            return BROKEN
    return 0


def _broken(setting: Setting) -> str | None:
    """The error that every further call of CUDA in this process would give."""
    if not setting.on_gpu:
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return " ".join(str(error).split())[:_TAIL]
    return None


class _Child:
    """A process that runs one item after the other."""

    def __init__(self, command: Sequence[str]) -> None:
        # open as long as the process runs
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.lines.put(line[len(MARK) :])
        self.lines.put(None)

    def ask(self, name: str, limit: float) -> tuple[Outcome, bool]:
        """The outcome of an item, and whether this child can run another."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
        except OSError:
            line = None
        except queue.Empty:
            return Outcome(FAIL, f"not done after {limit:.0f} s, so it was ended"), False
        if line is None:
            status = self.process.wait()
            return Outcome(FAIL, f"its process ended with status {status}: {self._said()}"), False
        return Outcome(**json.loads(line)), self.process.poll() is None

    def _said(self) -> str:
        self.errors.seek(0)
        return " ".join(self.errors.read()[-_TAIL:].split()) or "it said nothing"

    def end(self) -> None:
        """Let it go; one that does not is killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def run(
    items: Sequence[Item],
    setting: Setting,
    *,
    jobs: int,
    deadline: float,
    done: Done,
    command: Sequence[str] = (),
) -> list[Item]:
    """Run items, those that must be alone after the others; those that time was too short for.

    Parameters
    ----------
    items : sequence of Item
        In the order of their importance.
    jobs : int
        Children at a time; 0 runs everything in this process.
    deadline : float
        By ``time.monotonic``: an item is begun only if it will probably end before.
    done : callable
        Told each outcome and its seconds, one at a time.
    command : sequence of str
        Starts a child.
    """
    together = [item for item in items if not item.alone]
    alone = [item for item in items if item.alone]
    left: list[Item] = []
    for group, count in ((together, jobs), (alone, min(jobs, 1))):
        left += _run_group(group, setting, count, deadline, done, command)
    return left


def _run_group(
    items: Sequence[Item], setting: Setting, jobs: int, deadline: float, done: Done,
    command: Sequence[str],
) -> list[Item]:  # fmt: skip
    waiting, left, lock = list(items), list[Item](), threading.Lock()
    failures: list[BaseException] = []

    def next_item() -> Item | None:
        with lock:
            while waiting and not failures:
                item = waiting.pop(0)
                if time.monotonic() + item.seconds <= deadline:
                    return item
                left.append(item)
        return None

    def work() -> None:
        child = None
        try:
            while (item := next_item()) is not None:
                begin = time.monotonic()
                if not jobs:
                    outcome, alive = run_here(item, setting), True
                else:
                    child = child or _Child(command)
                    limit = min(item.limit, max(item.seconds, deadline - begin + GRACE))
                    if not setting.on_gpu:  # limits are those of a GPU
                        limit = PATIENCE * item.limit
                    outcome, alive = child.ask(item.name, limit)
                with lock:
                    done(item, outcome, time.monotonic() - begin)
                if not alive and child is not None:
                    child.process.kill()
                    child.end()
                    child = None
        except BaseException as error:  # an interrupt, or results that cannot be written
            failures.append(error)
        finally:
            if child is not None:
                child.end()

    if jobs < 2:
        work()
    else:
        threads = [threading.Thread(target=work) for _ in range(min(jobs, len(items)))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            waiting.clear()  # after an interrupt nothing more is begun
    if failures:
        raise failures[0]
    return left


def child_command(setting: Setting) -> list[str]:
    """What starts a child with this setting."""
    script = Path(__file__).resolve().parent.parent / "gpu_suite.py"
    quick = ["--quick"] if setting.quick else []
    return [sys.executable, str(script), "--child", "--device", setting.device, *quick]


def skipped(reason: str) -> Outcome:
    """Of an item that was not run."""
    return Outcome(SKIP, reason)

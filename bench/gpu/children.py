"""Runs items in processes of their own.

What breaks a CUDA context, or hangs, takes one item with it; and kernels compile side by side.
A child reads names, a line each, and answers each by a line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
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

from bench.gpu import plant
from bench.gpu.setting import FAIL, LEFT_OUT, Item, Outcome, Setting
from bench.gpu.waiting import Queue

MARK = "@@ "  # before an answer: whatever else is printed is not one
BROKEN = 3  # exit status of a child whose CUDA context is broken
GRACE = 20.0  # seconds beyond the deadline for what was begun before
PATIENCE = 10.0  # factor on time limits with the interpreter
_TAIL = 400  # characters of what a dying child said
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
Done = Callable[[Item, Outcome, float], None]
Environments = Callable[[Item], dict[str, str]]


def run_here(item: Item, setting: Setting) -> Outcome:
    """Run an item in this process. An exception makes it fail, unless memory ran out."""
    try:
        with plant.planted(item.name, setting):
            return item.run(setting)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(f"{type(error).__name__}: {error}".split())[:_TAIL]
        line = f"{line} ({Path(place.filename).name}:{place.lineno})"
        if out_of_memory(error):
            return Outcome(LEFT_OUT, line, out_of_memory=True)
        return Outcome(FAIL, line)
    finally:
        if setting.on_gpu and torch.cuda.is_available():
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that the GPU's memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def serve(items: Mapping[str, Item], setting: Setting, source: IO[str], target: IO[str]) -> int:
    """A child's life: names in, outcomes out; the exit status."""
    end_with_parent()
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


def end_with_parent() -> None:
    """Let this process end with its parent, which may be killed while an item runs."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None) -> None:
        # open as long as the process runs
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            encoding="utf-8", errors="replace", env=environment, start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.lines.put(line[len(MARK) :])
        self.lines.put(None)

    def ask(self, name: str, limit: float, whole: bool = True) -> tuple[Outcome, bool]:
        """The outcome of an item, and whether this child can run another.

        What takes longer than the limit has failed, if that is the ``whole`` time that it may take.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=limit)
        except OSError:
            line = None
        except queue.Empty:
            if whole:
                reason = f"not done after {limit:.0f} s, so it was ended"
                return Outcome(FAIL, reason, hung=True), False
            return Outcome(LEFT_OUT, f"ended after {limit:.0f} s: the run's time was over"), False
        if line is None:
            code = self.process.wait()
            return Outcome(FAIL, f"its process ended with status {code}: {self._said()}"), False
        return Outcome(**json.loads(line)), self.process.poll() is None

    def _said(self) -> str:
        self.errors.seek(0)
        return " ".join(self.errors.read()[-_TAIL:].split()) or "it said nothing"

    def end(self, kill: bool = False) -> None:
        """Let it go; one that does not is killed."""
        assert self.process.stdin is not None
        if kill:
            self._kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        self.errors.close()

    def _kill(self) -> None:
        """With all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def run(
    items: Sequence[Item],
    setting: Setting,
    *,
    jobs: int,
    deadline: float,
    done: Done,
    command: Sequence[str] = (),
    gigabytes: float = float("inf"),
    environment: Environments | None = None,
) -> list[Item]:
    """Run items, those that must be alone after the others.

    Returns those that time was too short for. What runs out of memory beside others is run again
    alone.

    Parameters
    ----------
    items : sequence of Item
        In the order of their importance.
    jobs : int
        Children at a time; 0 runs everything in this process, but for items with a variant.
    deadline : float
        By ``time.monotonic``: an item is begun only if it will probably end before.
    done : callable
        Told each outcome and its seconds, one at a time.
    command : sequence of str
        Starts a child.
    gigabytes : float
        What runs side by side takes no more GPU memory.
    environment : callable, optional
        The environment of an item's child.
    """
    work = _Work(setting, deadline, done, command, gigabytes, environment)
    together = [item for item in items if not item.alone]
    left = work.run(together, jobs)
    again, work.again = work.again, None
    return left + work.run([*(again or ()), *(i for i in items if i.alone)], min(jobs, 1))


class _Work:
    """Workers, each with a child of its own, that share a queue."""

    def __init__(
        self, setting: Setting, deadline: float, done: Done, command: Sequence[str],
        gigabytes: float, environment: Environments | None,
    ) -> None:  # fmt: skip
        self.setting, self.deadline, self.done, self.command = setting, deadline, done, command
        self.gigabytes = gigabytes
        self.environment: Environments = environment or (lambda item: dict(os.environ))
        self.again: list[Item] | None = []  # what ran out of memory; None: it ran alone
        self.lock = threading.Lock()
        self.failures: list[BaseException] = []

    def run(self, items: Sequence[Item], jobs: int) -> list[Item]:
        """Run items; returns those that were left."""
        waiting = Queue(items, self.deadline, self.gigabytes)
        jobs = max(jobs, 1) if any(item.variant for item in items) else jobs
        if jobs < 2:
            self._worker(waiting, jobs > 0)
        else:
            count = min(jobs, len(items))
            threads = [
                threading.Thread(target=self._worker, args=(waiting, True)) for _ in range(count)
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    thread.join()
            finally:
                waiting.close()  # after an interrupt nothing more is begun
        if self.failures:
            raise self.failures[0]
        return waiting.left

    def _worker(self, waiting: Queue, in_child: bool) -> None:
        child: _Child | None = None
        variant = ""
        try:
            while (item := waiting.take(variant)) is not None:
                begin, alive = time.monotonic(), True
                try:
                    if in_child:
                        if child is None or variant != item.variant:
                            if child is not None:
                                child.end()
                            child = _Child(self.command, self.environment(item))
                        limit, whole = self._limit(item, begin)
                        outcome, alive = child.ask(item.name, limit, whole)
                    else:
                        outcome = run_here(item, self.setting)
                finally:
                    waiting.give_back(item)
                variant = item.variant
                self._tell(item, outcome, time.monotonic() - begin)
                if not alive and child is not None:
                    child.end(kill=True)
                    child = None
        except BaseException as error:  # an interrupt, or results that cannot be written
            self.failures.append(error)
            waiting.close()
        finally:
            if child is not None:
                child.end()

    def _limit(self, item: Item, begin: float) -> tuple[float, bool]:
        """Seconds that an item may take, and whether that is all that it ever may."""
        if not self.setting.on_gpu:  # limits are those of a GPU
            return PATIENCE * item.limit, True
        limit = max(item.seconds, self.deadline - begin + GRACE)
        return min(item.limit, limit), item.limit <= limit

    def _tell(self, item: Item, outcome: Outcome, seconds: float) -> None:
        with self.lock:
            if outcome.out_of_memory and self.again is not None:
                self.again.append(item)
                return
            if outcome.out_of_memory:
                outcome.reason = f"out of memory even alone: {outcome.reason}"
            self.done(item, outcome, seconds)


def child_command(setting: Setting) -> list[str]:
    """What starts a child with this setting."""
    script = Path(__file__).resolve().parent.parent / "gpu_suite.py"
    quick = ["--quick"] if setting.quick else []
    planted = [word for each in setting.planted for word in ("--plant", each)]
    return [sys.executable, str(script), "--child", "--device", setting.device, *quick, *planted]

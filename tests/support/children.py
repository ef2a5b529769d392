"""What tests run in processes of their own: `run("name")` calls a function of this file there."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext, SpawnContext

    from egnn_fast.checks.cases import Problem

# what comes from PyTorch is imported where it is used: one of the children needs to be first

TIMEOUT = 120  # seconds, after which a child hangs
FORKS = 5


def run(name: str, env: Mapping[str, str] | None = None, timeout: float = TIMEOUT) -> str:
    """Call a function in a fresh process; its output. A hang or a failure there is one here."""
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    code += f"import children; children.{name}()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors
    return out.strip()


@functools.cache
def problems() -> tuple[Problem, ...]:
    """Made before a fork: PyTorch's own operations on much data would wait for threads after it."""
    import torch

    from egnn_fast import Options
    from egnn_fast.checks.cases import Case

    cases = (
        Case("uniform", nodes=500, edges=20_000, hidden=32),
        Case("hub", "hub", nodes=200, edges=3000, hidden=9, options=Options(attention=True)),
        Case("complete", "complete", sizes=(40, 30), hidden=24, velocity=True),
    )
    return tuple(case.layer(dtype) for case in cases for dtype in (torch.float32, torch.float64))


def step() -> str:
    """The bits of layers forward and backward, beside which PyTorch starts no threads."""
    import torch

    digest = hashlib.sha256()
    for problem in problems():
        leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
        out = problem.run(leaves, "cpu", 0)
        total = out["h"][0, 0] + out["x"][0, 0]
        grads = torch.autograd.grad(total, [leaves["h"], leaves["edge_w1"], leaves["x"]])
        for t in (out["h"].detach(), out["x"].detach(), *grads):
            digest.update(t.numpy().tobytes())
    return digest.hexdigest()


def print_bits() -> None:
    print(step())


def print_bits_on_two_threads() -> None:
    import torch

    torch.set_num_threads(2)
    print(step())


def print_bits_without_openmp() -> None:
    """The kernels look for OpenMP before PyTorch has brought it, and start their own threads."""
    core = import_module("egnn_fast._core")
    assert "torch" not in sys.modules
    assert core.thread_source() == "std::thread"
    print_bits_on_two_threads()


def fork(call: Callable[[], bool]) -> int:
    """The exit status of a forked child: 0 where the call is true there."""
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT // 4)  # ends a child that hangs
        try:
            os._exit(0 if call() else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def threads() -> int:
    """The threads of this process."""
    return len(os.listdir("/proc/self/task"))


def fork_after_threads() -> None:
    import torch

    torch.set_num_threads(2)
    right = step()
    if sys.platform == "linux":
        assert threads() > 1

    def same() -> bool:
        assert step() == right
        return sys.platform != "linux" or threads() == 1

    assert [fork(same) for _ in range(2)] == [0, 0]
    assert fork(lambda: fork(same) == 0) == 0  # a child of a child
    assert step() == right  # the parent goes on


def fork_during_a_kernel() -> None:
    import torch

    from egnn_fast.checks.cases import Case
    from egnn_fast.runtime import native

    core = native.core
    assert core is not None, native.load_error
    torch.set_num_threads(2)
    right = step()
    long = Case("long", nodes=5000, edges=400_000, hidden=128).edge_pass(torch.float32)
    started = threading.Event()

    def work() -> None:
        torch.set_num_threads(2)
        started.set()
        long.run(long.leaves, "cpu", 0)

    for _ in range(FORKS):
        started.clear()
        thread = threading.Thread(target=work)
        before = core.calls()
        thread.start()
        started.wait()
        time.sleep(0.05)
        # the call has begun and is not counted yet, so the child begins in the middle of it
        assert fork(lambda calls=before: core.calls() == calls and step() == right) == 0  # type: ignore[misc]
        thread.join()
        assert core.calls()[0] == before[0] + 1


def send_bits(queue: multiprocessing.Queue[str]) -> None:
    import torch

    torch.set_num_threads(2)
    queue.put(step())


def two_processes(context: ForkContext | SpawnContext) -> None:
    import torch

    torch.set_num_threads(2)
    right = step()
    queue = context.Queue()
    workers = [context.Process(target=send_bits, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=TIMEOUT / 2) for _ in workers] == [right] * 2
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert step() == right


def forked_processes() -> None:
    two_processes(multiprocessing.get_context("fork"))


def spawned_processes() -> None:
    two_processes(multiprocessing.get_context("spawn"))


def data_loader() -> None:
    """Workers of a DataLoader run layers, while the parent does too."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Layers(Dataset[str]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> str:
            return step()

    torch.set_num_threads(2)
    right = step()
    batches = DataLoader(Layers(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for found in batches:
        assert found == right
        assert step() == right


def check_instruction_set() -> None:
    """The set that the environment names is the one that runs, and it is right."""
    import torch
    from cases import ISA_CASES, LAYER_CASES

    from egnn_fast import backends, checks

    name = os.environ["EGNN_FAST_CPU_ISA"]
    assert backends.instruction_set("cpu") == name
    assert f"({name})" in {line.name: line.reason for line in backends.info()}["cpu"]
    torch.set_num_threads(1)
    problems = [(case.name, case.edge_pass(torch.float64)) for case in ISA_CASES[::4]]
    problems += [(case.name, case.layer(torch.float64)) for case in LAYER_CASES[::4]]
    for label, problem in problems:
        for row in checks.compare(problem, label, ["cpu"], torch.float64):
            assert row.passed, row
    print(len(problems))


def launched_kernels() -> None:
    """Each kernel of a training step: its hash as launched, and as compiled offline."""
    import json
    from typing import Any

    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from bench.offline import compile
    from bench.offline import configurations as kernels
    from egnn_fast import Options
    from egnn_fast.backends import triton as triton_backend
    from egnn_fast.operators.signature import encode_options

    driver.set_active(compile._NoDevice(kernels.TARGETS["sm_90"]))
    launch = JITFunction.run
    seen: dict[str, str] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        found = launch(self, *args, grid=grid, warmup=True, **kwargs)
        seen.setdefault(self.__name__, found.hash)
        return found

    def run(hidden: int) -> None:
        # sizes for which Triton has no code of their own: no multiples of 16, none 1
        nodes, edges, dim = 30, 203, 3
        rowptr = torch.linspace(0, edges, nodes + 1).long()
        matrix, vector = torch.randn(hidden, hidden), torch.randn(hidden)
        args = (
            torch.randn(nodes, 2 * hidden).bfloat16(), torch.randn(nodes, dim), None, None,
            vector, None, matrix, vector, None, None, matrix, vector, vector,
            rowptr, torch.randint(nodes, (edges,), dtype=torch.int32), None, None,
            *encode_options(Options()), "triton", "bf16",
        )  # fmt: skip
        needed = [t is not None for t in args[:13]]
        cotangents = torch.randn(nodes, hidden), torch.randn(nodes, dim)
        triton_backend.messages(*args)
        triton_backend.messages_backward(*cotangents, *args, needed)

    def run_layer(hidden: int) -> None:
        nodes, edges, dim = 30, 203, 3
        rowptr = torch.linspace(0, edges, nodes + 1).long()
        matrix, vector = torch.randn(hidden, hidden), torch.randn(hidden)
        args = (
            torch.randn(nodes, hidden), torch.randn(nodes, dim), None, None, None, None,
            torch.rand(nodes), torch.randn(hidden, 2 * hidden + 1), vector, matrix, vector,
            torch.randn(hidden, 2 * hidden), vector, matrix, vector, None, None,
            matrix, vector, vector[None], None, None, None, None,
            rowptr, torch.randint(nodes, (edges,), dtype=torch.int32), None, None,
            *encode_options(Options()), 1.0, True, False, "triton", "bf16", 0,
        )  # fmt: skip
        triton_backend.layer(*args)

    JITFunction.run = compile_only
    call: Any = triton_backend.call.Call
    call.programs, call.multiprocessors = property(lambda self: 3), property(lambda self: 0)
    run_layer(64)
    run(64)
    run(kernels.WIDE_WIDTH)
    torch.use_deterministic_algorithms(True)
    run(64)

    def offline_hash(name: str) -> str:
        hidden = kernels.WIDE_WIDTH if name in kernels.STAGED_KERNELS else 64
        kernel, args, keywords = kernels.arguments(kernels.Configuration(name, hidden=hidden))
        found = launch(kernel, *args, grid=(1,), warmup=True, **keywords)
        return str(found.hash)

    print(json.dumps({name: (seen.get(name), offline_hash(name)) for name in kernels.KERNELS}))


def specialisations() -> None:
    """How many keys Triton has for each kernel, over layers that differ in one thing."""
    import json
    from dataclasses import replace

    # the checkout's own folder, not installed
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    import torch

    from bench.offline.specialisations import recorded
    from egnn_fast import Options
    from egnn_fast.checks.cases import Case

    plain = Case("plain", nodes=9, edges=20, hidden=16, features=6)
    coordinates = [
        Options(), Options(coord_norm="unit"), Options(coord_norm=0.7), Options(coord_tanh=True),
        Options(coord_clamp=0.1), Options(coord_norm=0.7, coord_tanh=True, coord_clamp=0.1),
    ]  # fmt: skip
    activations = [Options(activation=name) for name in ("silu", "relu", "leaky_relu")]
    groups = {
        "coordinates": [replace(plain, options=options) for options in coordinates],
        "activation": [replace(plain, options=options) for options in activations],
        "sizes": [
            replace(plain, hidden=hidden, features=features, attrs=attrs)
            for hidden, features, attrs in ((17, 6, 1), (24, 7, 1), (31, 6, 2), (31, 8, 3))
        ],
        "staged": [replace(plain, hidden=256, options=options) for options in coordinates],
    }
    found = {}
    for name, cases in groups.items():
        with recorded() as keys, torch.autocast("cpu", torch.bfloat16):
            for case in cases:
                problem = case.layer(torch.float32)
                leaves = {k: t.requires_grad_() for k, t in problem.leaves.items()}
                outputs = problem.run(leaves, "triton", 0)
                torch.stack([t.sum() for t in outputs.values()]).sum().backward()
        found[name] = {kernel: len(own) for kernel, own in keys.items()}
    print(json.dumps(found))

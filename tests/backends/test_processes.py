"""Forked and spawned processes, several callers at once, and what the environment asks for."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import children
import pytest
import torch
from bits import assert_same_bits, bits
from cases import DTYPES, EVERYTHING

from egnn_fast import Options
from egnn_fast.checks.cases import Case, Problem
from egnn_fast.runtime import native

pytestmark = pytest.mark.native
# of sizes from one task to many, so that callers come and go
CALLS = (
    Case("one task", nodes=6, edges=20, hidden=8),
    Case("uniform", nodes=300, edges=6000, attrs=1),
    Case("wide", nodes=100, edges=1000, hidden=130, dim=2, mask="soft"),
    Case("hub", "hub", nodes=80, edges=3000, hidden=33, options=EVERYTHING),
    Case("complete", "complete", sizes=(30, 1, 40), hidden=16, options=Options(attention=True)),
    Case("no edges", nodes=20, edges=0),
)


def run_together(callers: list[Callable[[], None]]) -> None:
    """Start all at once; raise what one of them raised."""
    failures: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # to be raised where pytest sees it
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.alone
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_callers_at_once_get_the_bits_of_one_alone(threads: int) -> None:
    """Different sizes and dtypes, forward and backward, edge passes and layers."""
    torch.set_num_threads(1)
    problems = [make(dtype) for c in CALLS for make in (c.edge_pass, c.layer) for dtype in DTYPES]
    right = [bits(problem) for problem in problems]

    def caller(seed: int) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(threads)
            for k in random.Random(seed).sample(range(len(problems)), len(problems)):
                assert_same_bits(bits(problems[k]), right[k])

        return call

    run_together([caller(seed) for seed in range(5)])


@pytest.mark.alone
def test_a_graph_is_shared_by_callers() -> None:
    """What a graph computes once and keeps may be asked for by all at the same time."""
    torch.set_num_threads(1)
    case = Case("shared", nodes=200, edges=4000, attrs=1, mask="soft")
    right = bits(case.layer(torch.float32))
    for _ in range(3):
        problem: Problem = case.layer(torch.float32)
        run_together([lambda p=problem: assert_same_bits(bits(p), right) for _ in range(4)])  # type: ignore[misc]


@pytest.mark.alone
def test_the_interpreter_runs_while_a_kernel_does() -> None:
    """The GIL is released: another Python thread gets on during one long call."""
    torch.set_num_threads(1)
    problem = Case("long", nodes=5000, edges=300_000, hidden=128).edge_pass(torch.float32)
    counted, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            counted[0] += 1

    def rate(call: Callable[[], object]) -> tuple[float, float]:
        start, before = time.perf_counter(), counted[0]
        call()
        seconds = time.perf_counter() - start
        return (counted[0] - before) / seconds, seconds

    thread = threading.Thread(target=count)
    thread.start()
    try:
        during, seconds = rate(lambda: problem.run(problem.leaves, "cpu", 0))
        alone, _ = rate(lambda: time.sleep(seconds))
    finally:
        done.set()
        thread.join()
    assert seconds > 0.05, "too short to tell"
    assert during > 0.25 * alone


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
@pytest.mark.parametrize(
    "name", ["fork_after_threads", "fork_during_a_kernel", "forked_processes", "data_loader"]
)
def test_forked_children_compute_the_same_bits(name: str) -> None:
    """Alone, for the threads did not come along; none hangs."""
    children.run(name)


@pytest.mark.alone
def test_spawned_children_compute_the_same_bits() -> None:
    children.run("spawned_processes")


@pytest.mark.alone
def test_threads_may_be_fewer_than_asked_for_and_come_from_elsewhere() -> None:
    right = children.step()
    for name, env in (
        ("print_bits", {"OMP_NUM_THREADS": "1"}),
        ("print_bits_on_two_threads", {"OMP_THREAD_LIMIT": "1"}),
        ("print_bits_on_two_threads", {"OMP_DYNAMIC": "true"}),
        ("print_bits_without_openmp", {}),
    ):
        assert children.run(name, env) == right, f"{name} {env}"


@pytest.mark.alone
@pytest.mark.parametrize("threads", [7, 33, 70])
def test_more_threads_than_tasks_in_flight(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks in flight backward depend on the number of threads, the bits do not."""
    torch.set_num_threads(1)
    problems = [
        make(dtype)
        for case in (
            Case("wide", nodes=300, edges=9000, hidden=200, attrs=1, mask="soft"),
            Case("hub", "hub", nodes=50, edges=9000, hidden=200, options=EVERYTHING),
        )
        for make in (case.edge_pass, case.layer)
        for dtype in DTYPES
    ]
    right = [bits(problem) for problem in problems]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for problem, kept in zip(problems, right, strict=True):
        assert_same_bits(bits(problem), kept)


@pytest.mark.parametrize("face", ["edge_pass", "layer"])
def test_no_memory_is_an_error_and_leaves_nothing_behind(
    face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem: Problem = getattr(Case("no memory", nodes=5, edges=9, hidden=2500), face)(
        torch.float64
    )
    right = bits(problem)
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    out = problem.run(leaves, "cpu", 0)
    total = torch.stack([t.sum() for t in out.values()]).sum()
    with monkeypatch.context() as patch:
        # scratch for so many threads is more than there are addresses
        patch.setattr(torch, "get_num_threads", lambda: 2**26)
        with pytest.raises(MemoryError):
            problem.run(problem.leaves, "cpu", 0)
        with pytest.raises(MemoryError):
            torch.autograd.grad(total, leaves["x"])
    assert_same_bits(bits(problem), right)


@pytest.mark.values
def test_environment_forces_an_instruction_set() -> None:
    core = native.core
    assert core is not None, native.load_error
    for name in core.supported_instruction_sets():
        out = children.run("check_instruction_set", {"EGNN_FAST_CPU_ISA": name})
        assert int(out) > 25


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_environment_names_an_unknown_instruction_set(name: str) -> None:
    code = "import torch\nfrom egnn_fast.checks.cases import Case\n"
    code += "p = Case('one').edge_pass(torch.float32)\np.run(p.leaves, 'cpu', 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "EGNN_FAST_CPU_ISA": name}, timeout=children.TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 1
    wanted = "expected 'portable', 'avx2' or 'avx512'"
    assert f"EGNN_FAST_CPU_ISA: {wanted}, got '{name}'" in done.stderr.splitlines()[-1]

"""Same inputs, same bits: over runs, threads and callers; and forked children do not hang."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from cases import CASES, DTYPES, EVERYTHING, LAYER_CASES
from torch import Tensor

from egnn_fast import Options, _native
from egnn_fast._cases import Case, Problem

pytestmark = pytest.mark.native
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# many tasks and waves of them, rows that span tasks, few rows, implicit edges
LARGE = (
    Case("uniform", nodes=2000, edges=50_000, hidden=64, attrs=2, mask="soft"),
    Case("power law", "power", 1000, 50_000, hidden=32, options=EVERYTHING, attrs=1),
    Case("hub", "hub", 500, 50_000, hidden=16, options=EVERYTHING, mask="soft"),
    Case("isolated", "isolated", 3000, 50_000, hidden=24, options=Options(coord_norm=1.0)),
    Case("complete", "complete", sizes=(150, 1, 100, 80), hidden=33, attrs=1, mask="soft"),
    Case("no head", nodes=2000, edges=50_000, hidden=48, options=Options(coord_agg=None)),
)
SMALL = tuple(case for case in (*CASES, *LAYER_CASES) if case.num_nodes > 1)


def bits(problem: Problem, backend: str = "cpu") -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}
    out = problem.run(leaves, backend, 0)
    draw = torch.Generator().manual_seed(0)
    towards = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in out.values()]
    grads = torch.autograd.grad(list(out.values()), list(leaves.values()), towards)
    named = {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
    return {k: t.detach() for k, t in out.items()} | named


def assert_same_bits(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, t in right.items():
        assert torch.equal(found[name], t), name


@every_dtype
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_threads_do_not_change_the_bits(case: Case, dtype: torch.dtype) -> None:
    problem = case.edge_pass(dtype)
    torch.set_num_threads(1)
    right = bits(problem)
    for threads in (2, 3, 4, 2):
        torch.set_num_threads(threads)
        assert_same_bits(bits(problem), right)


@every_dtype
def test_threads_do_not_change_the_bits_of_any_case(dtype: torch.dtype) -> None:
    for case in SMALL:
        problem = case.edge_pass(dtype)
        torch.set_num_threads(1)
        right = bits(problem)
        torch.set_num_threads(2)
        assert_same_bits(bits(problem), right)


@every_dtype
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_runs_do_not_change_the_bits_of_a_layer(case: Case, dtype: torch.dtype) -> None:
    problem = case.layer(dtype)
    torch.set_num_threads(2)
    right = bits(problem)
    for _ in range(2):
        assert_same_bits(bits(problem), right)


@every_dtype
def test_threads_do_not_change_the_bits_of_the_layer_operator(dtype: torch.dtype) -> None:
    """The whole layer is ours too; what PyTorch computes around it (masks, means) is small."""
    for case in LARGE:
        problem = case.layer(dtype)
        torch.set_num_threads(1)
        right = bits(problem)
        torch.set_num_threads(2)
        assert_same_bits(bits(problem), right)


def test_every_instruction_set_is_deterministic() -> None:
    core = _native.core
    assert core is not None, _native.load_error
    problem = LARGE[1].edge_pass(torch.float32)
    for name in core.supported_instruction_sets():
        core.set_instruction_set(name)
        torch.set_num_threads(1)
        right = bits(problem)
        torch.set_num_threads(2)
        assert_same_bits(bits(problem), right)


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_callers_get_the_same_bits(threads: int) -> None:
    torch.set_num_threads(threads)
    problem = Case("callers", nodes=300, edges=6000, attrs=1).edge_pass(torch.float32)
    right = bits(problem)
    failures: list[BaseException] = []

    def caller() -> None:
        try:
            torch.set_num_threads(threads)
            for _ in range(5):
                assert_same_bits(bits(problem), right)
        except BaseException as error:  # to be raised where pytest sees it
            failures.append(error)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not failures, failures


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


FORK = """
import os, signal
import torch
from egnn_fast._cases import Case

torch.set_num_threads(2)
# whole layers: beside our operator PyTorch computes nothing that would start its own threads
case = Case("fork", nodes=500, edges=20_000, hidden=32)
problem = case.layer(torch.float32)
leaves = {k: t.clone().requires_grad_() for k, t in problem.leaves.items()}

def step():
    out = problem.run(leaves, "cpu", 0)
    total = out["h"][0, 0] + out["x"][0, 0]
    grads = torch.autograd.grad(total, [leaves["h"], leaves["edge_w1"]])
    return [out["h"].detach(), out["x"].detach(), *grads]

right = step()  # starts the threads that a child does not have
child = os.fork()
if child == 0:
    signal.alarm(30)  # a hang ends the child
    same = all(torch.equal(a, b) for a, b in zip(step(), right))
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert all(torch.equal(a, b) for a, b in zip(step(), right))  # the parent goes on
print(status)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_forked_child_computes_the_same_bits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "0", done.stderr

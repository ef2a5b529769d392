"""Same inputs, same bits: over runs and threads; test_processes.py has callers and processes."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits, bits
from cases import CASES, DTYPES, EVERYTHING, LAYER_CASES

from egnn_fast import Options, set_activation_budget
from egnn_fast.checks.cases import Case
from egnn_fast.operators.budget import DEFAULT_BUDGET
from egnn_fast.runtime import native

pytestmark = [pytest.mark.native, pytest.mark.alone]
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
# without the extension, the one name fails the tests
INSTRUCTION_SETS = ["portable"] if native.core is None else native.core.supported_instruction_sets()


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
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_threads_do_not_change_the_bits_of_any_case(isa: str, dtype: torch.dtype) -> None:
    """All cases on all instruction sets, which is also what the sanitizers are to see."""
    assert native.core is not None, native.load_error
    native.core.set_instruction_set(isa)
    problems = [case.edge_pass(dtype) for case in (*CASES, *LAYER_CASES)]
    problems += [case.layer(dtype) for case in LAYER_CASES]
    # activations kept for the backward, and computed again
    for num_bytes, some in ((DEFAULT_BUDGET, problems), (0, problems[-len(LAYER_CASES) :])):
        with set_activation_budget(num_bytes):
            for problem in some:
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
@pytest.mark.parametrize("num_bytes", [0, 2**30])
def test_threads_do_not_change_the_bits_of_the_layer_operator(
    num_bytes: int, dtype: torch.dtype
) -> None:
    """The whole layer is ours too; what PyTorch computes around it (masks, means) is small."""
    with set_activation_budget(num_bytes):
        for case in LARGE:
            problem = case.layer(dtype)
            torch.set_num_threads(1)
            right = bits(problem)
            torch.set_num_threads(2)
            assert_same_bits(bits(problem), right)


def test_every_instruction_set_is_deterministic() -> None:
    core = native.core
    assert core is not None, native.load_error
    problem = LARGE[1].edge_pass(torch.float32)
    for name in core.supported_instruction_sets():
        core.set_instruction_set(name)
        torch.set_num_threads(1)
        right = bits(problem)
        torch.set_num_threads(2)
        assert_same_bits(bits(problem), right)

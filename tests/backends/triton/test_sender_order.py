"""Under `torch.use_deterministic_algorithms` the sums over senders run in the order of edges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from bits import assert_same_bits, bits
from cases import EVERYTHING, INTERPRETED_BACKENDS, kernel_calls

from egnn_fast import Options, checks
from egnn_fast.checks.cases import Case

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.usefixtures("one_thread", "bfloat16", "deterministic"),
    pytest.mark.skipif(not INTERPRETED_BACKENDS, reason="Triton's wheels are for Linux alone"),
]
CASES = (
    Case("uniform", nodes=12, edges=100, attrs=2, mask="soft", options=EVERYTHING),
    Case("no head", nodes=9, edges=80, hidden=33, options=Options(coord_agg=None)),
    Case("hub", "hub", 9, 130, options=EVERYTHING),
    Case("power", "power", 5, 130, attrs=1),
    Case("complete, ragged", "complete", sizes=(1, 8, 0, 2, 5, 1, 3), attrs=1, mask="soft"),
    Case("complete, equal", "complete", sizes=(5,) * 4, options=EVERYTHING),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# edges that wait for their sum: all, or chunks that end within rows
every_chunk = pytest.mark.parametrize("chunk", [None, 48, 1])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The kernel that sums over senders."""
    from egnn_fast.kernels import sums

    counted = Counted(sums.sender_sums)
    monkeypatch.setattr(sums, "sender_sums", counted)
    return counted


def cut(case: Case, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let so many edges wait at once, in whole blocks; the number of chunks that this makes."""
    from egnn_fast.backends.triton import call
    from egnn_fast.kernels.blocks import blocks_for

    edges = case.build_graph().num_edges
    if chunk is None:
        return 1
    block = blocks_for("backward", "highest", max(16, case.hidden)).edges
    monkeypatch.setattr(call, "CHUNK_BYTES", chunk * 4 * (case.hidden + case.dim))
    return -(-edges // max(block, chunk // block * block))


@every_case
@every_chunk
@pytest.mark.usefixtures("poison")
def test_the_ordered_sums_are_right(
    case: Case, chunk: int | None, sums: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = cut(case, chunk, monkeypatch)
    assert (chunks > 1) == (chunk is not None)
    with kernel_calls(1, 1, backend="triton"):
        rows = list(
            checks.compare(case.edge_pass(torch.float32), case.name, ["triton"], torch.float32)
        )
    assert sums.launches == chunks
    failed = [
        f"{r.quantity}, {r.worst}: {r.error:.2e} > {r.bound:.2e}" for r in rows if not r.passed
    ]
    assert not failed, "\n".join(failed)


@every_case
@pytest.mark.parametrize("chunk", [None, 48])
def test_the_same_bits_again(
    case: Case, chunk: int | None, sums: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = cut(case, chunk, monkeypatch)
    problem = case.edge_pass(torch.float32)
    right = bits(problem, "triton")
    assert_same_bits(bits(problem, "triton"), right)
    # another graph of the same edges: nothing that was kept decides
    assert_same_bits(bits(replace(case).edge_pass(torch.float32), "triton"), right)
    assert sums.launches == 3 * chunks


@pytest.mark.parametrize("wanted", ["P", "Q", "x"])
def test_one_of_the_sums_alone(wanted: str, sums: Counted) -> None:
    problem = CASES[0].edge_pass(torch.float32)
    right = bits(problem, "triton")[f"gradient of {wanted}"]
    leaves = {k: t.clone().requires_grad_(k == wanted) for k, t in problem.leaves.items()}
    out = problem.run(leaves, "triton", 0)
    draw = torch.Generator().manual_seed(0)
    towards = [torch.randn(t.shape, generator=draw) for t in out.values()]
    torch.autograd.backward(list(out.values()), towards)
    found = leaves[wanted].grad
    assert found is not None
    assert torch.equal(found, right)
    assert sums.launches == 2


def test_without_gradients_of_nodes_nothing_is_summed_over_senders(sums: Counted) -> None:
    problem = CASES[0].edge_pass(torch.float32)
    nodes = ("P", "Q", "x")
    leaves = {k: t.clone().requires_grad_(k not in nodes) for k, t in problem.leaves.items()}
    with kernel_calls(1, 1, backend="triton"):
        torch.stack([t.sum() for t in problem.run(leaves, "triton", 0).values()]).sum().backward()
    assert sums.launches == 0


def test_only_where_it_is_asked_for(sums: Counted) -> None:
    torch.use_deterministic_algorithms(False)
    bits(CASES[0].edge_pass(torch.float32), "triton")
    assert sums.launches == 0

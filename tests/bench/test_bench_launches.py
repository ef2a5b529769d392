"""The model's count of launches, against what a pass launches through Triton's interpreter."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if sys.platform != "linux":
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from bench.offline import launches
from bench.offline.launches import Launches, launches_of
from egnn_fast.backends import triton as triton_backend
from egnn_fast.backends.triton import call, staged
from egnn_fast.operators.signature import encode_options
from egnn_fast.options import Options

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("one_thread")]
# of PyTorch's operations those that are no view of memory, nor memory alone; nor conversions, which
# on the CPU stand for products that a GPU makes of 16 bits
_LAUNCHED = {
    "mm", "bmm", "baddbmm_", "add_", "zeros", "zero_", "sub", "sum", "cat", "split_with_sizes_copy",
}  # fmt: skip
_NOT_LAUNCHED = {
    "view", "empty", "new_empty", "slice", "alias", "unbind", "t", "transpose", "expand",
    "_unsafe_view", "_to_copy", "detach",
}  # fmt: skip


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name in _LAUNCHED | _NOT_LAUNCHED, name
        found = func(*args, **(kwargs or {}))
        # a copy for each part
        self.count += len(found) if name == "split_with_sizes_copy" else name in _LAUNCHED
        return found


@contextmanager
def counted(run: bool, known: bool = True) -> Iterator[list[Launches]]:
    """What is launched inside; the kernels themselves run, or not.

    Operations are not counted with the interpreter's own, nor where the graph is not known yet.
    """
    kernels: Counter[str] = Counter()
    ran = InterpretedFunction.run

    def note(self: Any, *args: Any, **keywords: Any) -> None:
        kernels[self.fn.__name__] += 1
        if run:
            ran(self, *args, **keywords)

    found: list[Launches] = []
    InterpretedFunction.run = note
    try:
        mode = _Operations()
        with nullcontext() if run or not known else mode:
            yield found
    finally:
        InterpretedFunction.run = ran
    found.append(Launches(sum(kernels.values()), mode.count))


def problem(hidden: int, edges: int) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of the operator and cotangents."""
    nodes, dim = 20, 3
    rowptr = torch.linspace(0, edges, nodes + 1).long()
    matrix, vector = torch.randn(hidden, hidden) / hidden, torch.randn(hidden)
    args = (
        torch.randn(nodes, 2 * hidden), torch.randn(nodes, dim), None, None,
        vector, None, matrix, vector, None, None, matrix, vector, vector,
        rowptr, torch.randint(nodes, (edges,), dtype=torch.int32), None, None,
        *encode_options(Options()), "triton",
    )  # fmt: skip
    return args, [torch.randn(nodes, hidden), torch.randn(nodes, dim)]


def launched(hidden: int, edges: int, precision: str, run: bool = False) -> list[Launches]:
    """Those of a pass forward and of one backward, on a graph that is known."""
    args, cotangents = problem(hidden, edges)
    args = (*args, precision)
    needed = [t is not None for t in args[:13]]
    found = []
    for a_pass in (
        lambda: triton_backend.messages(*args),
        lambda: triton_backend.messages_backward(*cotangents, *args, needed),
    ):
        with counted(False, known=False):
            a_pass()
        with counted(run) as again:
            a_pass()
        found += again
    return found


def expected(hidden: int, edges: int, precision: str, ordered: bool = False) -> list[Launches]:
    return [
        launches_of(direction, hidden, precision, edges, ordered=ordered)
        for direction in ("forward", "backward")
    ]


@pytest.mark.parametrize("precision", ["highest", "high", "bf16", "fp16"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("hidden", "edges", "chunk"), [(16, 300, 5000), (256, 2000, 1 << 19)])
def test_the_count_is_what_is_launched(
    hidden: int, edges: int, chunk: int, ordered: bool, precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(call, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(call, "FINISHED_TOGETHER", 3)
    torch.use_deterministic_algorithms(ordered)
    try:
        found = launched(hidden, edges, precision)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == expected(hidden, edges, precision, ordered)
    if hidden == 256:
        assert found[1].triton > 5 * 5  # several chunks


def test_kernels_that_run_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass in stages of three chunks, all of it through the interpreter."""
    monkeypatch.setattr(call, "CHUNK_BYTES", 16 * 4 * 4 * 256)
    found = launched(256, 48, "highest", run=True)
    assert [each.triton for each in found] == [each.triton for each in expected(256, 48, "highest")]
    assert launches.chunks_of(48, 16, launches.held_bytes("backward", 256, "highest",
                                                          staged_pass=True)) == 3  # fmt: skip


def test_one_chunk_has_one_launch_of_each_kind() -> None:
    assert launches_of("forward", 64, "bf16", 32_000_000) == Launches(3, 2)
    assert launches_of("backward", 64, "bf16", 32_000_000).triton == 3
    assert launches_of("forward", 64, "highest", 32_000_000) == Launches(2, 2)


def test_the_hosts_time() -> None:
    assert Launches(1000, 0).seconds == pytest.approx(22e-3)
    assert Launches(0, 1000).seconds == pytest.approx(9e-3)
    assert (Launches(1, 2) + Launches(3, 4)) * 2 == Launches(8, 12)


def test_a_large_pass_launches_for_less_than_the_gpu_works() -> None:
    """E = 3.2e7: chunks of 24 MB took 0.7 s of the host's time at H = 256."""
    wide = [launches_of(d, 256, "bf16", 32_000_000).seconds for d in ("forward", "backward")]
    assert sum(wide) < 0.12
    ordered = launches_of("backward", 64, "bf16", 32_000_000, ordered=True)
    assert ordered.triton < 260
    assert ordered.seconds < 6e-3


@pytest.mark.parametrize("edges", [1, 15, 16, 17, 100, 1000, 4097])
@pytest.mark.parametrize("most", [1, 3, 64])
def test_chunks_are_as_few_and_as_small_as_can_be(
    edges: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pass:
        class blocks:  # an attribute of a call
            edges = 16

        num_edges = edges

    held = 40
    monkeypatch.setattr(call, "CHUNK_BYTES", most * 16 * held)
    chunks = call.Call.chunks(Pass(), held)  # type: ignore[arg-type]
    assert chunks[0][0] == 0
    assert chunks[-1][1] == edges
    assert all(a[1] == b[0] for a, b in itertools.pairwise(chunks))
    sizes = [end - begin for begin, end in chunks]
    assert len(chunks) == launches.chunks_of(edges, 16, held) == -(-edges // (16 * most))
    assert max(sizes) <= 16 * most
    # of one size, which no fewer blocks would do
    assert set(sizes[:-1]) <= {max(sizes)}
    assert (max(sizes) - 16) * len(chunks) < edges


@pytest.mark.parametrize("edges", [1, 5, 16, 31, 100])
def test_sums_of_weights_take_runs_of_edges(edges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outer products of all edges, whatever their number."""
    monkeypatch.setattr(staged, "OUTER_EDGES", 16)
    runs = staged._runs(edges)
    assert -(-edges // runs) <= 16
    pass_back: Any = staged.Backward.__new__(staged.Backward)
    pass_back.call = type("Call", (), {"precision": "highest"})
    left, right = torch.randn(edges, 3), torch.randn(edges, 2)
    totals = torch.zeros(runs, 3, 2)
    for k in (1, 2):
        pass_back._add_outer(totals, left, right)
        torch.testing.assert_close(totals.sum(0), k * (left.T @ right), atol=1e-5, rtol=1e-5)

"""Time and memory of one layer, fused against the eager reference, in one process.

    python bench/layer.py                     10,000 nodes, 32 random senders each, H = 64
    python bench/layer.py --hidden 128 --dtype float64

The two are run in turn and medians compared. Building the graph is not timed. No speed-up is
printed unless the fused outputs and gradients agree with the reference.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import egnn_fast
from egnn_fast import Graph, nn

BACKENDS = ("cpu", "reference")
# the bound on the difference between two results of the same dtype, as a share of the largest
AGREEMENT = {torch.float32: 2e-5, torch.float64: 1e-10}


def make_case(
    nodes: int, degree: int, hidden: int, dtype: torch.dtype
) -> tuple[nn.EGCL, Tensor, Tensor, Graph]:
    """A layer, node features ``[N, H]``, coordinates ``[N, 3]`` and a random graph."""
    torch.manual_seed(0)
    receiver = torch.arange(nodes).repeat_interleave(degree)
    sender = torch.randint(nodes, (nodes * degree,))
    graph = Graph.from_edge_index(torch.stack((receiver, sender)), nodes)
    layer = nn.EGCL(hidden, hidden, hidden, dtype=dtype)
    h = torch.randn(nodes, hidden, dtype=dtype, requires_grad=True)
    x = torch.randn(nodes, 3, dtype=dtype, requires_grad=True)
    return layer, h, x, graph


def gradients(layer: nn.EGCL, h: Tensor, x: Tensor, graph: Graph, backend: str) -> list[Tensor]:
    """Outputs and all gradients of one step."""
    leaves = [h, x, *layer.parameters()]
    with egnn_fast.use_backend(backend):
        new_h, new_x = layer(h, x, graph)
    found = torch.autograd.grad(new_h.square().sum() + new_x.square().sum(), leaves)
    return [new_h.detach(), new_x.detach(), *found]


def forward(layer: nn.EGCL, h: Tensor, x: Tensor, graph: Graph, backend: str) -> None:
    """Inference."""
    with torch.inference_mode(), egnn_fast.use_backend(backend):
        layer(h, x, graph)


def peak_growth(run: Callable[[], object]) -> float | None:
    """By how many MB the resident memory rises above its level before, at most; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(field: str) -> float:
    """A memory figure of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def median_times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn, one round of warm-up first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main(
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 10_000,
    degree: Annotated[int, typer.Option(help="Random senders of each node.")] = 32,
    hidden: Annotated[int, typer.Option(help="Width H.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch and of the kernels.")] = 2,
    repeats: Annotated[int, typer.Option(help="Counted runs of each.")] = 7,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Compare the fused layer with the eager reference."""
    torch.set_num_threads(threads)
    kind = {"float32": torch.float32, "float64": torch.float64}.get(dtype)
    if kind is None:
        raise typer.BadParameter(f"--dtype: expected float32 or float64, got {dtype!r}")
    case = make_case(nodes, degree, hidden, kind)
    memory = {b: peak_growth(lambda b=b: gradients(*case, b)) for b in BACKENDS}  # type: ignore[misc]
    fused, expected = (gradients(*case, b) for b in BACKENDS)
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(fused, expected, strict=True)
    )
    if not error <= AGREEMENT[kind]:
        typer.echo(f"the fused layer disagrees with the reference: {error:.1e}; nothing is timed")
        raise typer.Exit(1)
    del fused, expected
    inference = median_times({b: lambda b=b: forward(*case, b) for b in BACKENDS}, repeats)  # type: ignore[misc]
    training = median_times({b: lambda b=b: gradients(*case, b) for b in BACKENDS}, repeats)  # type: ignore[misc]

    isa = case[0].explain(case[1], case[2]).instruction_set
    table = Table(title=f"EGCL, N = {nodes:,}, {degree} senders each, H = {hidden}, {dtype}")
    for column in ("", "forward", "forward + backward", "peak extra memory"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in (("reference", "eager reference"), ("cpu", f"egnn_fast ({isa})")):
        mb = memory[name]
        table.add_row(
            label,
            f"{inference[name] * 1e3:.1f} ms",
            f"{training[name] * 1e3:.1f} ms",
            "unknown" if mb is None else f"{mb:.0f} MB",
        )
    fused_mb, eager_mb = memory["cpu"], memory["reference"]
    share = None if not fused_mb or not eager_mb else eager_mb / fused_mb
    forward_ratio = inference["reference"] / inference["cpu"]
    training_ratio = training["reference"] / training["cpu"]
    table.add_row(
        "ratio",
        f"{forward_ratio:.1f}x",
        f"{training_ratio:.1f}x",
        "" if share is None else f"{share:.1f}x less",
    )
    Console().print(table)
    typer.echo(
        f"{threads} threads, torch {torch.__version__}, {platform.machine()}, error {error:.1e}"
    )
    if json_file is not None:
        figures = {
            "nodes": nodes, "degree": degree, "hidden": hidden, "dtype": dtype,
            "threads": threads, "repeats": repeats, "instruction_set": isa,
            "torch": torch.__version__, "error": error, "forward_s": inference,
            "forward_backward_s": training, "peak_extra_mb": memory,
        }  # fmt: skip
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

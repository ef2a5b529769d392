"""The results of a run as tables for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from egnn_fast.bench.cases import CASES, FUSED, TRAINING
from egnn_fast.bench.peers import PEERS
from egnn_fast.bench.results import CaseResult, Environment, Finding, Results, TimeRow

BUSY = 0.5  # load average from which on the report warns that other programs ran


def seconds(value: float) -> str:
    """A time in s, ms or µs, with three significant digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value:.0f} {unit}"
    return f"{value / 1e-6:.3g} µs"


def size(value: float) -> str:
    """A number of bytes in MB or GB."""
    digits = 2 if value < 1e10 else 1
    return f"{value / 1e9:.{digits}f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def ratio(value: float) -> str:
    """A ratio with two decimals below 2, else with one."""
    return f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def environment(env: Environment) -> str:
    """Machine, versions and date in one line."""
    commit = "" if env.commit is None else f", commit {env.commit}"
    busy = env.load is not None and env.load >= BUSY
    load = f", while other programs ran (load {env.load:.1f})" if busy else ""
    return (
        f"{env.cpu}, {env.instruction_set}, {threads(env)}, "
        f"torch {env.torch}, egnn_fast {env.egnn_fast}{commit}, {env.date}{load}"
    )


def threads(env: Environment) -> str:
    """The number of threads, such as "2 threads"."""
    return "1 thread" if env.threads == 1 else f"{env.threads} threads"


def listing() -> Table:
    """The table of cases."""
    table = Table("case", "N", "E", "what", box=SIMPLE_HEAD, padding=0)
    for case in CASES:
        name = Text(case.name, style="bold" if case.quick else "")
        table.add_row(name, f"{case.num_nodes:,}", f"{case.num_edges:,}", Text(case.about))
    table.caption = "bold: part of --quick"
    table.caption_justify = "left"
    return table


def report(results: Results) -> RenderableType:
    """Times, memory, goals, and what was left out."""
    parts: list[RenderableType] = [Text(environment(results.environment)), *_rates(results)]
    parts.append(_times(results))
    parts += [_failure(result) for result in results.cases if not result.check.passed]
    if results.findings:
        parts.append(_findings(results.findings))
    parts += _notes(results)
    return Group(*parts)


def _rates(results: Results) -> Iterator[RenderableType]:
    for (dtype, hidden), row in results.rates().items():
        silu = "unknown" if row.silu_g is None else f"{row.silu_g:.1f} G/s"
        yield Text(
            f"floor, {dtype}, H = {hidden}: products {row.blas_gflops:.0f} GFLOP/s, "
            f"SiLU {silu}; copy {row.copy_gb:.0f} GB/s"
        )


def _times(results: Results) -> Table:
    # a case's name has its own line above its rows, so that the table fits into 80 characters
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("case, pass", overflow="fold")
    table.add_column("peer", no_wrap=True)
    for column in ("median", "spread", "ratio", "GFLOP/s", "floor", "peak", "N·H"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results.cases:
        _case_rows(table, result)
        table.add_section()
    return table


def _case_rows(table: Table, result: CaseResult) -> None:
    table.add_row(Text(result.name, style="bold"))
    if not result.check.passed:
        table.add_row(Text("not timed", style="bold red"), FUSED)
        return
    shown: set[str] = set()
    for row in result.times:
        memory = ("", "")
        if row.measured == TRAINING:
            memory = _peak(result, row.peer)
            shown.add(row.peer)
        table.add_row(row.measured, *_time_cells(row), *memory)
    for memory_row in result.memory:
        peer = memory_row.peer
        if peer not in shown:
            table.add_row(TRAINING, _in_lines(peer), *[""] * 5, *_peak(result, peer))


def _time_cells(row: TimeRow) -> tuple[str, ...]:
    differs = PEERS[row.peer].differs if row.peer in PEERS else ""
    return (
        _in_lines(row.peer + ("*" if differs else "")),
        seconds(row.median_s),
        f"{(row.upper_quartile_s - row.lower_quartile_s) / row.median_s:.0%}",
        "" if row.ratio is None or row.peer == FUSED else ratio(row.ratio),
        "" if row.gflops is None else f"{row.gflops:.3g}",
        "" if row.floor_share is None else f"{row.floor_share:.0%}",
    )


def _in_lines(peer: str) -> str:
    """A long name in several lines, broken after hyphens."""
    return textwrap.fill(peer, len("egnn-pytorch-"), break_long_words=False)


def _failure(result: CaseResult) -> Text:
    """Why a case was not timed."""
    check = result.check
    error = "not finite" if check.error is None else f"off by {check.error:.1e}"
    what = f": {result.name}, {check.tensor} is {error}, allowed {check.bound:.1e}"
    return Text.assemble(("CHECK FAILED", "bold red"), what)


def _peak(result: CaseResult, peer: str) -> tuple[str, str]:
    """A peer's peak memory in MB or GB, and in tensors ``[N, H]``; empty if not measured."""
    row = result.peak(peer)
    if row is None or row.peak_bytes is None:
        return "", ""
    return size(row.peak_bytes), f"{row.node_tensors:.3g}"


def _findings(findings: list[Finding]) -> Table:
    table = Table(title="Goals", title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("case")
    table.add_column("figure")
    for column in ("measured", "goal"):
        table.add_column(column, justify="right", no_wrap=True)
    for finding in findings:
        sign = "≥" if finding.at_least else "≤"
        digits = ".3g" if finding.value < 1000 else ",.0f"
        table.add_row(
            finding.case,
            finding.what,
            Text(f"{finding.value:{digits}} {finding.unit}", "green" if finding.met else "yellow"),
            f"{sign} {finding.goal:{digits}} {finding.unit}",
        )
    return table


def _notes(results: Results) -> list[RenderableType]:
    notes = [
        "spread: interquartile range over median; ratio: time over that of egnn_fast; "
        "floor: floor over time",
        "peak: growth of a fresh process's memory; N·H: the same in tensors of N x H numbers",
    ]
    peers = {row.peer for result in results.cases for row in result.times}
    notes += [f"* {n}: {PEERS[n].differs}" for n in PEERS if n in peers and PEERS[n].differs]
    reasons: dict[str, list[str]] = {}
    for result in results.cases:
        skipped = {f"memory of {m.peer}": m.skipped for m in result.memory if m.skipped}
        for name, why in {**result.left_out, **skipped}.items():
            reasons.setdefault(f"{name}: {why}", []).append(result.name)
    notes += [f"left out, {why} ({', '.join(names)})" for why, names in reasons.items()]
    return [Text(note, style="dim") for note in notes]

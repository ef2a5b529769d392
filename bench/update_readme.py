"""Write the figures of README and docs/ from committed results: ``python bench/update_readme.py``.

Another file of results may be named: ``python bench/update_readme.py runs/bench/results.json``.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from egnn_fast.bench.cases import BACKWARD, CASES, FUSED, PASSES
from egnn_fast.bench.report import environment, ratio, seconds, size
from egnn_fast.bench.results import CaseResult, Results
from egnn_fast.experiments.io import write_atomic

ROOT = Path(__file__).resolve().parent.parent
# the pages with figures, and the blocks of each
PAGES = {
    ROOT / "README.md": ("summary",),
    ROOT / "docs" / "benchmarks.md": ("speed", "memory"),
}
RESULTS = ROOT / "bench" / "results" / "cpu" / "results.json"
# the cases of the short table, and the one whose memory is told beneath it
SUMMARY = ("layer-64", "layer-128", "nbody", "qm9")
MEMORY = "memory"
NONE = "–"


def figures(results: Results) -> dict[str, str]:
    """The blocks by name."""
    how = "egnn-fast bench --quick" if results.quick else "egnn-fast bench"
    told = f"`{how}` on {environment(results.environment)}; {results.repeats} samples."
    told = textwrap.fill(told, 80, break_long_words=False, break_on_hyphens=False)
    return {
        "summary": f"{told}\n\n{_summary(results)}",
        "speed": f"{told}\n\n{_speed(results)}",
        "memory": _memory(results),
    }


def insert(text: str, blocks: dict[str, str]) -> str:
    """A page with these blocks replaced; an error where one is not there exactly once."""
    for name, block in blocks.items():
        begin, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
        found = re.findall(re.escape(begin) + ".*?" + re.escape(end), text, re.DOTALL)
        if len(found) != 1:
            raise ValueError(f"the page must have {begin} and {end} once")
        text = text.replace(found[0], f"{begin}\n{block}\n{end}")
    return text


def updated(page: Path, results: Results) -> str:
    """A page of :data:`PAGES` with the figures of these results."""
    blocks = figures(results)
    return insert(page.read_text(encoding="utf-8"), {name: blocks[name] for name in PAGES[page]})


def _summary(results: Results) -> str:
    lines = [
        "| case | pass | eager | compile | egnn_fast | eager / egnn_fast |",
        "|---|---|---|---|---|---|",
    ]
    for result in results.cases:
        if result.name in SUMMARY and result.check.passed:
            lines += (_row(row[:-1]) for row in _passes(result) if row[1] != BACKWARD)
    for result in results.cases:
        ours, theirs = result.peak(FUSED), result.peak("official")
        if result.name != MEMORY or not (ours and theirs and ours.peak_bytes and theirs.peak_bytes):
            continue
        told = (
            f"Forward and backward of one layer with H = {result.hidden} on {result.edges:,} edges "
            f"take {size(ours.peak_bytes)} of memory, and {size(theirs.peak_bytes)} when written "
            "the official code's way."
        )
        lines += ["", textwrap.fill(told, 80)]
    return "\n".join(lines)


def _speed(results: Results) -> str:
    lines = [
        "| case | pass | eager | compile | egnn_fast | times eager | of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    named = {case.name for case in CASES if case.goals}
    for result in results.cases:
        if result.name in named and result.check.passed:
            lines += map(_row, _passes(result))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _passes(result: CaseResult) -> list[tuple[str, ...]]:
    """The cells of each pass: case, pass, three times, the ratio, the share of the floor."""
    rows: list[tuple[str, ...]] = []
    for measured in PASSES:
        ours = result.time(measured, FUSED)
        if ours is None:
            continue
        eager, compiled = (result.time(measured, peer) for peer in ("eager", "compile"))
        cells = (
            f"`{result.name}`",
            measured,
            NONE if eager is None else seconds(eager.median_s),
            NONE if compiled is None else seconds(compiled.median_s),
            seconds(ours.median_s),
            NONE if eager is None or eager.ratio is None else ratio(eager.ratio),
            NONE if ours.floor_share is None else f"{ours.floor_share:.0%}",
        )
        rows.append(cells)
    return rows


def _memory(results: Results) -> str:
    lines = [
        "| case | nodes | edges | official way | egnn_fast | in tensors `[N, H]` |",
        "|---|---|---|---|---|---|",
    ]
    for result in results.cases:
        ours, eager = result.peak(FUSED), result.peak("official")
        if ours is None or ours.peak_bytes is None or eager is None:
            continue
        cells = (
            f"`{result.name}`",
            f"{result.nodes:,}",
            f"{result.edges:,}",
            eager.skipped or NONE if eager.peak_bytes is None else size(eager.peak_bytes),
            size(ours.peak_bytes),
            f"{ours.node_tensors:.1f}",
        )
        lines.append(_row(cells))
    return "\n".join(lines)


def main(path: Path = RESULTS) -> None:
    """Rewrite the pages."""
    results = Results.load(path)
    for page in PAGES:
        write_atomic(page, updated(page, results))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))

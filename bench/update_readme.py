"""Write the README's figures from committed results: ``python bench/update_readme.py``.

Another file of results may be named: ``python bench/update_readme.py runs/bench/results.json``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from egnn_fast.bench.cases import CASES, FUSED, PASSES
from egnn_fast.bench.report import environment, ratio, seconds, size
from egnn_fast.bench.results import CaseResult, Results
from egnn_fast.experiments.io import write_atomic

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "cpu" / "results.json"
NONE = "–"


def figures(results: Results) -> dict[str, str]:
    """The blocks of the README by name."""
    how = "egnn-fast bench --quick" if results.quick else "egnn-fast bench"
    told = f"`{how}` on {environment(results.environment)}; {results.repeats} samples."
    return {"speed": f"{told}\n\n{_speed(results)}", "memory": _memory(results)}


def insert(text: str, blocks: dict[str, str]) -> str:
    """The README with its blocks replaced; an error where one is not there exactly once."""
    for name, block in blocks.items():
        begin, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
        found = re.findall(re.escape(begin) + ".*?" + re.escape(end), text, re.DOTALL)
        if len(found) != 1:
            raise ValueError(f"the README must have {begin} and {end} once")
        text = text.replace(found[0], f"{begin}\n{block}\n{end}")
    return text


def _speed(results: Results) -> str:
    lines = [
        "| case | pass | eager | compile | egnn_fast | times eager | of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    named = {case.name for case in CASES if case.goals}
    for result in results.cases:
        if result.name in named and result.check.passed:
            lines += _passes(result)
    return "\n".join(lines)


def _passes(result: CaseResult) -> list[str]:
    lines = []
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
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(path: Path = RESULTS) -> None:
    """Rewrite the README."""
    text = README.read_text(encoding="utf-8")
    write_atomic(README, insert(text, figures(Results.load(path))))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))

"""The report of a run: first whether results are right, then how fast they come."""

from __future__ import annotations

from typing import Any

from bench.gpu import triage
from bench.gpu.results import Results
from bench.gpu.setting import FAIL, LEFT_OUT, PASS

KERNELS, TENSORS, FAILED = 24, 12, 20  # lines about kernels, wrong tensors, failed items
WIDTH = 300  # characters of a reason
UNCHECKED = " (unchecked)"
Row = dict[str, Any]


def heading(results: Results) -> list[str]:
    """Where and with what."""
    e = results.environment
    where = e["gpu"] or f"{e['cpu']}, interpreted, so times mean nothing"
    return [
        f"egnn_fast {e['egnn_fast']} at {e['commit'] or 'an unknown commit'} on {where}",
        f"torch {e['torch']}, triton {e['triton']}, CUDA {e['cuda']}, driver {e['driver']}",
    ]


def standing_lines(results: Results) -> list[str]:
    """The variants of the compiler, the best first, and which one was chosen."""
    assemblers, found = results.environment["assemblers"], []
    for row in results.variants:
        name = row["variant"]
        told = f"{row['right']} of {row['tried']} right" if row["tried"] else "not tried"
        if row["wrong"]:
            told += ", WRONG: " + "; ".join(
                item.removeprefix(f"smoke: {name}: ") for item in row["wrong"]
            )
        if row["seconds"] is not None:
            told += f"; forward + backward, all precisions: {row['seconds'] * 1e3:.4g} ms"
        found.append(f"variant {name} ({assemblers[name]}): {told}")
    missing = [n for n in assemblers if n not in {row["variant"] for row in results.variants}]
    found += [f"variant {name}: {assemblers[name]}" for name in missing]
    return [*found, f"all else runs with: {results.variant} ({assemblers[results.variant]})"]


def first_page(results: Results) -> list[str]:
    """Whether it is right, what is wrong, and the goals."""
    times, goals = results.derived()
    failed = [row for row in results.items.values() if row["status"] == FAIL]
    unchecked = [row for row in times if not row["checked"]]
    found = [*heading(results), _counts(results), *standing_lines(results)]
    found += [f"fail: {row['name']}: {row['reason'][:WIDTH]}" for row in failed[:FAILED]]
    if len(failed) > FAILED:
        found.append(f"fail: {len(failed) - FAILED} more")
    found += [f"wrong: {x}" for x in triage.lines(results.sections.get("triage", []), TENSORS)]
    found += _code_lines(results)
    if times:
        found.append(
            f"times: {len(times)}; unchecked, as their check failed or did not run: "
            f"{len(unchecked)}"
        )
    for row in goals:
        sign, word = ">=" if row["at_least"] else "<=", "met" if row["met"] else "not met"
        told = f"{row['value']:.4g} {row['unit']} ({sign} {row['goal']:g}: {word})"
        mark = "" if row["checked"] else UNCHECKED
        found.append(f"goal: {row['case']}: {row['what']}: {told}{mark}")
    return found


def details(results: Results) -> list[str]:
    """Every time, the kernels, the host's side, and what was left out."""
    times, _ = results.derived()
    found = _time_lines(times) + _kernel_lines(results) + _host_lines(results)
    for row in results.sections.get("reach", []):
        found.append(f"{row['peer']} trains on {row['edges']:,} edges; then {row['limit']}")
    left = [row for row in results.items.values() if row["status"] == LEFT_OUT]
    return found + [f"left out: {row['name']}: {row['reason']}" for row in left]


def _counts(results: Results) -> str:
    return ", ".join(f"{results.count(s)} {s}" for s in (PASS, FAIL, LEFT_OUT))


def _code_lines(results: Results) -> list[str]:
    """The kernels that ran in wrong results, with hashes to compare with other variants'."""
    found: dict[tuple[str, str], Row] = {}
    for row in results.sections.get("triage_kernels", []):
        found.setdefault((row["kernel"], row["hash"]), row)
    return [
        f"code of a wrong result: {row['kernel']} {row['hash']} (TTGIR {row['ttgir_hash']}, "
        f"{row['wgmma']} wgmma), ptxas {row['ptxas']}"
        for row in list(found.values())[:TENSORS]
    ]


def _time_lines(times: list[Row]) -> list[str]:
    found = []
    for row in times:
        share = f", {row['floor_share']:.0%} of the floor" if row["floor_share"] else ""
        ratio = f", {row['ratio']:.2f} x ours" if row["ratio"] else ""
        what = f"{row['case']}, {row['precision']}, {row['measured']}, {row['peer']}"
        mark = "" if row["checked"] else UNCHECKED
        found.append(f"{what}: {row['median_s'] * 1e3:.4g} ms{ratio}{share}{mark}")
    return found


def _kernel_lines(results: Results) -> list[str]:
    rows = sorted(results.sections.get("kernels", []), key=lambda row: -row["seconds_per_run"])
    return [
        f"kernel: {row['precision']}, {row['what']}, {row['kernel'][:60]}: "
        f"{row['seconds_per_run'] * 1e3:.4g} ms in {row['calls_per_run']:g} calls"
        for row in rows[:KERNELS]
    ]


def _host_lines(results: Results) -> list[str]:
    return [
        f"host: {row['what']}, {row['measured']}, {row['peer']}: {row['median_s'] * 1e6:.4g} µs"
        + ("" if row["launches"] is None else f", {row['launches']:g} launches")
        for row in results.sections.get("host", [])
    ]

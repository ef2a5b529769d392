"""``egnn-fast bench``: options, files, pictures; and the figures of README and docs/."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import update_readme
from egnn_fast import cli
from egnn_fast.bench import cases, check, floor, measure, memory, peers, plots
from egnn_fast.bench.cases import CASES, FUSED, INFERENCE, TRAINING
from egnn_fast.bench.results import (
    CaseResult,
    CheckRow,
    Environment,
    Finding,
    MemoryRow,
    RateRow,
    Results,
    TimeRow,
)
from egnn_fast.experiments.errors import ExperimentError
from egnn_fast.runtime import native

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
PNG = b"\x89PNG\r\n\x1a\n"


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, one_thread: None) -> Call:
    """Run ``egnn-fast bench`` in this process: exit code, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as error:
            cli.main(["bench", "--out", str(tmp_path / "out"), *args])
        streams = capsys.readouterr()
        return int(error.value.code or 0), streams.out, streams.err

    return run


class FixedRates:
    """Probes that take no time."""

    def __init__(self, *args: Any) -> None: ...

    def functions(self) -> dict[str, Callable[[], object]]:
        return {"blas": lambda: 1.0, "silu": lambda: 1.0}

    def rates(self, seconds: dict[str, float]) -> floor.Rates:
        assert seconds == {"blas": 1.0, "silu": 1.0}
        return floor.Rates(1e11, 1e9, 1e10)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in a size for tests; rates at once."""
    table = tuple(
        dataclasses.replace(
            case, sizes=tuple(min(s, 5) for s in case.sizes[:2]), hidden=8, memory=()
        ).at_most(64)
        for case in CASES
    )
    monkeypatch.setattr(cases, "CASES", table)
    monkeypatch.setattr(floor, "Probes", FixedRates)
    monkeypatch.setattr(measure, "MIN_SAMPLE", 5e-3)


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    """One line on stderr with the words in it, and nothing else happened."""
    assert outcome[0] == 2
    assert outcome[2].startswith("error: ")
    assert outcome[2].count("\n") == 1
    for word in words:
        assert word in outcome[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "nothing"], ["--case", "'nothing'", "layer-64"]),
        (["--against", "nothing"], ["--against", "'nothing'", "official"]),
        (["--against", FUSED], ["--against", "'egnn_fast'"]),
        (["--threads", "0"], ["--threads: expected at least 1, got 0"]),
        (["--repeats", "-2"], ["--repeats: expected at least 1, got -2"]),
        (["--repeats", "many"], ["--repeats", "integer"]),
        (["--fast"], ["--fast"]),
    ],
)
def test_wrong_options(call: Call, arguments: list[str], words: list[str], tmp_path: Path) -> None:
    refused(call(*arguments), *words)
    assert not (tmp_path / "out").exists()


def test_out_must_be_writable(call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    refused(call("--quick"), "--out", str(tmp_path / "out"))


def test_a_peer_that_is_not_installed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.PEERS["egnn-pytorch"]._replace(needs=("not_there_at_all",))
    monkeypatch.setitem(peers.PEERS, "egnn-pytorch", absent)
    refused(call("--against", "egnn-pytorch"), "not installed: not_there_at_all")


def test_without_the_extension(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load_error", "it was not built")
    refused(call("--quick"), "nothing to time: it was not built")


def test_list_names_every_case(call: Call) -> None:
    code, out, _ = call("--list")
    assert code == 0
    assert all(case.name in out for case in CASES)


def test_a_run_writes_results_and_pictures(call: Call, tiny: None, tmp_path: Path) -> None:
    chosen = ["--case", "layer-64", "--case", "growth-*", "--against", "official"]
    code, out, err = call(*chosen, "--against", "reference", "--repeats", "2")
    assert (code, err) == (0, "")
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.json", "speed.png", "roofline.png"}  # no memory was measured
    for name in names - {"results.json"}:
        assert (folder / name).read_bytes().startswith(PNG)
        assert (folder / name).stat().st_size > 10_000
    results = Results.load(folder / "results.json")
    assert results.repeats == 2
    assert [case.name for case in results.cases][:2] == ["layer-64", "growth-100k"]
    layer = results.cases[0]
    ours = layer.time(INFERENCE, FUSED)
    assert ours is not None
    assert ours.ratio == 1
    assert ours.floor_share == pytest.approx((ours.floor_s or 0) / ours.median_s)
    eager = layer.time(INFERENCE, "eager")
    assert eager is not None
    assert eager.peer in cases.EAGER
    assert eager.ratio == pytest.approx(eager.median_s / ours.median_s)
    for word in ("layer-64", "official", "Goals", "results.json", "torch"):
        assert word in out


def test_against_names_the_peers(call: Call, tiny: None, tmp_path: Path) -> None:
    assert call("--case", "layer-64", "--against", "official", "--repeats", "1")[0] == 0
    (case,) = Results.load(tmp_path / "out" / "results.json").cases
    assert {row.peer for row in case.times} == {FUSED, "official"}


def test_failed_check_is_told_and_exits_with_1(
    call: Call, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = check.Check(False, 0.5, 1e-6, "gradient of x", 64)
    monkeypatch.setattr(check, "check", lambda case, quick: wrong)
    code, out, _ = call("--case", "layer-64", "--repeats", "1")
    assert code == 1
    told = " ".join(out.split())
    assert "CHECK FAILED: layer-64, gradient of x is off by 5.0e-01, allowed 1.0e-06" in told
    assert "x ≥" not in told
    (case,) = Results.load(tmp_path / "out" / "results.json").cases
    assert not case.check.passed
    assert case.times == []


def test_threads_are_set(call: Call, tiny: None, tmp_path: Path) -> None:
    assert call("--case", "edges-64", "--threads", "2", "--repeats", "1")[0] == 0
    assert torch.get_num_threads() == 2
    assert Results.load(tmp_path / "out" / "results.json").environment.threads == 2


def test_results_are_saved_after_each_case(
    call: Call, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the second case leaves the first, whole."""
    right = check.check

    def stop(case: cases.Case, quick: bool) -> check.Check:
        if case.name != "layer-64":
            raise KeyboardInterrupt
        return right(case, quick)

    monkeypatch.setattr(check, "check", stop)
    code, out, _ = call("--case", "layer-*", "--against", "official", "--repeats", "1")
    assert code == cli.INTERRUPTED
    assert "results.json" in out
    (case,) = Results.load(tmp_path / "out" / "results.json").cases
    assert case.name == "layer-64"


def some_results() -> Results:
    """Every field filled."""
    times = [
        TimeRow(INFERENCE, FUSED, 0.01, 0.009, 0.011, 0.008, 7, 1, 1.0, 120.0, 0.009, 0.9),
        TimeRow(INFERENCE, "official", 0.1, 0.09, 0.11, 0.08, 7, 1, 10.0, 12.0, 0.009, 0.09),
        TimeRow(TRAINING, FUSED, 0.04, 0.04, 0.04, 0.04, 7, 1, 1.0, 90.0, 0.03, 0.75),
    ]
    memory_rows = [
        MemoryRow(FUSED, 40_000_000, 15.6, None),
        MemoryRow("official", None, None, "would need about 9 GB, 1 GB are free"),
    ]
    case = CaseResult(
        "layer-64", "a layer", 10_000, 320_000, 64, 1, "float32",
        CheckRow(True, 1e-7, 1e-6, "output 0", 320_000), 50.0,
        RateRow(150.0, 4.5, 12.0), times, memory_rows,
        {"compile": "too slow"},
    )  # fmt: skip
    return Results(
        Environment("a CPU", "avx2", 2, "2.13", "0.1", "abc", "2026-01-01", "Linux", "3.11", 0.1),
        False,
        7,
        [case],
        [Finding("layer-64", "times eager, inference", 10.0, "x", 8.5, True)],
    )


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    results, path = some_results(), tmp_path / "results.json"
    results.save(path)
    assert Results.load(path) == results


def test_documented_fields_are_those_of_the_file() -> None:
    rows = re.findall(r"^\| (`[^|]+) \| `(\w+)` \| ", SCHEMA, re.MULTILINE)
    documented: dict[str, set[str]] = {}
    for names, of in rows:
        documented.setdefault(of, set()).update(re.findall(r"`(\w+)`", names))
    content = json.loads(some_results().to_json())
    (case,) = content["cases"]
    found: dict[str, Any] = {
        "environment": content["environment"],
        "rates": case["rates"],
        "cases": case,
        "check": case["check"],
        "times": case["times"][0],
        "memory": case["memory"][0],
        "findings": content["findings"][0],
    }
    assert {of: set(fields) for of, fields in found.items()} == documented
    others = {"schema", "quick", "repeats"}
    assert set(content) == others | {"environment", "cases", "findings"}
    assert all(f"`{name}`" in SCHEMA for name in others)
    assert content["findings"][0]["met"] is True


def test_numbers_that_are_none_do_not_reach_the_file() -> None:
    results = some_results()
    results.cases[0].times[0] = dataclasses.replace(results.cases[0].times[0], ratio=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        results.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "quick": 1}'])
def test_a_file_that_holds_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ExperimentError, match=r"results\.json holds no results of egnn-fast bench"):
        Results.load(path)


def test_a_kill_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    some_results().save(path)
    old = path.read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    newer = some_results()
    newer.repeats = 99
    with pytest.raises(KeyboardInterrupt):
        newer.save(path)
    with pytest.raises(KeyboardInterrupt):
        plots.draw(newer, tmp_path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_pictures(tmp_path: Path) -> None:
    written = plots.draw(some_results(), tmp_path)
    assert {path.name for path in written} == {"speed.png", "memory.png", "roofline.png"}
    for path in written:
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 10_000
    empty = dataclasses.replace(some_results(), cases=[])
    assert plots.draw(empty, tmp_path) == []
    assert list(tmp_path.iterdir()) == []  # nothing of an earlier run is left beside newer results


def test_memory_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager layer keeps at least 8 H + 9 numbers of each edge; the fused one what it may."""
    case = next(case for case in CASES if case.name == "growth-100k")
    found = {}
    for name, budget in (("official", 0), (FUSED, 0), (FUSED, 64 << 20)):
        monkeypatch.setenv("EGNN_FAST_ACTIVATION_BYTES", str(budget))
        found[name, budget] = memory.peak(case, name, 1).peak_bytes
    eager, bare, kept = found.values()
    if bare is not None:  # where the system tells
        assert eager is not None
        assert kept is not None
        assert eager > case.num_edges * (8 * case.hidden + 9) * 4
        assert bare < eager / 8
        # two numbers of H for each edge, and less for the nodes
        assert case.num_edges * 2 * case.hidden * 4 < kept < bare + (64 << 20)


def test_a_failing_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ExperimentError, match=r"on layer-64 failed \(exit status 1\): no message"):
        memory.peak(CASES[0], FUSED, 1)


@pytest.mark.parametrize("page", update_readme.PAGES, ids=lambda page: page.name)
def test_figures_of_the_pages_are_those_of_the_committed_run(page: Path) -> None:
    results = Results.load(update_readme.RESULTS)
    assert results.passed
    assert update_readme.updated(page, results) == page.read_text(encoding="utf-8")


def test_every_figure_has_a_page() -> None:
    placed = [name for blocks in update_readme.PAGES.values() for name in blocks]
    assert sorted(placed) == sorted(update_readme.figures(some_results()))


def test_figures_are_taken_from_the_results() -> None:
    blocks = update_readme.figures(some_results())
    told, table = blocks["speed"].split("\n\n")
    assert told.replace("\n", " ") == (
        "`egnn-fast bench` on a CPU, avx2, 2 threads, torch 2.13, egnn_fast 0.1, commit abc, "
        "2026-01-01; 7 samples."
    )
    busy = some_results()
    busy.environment = dataclasses.replace(busy.environment, load=3.0)
    told_busy = update_readme.figures(busy)["speed"].replace("\n", " ")
    assert "while other programs ran (load 3.0)" in told_busy
    assert "| `layer-64` | inference | 100 ms | – | 10 ms | 10.0x | 90% |" in table
    assert blocks["summary"].startswith(told)
    assert "| `layer-64` | inference | 100 ms | – | 10 ms | 10.0x |\n" in blocks["summary"]
    assert "| would need about 9 GB, 1 GB are free | 40 MB | 15.6 |" in blocks["memory"]
    with pytest.raises(ValueError, match="once"):
        update_readme.insert("no markers", blocks)


def test_suites_of_pytest_benchmark_run() -> None:
    """Each file is imported and one case of each is run, untimed."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-disable"]
    command += ["-p", "no:cacheprovider", "-k", "egnn_fast and overhead"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b3 passed", done.stdout), done.stdout
    modules = [import_module(f"bench.{path.stem}") for path in (ROOT / "bench").glob("bench_*.py")]
    covered = {row.values[:2] for module in modules for row in module.ROWS}
    timed = {(case, p) for case in CASES for p in case.passes if p != cases.BACKWARD}
    assert covered == timed

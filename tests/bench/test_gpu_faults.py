"""The GPU suite where something goes wrong: planted faults, a kill, memory, assemblers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

# last: an installed package goes before the checkout
from bench.gpu import children, items, plan, plant, variants
from bench.gpu.setting import FAIL, LEFT_OUT, PASS, Item, Outcome, Setting
from bench.gpu.waiting import Queue

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_suite.py"
CPU, GPU = Setting("cpu", True), Setting("cuda")
SMOKE = ("smoke: own ptxas: H 64: highest", "smoke: no wgmma: H 64: highest")


def variables() -> dict[str, str]:
    dropped = ("PYTHONPATH", "TRITON_INTERPRET")
    return {k: v for k, v in os.environ.items() if k not in dropped}


def command(folder: Path, *arguments: str, script: Path = SCRIPT) -> list[str]:
    words = ("--device", "cpu", "--quick", "--jobs", "1", "--out", str(folder))
    return [sys.executable, "-W", "ignore", str(script), *words, *arguments]


def suite(folder: Path, *arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *arguments, script=script), cwd=ROOT.parent, env=variables(),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def chosen(*patterns: str) -> list[str]:
    return [word for pattern in patterns for word in ("--case", pattern)]


def status_of(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "results.json").read_text())
    return {row["name"]: row["status"] for row in content["items"]}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a wrong kernel, too little memory and a crash, and what it said."""
    folder = tmp_path_factory.mktemp("faults")
    done = suite(
        folder,
        *chosen("smoke: *: H 64*", "at full size: random-64*", "edge pass: no edges*",
                "edge pass: 17 *", "times: edges-random-64*"),
        "--plant", "wrong=smoke: own*", "--plant", "memory=at full*", "--plant", "crash=*17 *",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    return folder, done.stdout


def test_each_fault_costs_one_item(faulty: tuple[Path, str]) -> None:
    assert status_of(faulty[0]) == {
        "smoke: own ptxas: H 64: highest": FAIL,
        "smoke: newer ptxas: H 64: highest": LEFT_OUT,
        "smoke: no wgmma: H 64: highest": PASS,
        "at full size: random-64: highest": LEFT_OUT,
        "edge pass: no edges: highest": PASS,
        "edge pass: 17 edges of one row: highest": FAIL,
        "times: edges-random-64: highest": PASS,
    }
    reasons = {
        row["name"]: row["reason"]
        for row in json.loads((faulty[0] / "results.json").read_text())["items"]
    }
    assert "status -11" in reasons["edge pass: 17 edges of one row: highest"]
    assert reasons["at full size: random-64: highest"].startswith("out of memory even alone: ")
    assert "give --ptxas FILE" in reasons["smoke: newer ptxas: H 64: highest"]


def test_the_rest_runs_with_a_variant_that_is_right(faulty: tuple[Path, str]) -> None:
    content = json.loads((faulty[0] / "results.json").read_text())
    assert content["variant"] == variants.NO_WGMMA
    best, worse = content["variants"]
    assert (best["variant"], best["right"], best["wrong"]) == (variants.NO_WGMMA, 1, [])
    assert (worse["variant"], worse["wrong"]) == (variants.OWN, [SMOKE[0]])
    ran = {row["name"]: row["variant"] for row in content["items"]}
    assert ran["times: edges-random-64: highest"] == variants.NO_WGMMA
    assert ran["smoke: own ptxas: H 64: highest"] == variants.OWN
    for section in ("times", "checks"):
        assert all(row["variant"] for row in content["found"][section])


def test_a_wrong_result_is_written_down(faulty: tuple[Path, str]) -> None:
    content = json.loads((faulty[0] / "triage.json").read_text())
    rows = {row["tensor"]: row for row in content["triage"]}
    assert {"M", "X", "gradient of w2", "gradient of P"} <= set(rows)
    assert rows["X"]["wrong"] == 0
    wrong = rows["M"]
    assert wrong["error"] > wrong["bound"]
    # as planted: every 16th row from the first, half of the columns
    assert (wrong["rows"], wrong["columns"]) == ([0], list(range(8)))
    assert (wrong["wrong"], wrong["by_row"][0], wrong["by_column"][:9]) == (8, 8, [1] * 8 + [0])
    place = wrong["first"][0]
    assert place["found"] == pytest.approx(plant._FACTOR * place["right"], rel=1e-5)
    assert wrong["again"] == 0  # no race
    with zipfile.ZipFile(faulty[0] / "triage_code.zip") as archive:
        assert archive.namelist() == []  # interpreted


def test_the_first_page_says_what_is_wrong_and_unchecked(faulty: tuple[Path, str]) -> None:
    folder, said = faulty
    page = (folder / "report.txt").read_text().split("\n\n")[0]
    assert "variant own ptxas (ptxas " in page
    assert "0 of 1 right, WRONG: H 64: highest" in page
    assert "all else runs with: no wgmma" in page
    assert "fail: edge pass: 17 edges of one row: highest: its process ended" in page
    assert "wrong: smoke: H 64, highest: M [8, 16]:" in page
    assert "times: 4; unchecked, as their check failed or did not run: 4" in page
    assert page in said
    # a ratio stands although nothing of that size was checked
    assert "edges-random-64, highest, inference, reference: " in said
    assert " x ours (unchecked)" in said


def test_results_are_few_small_files(faulty: tuple[Path, str]) -> None:
    found = list(faulty[0].iterdir())
    assert len(found) <= 8
    assert sum(path.stat().st_size for path in found) < 4 << 20


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    cases = chosen("smoke: own ptxas: H 64*", "edge pass: no edges*", "at full size: random-64*")
    mark = f"EGNN_FAST_TEST_MARK={tmp_path}"
    process = subprocess.Popen(
        command(tmp_path, *cases), cwd=ROOT.parent, stdout=subprocess.PIPE, text=True,
        env=variables() | dict([mark.split("=", 1)]),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "pass  smoke: " in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = status_of(tmp_path)
    assert before == {SMOKE[0]: PASS}
    _await_none_with(mark)

    done = suite(tmp_path, *cases, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 items are kept" in done.stdout
    assert "] 2 items" in done.stdout
    assert status_of(tmp_path) == {
        SMOKE[0]: PASS,
        "edge pass: no edges: highest": PASS,
        "at full size: random-64: highest": PASS,
    }


def _await_none_with(mark: str) -> None:
    """A child, which has this variable too, ends by itself when the run is killed."""
    end = time.monotonic() + 30
    while any(map(partial(_has, mark.encode()), Path("/proc").glob("[0-9]*/environ"))):
        assert time.monotonic() < end, "a child goes on although the run was killed"
        time.sleep(0.2)


def _has(mark: bytes, file: Path) -> bool:
    try:
        return mark in file.read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


TOOL = """#!/bin/sh
# as compute-sanitizer does: it starts the application and waits
sleep 100 &
echo $! > "$PIDS"
wait
"""


def test_what_a_killed_child_has_started_ends_with_it(tmp_path: Path) -> None:
    tool, pids = tmp_path / "tool", tmp_path / "pids"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    script = f"import subprocess, sys; sys.stdin.readline(); subprocess.run([{str(tool)!r}])"
    children.run(
        [item("slow", seconds=1, limit=3)], GPU, jobs=1, deadline=time.monotonic() + 60,
        command=[sys.executable, "-c", script], done=lambda i, outcome, s: None,
        environment=lambda i: os.environ | {"PIDS": str(pids)},
    )  # fmt: skip
    status = Path(f"/proc/{pids.read_text().strip()}/stat")
    time.sleep(0.5)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_tree_that_was_exported_and_is_not_installed(tmp_path: Path) -> None:
    """Of ``git archive``, inside another repository: it knows its commit, and runs."""
    source, outer = tmp_path / "source", tmp_path / "outer"
    for name in ("bench/gpu", "bench/offline", "egnn_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name,
                        ignore=shutil.ignore_patterns("__pycache__", "*.so"))  # fmt: skip
    for name in ("bench/gpu_suite.py", "bench/__init__.py", ".gitattributes"):
        shutil.copy(ROOT / name, source / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C"]
    for folder in (source, outer):
        folder.mkdir(exist_ok=True)
        subprocess.run([*git, str(folder), "init", "-q"], check=True)
    subprocess.run([*git, str(source), "add", "-A"], check=True)
    subprocess.run([*git, str(source), "commit", "-q", "-m", "all"], check=True)
    archive = subprocess.run(
        [*git, str(source), "archive", "HEAD"], check=True, capture_output=True
    ).stdout
    inner = outer / "a" / "nested folder"
    inner.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(inner)], input=archive, check=True)
    head = subprocess.run(
        [*git, str(source), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()

    done = suite(tmp_path / "out", *chosen("edge pass: no edges*"),
                 script=inner / "bench" / "gpu_suite.py")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(content["environment"]["commit"]) >= 7
    assert head.startswith(content["environment"]["commit"])


def item(name: str, **more: Any) -> Item:
    return Item(name, "checks", lambda setting: Outcome(), **more)


def test_memory_decides_what_runs_side_by_side() -> None:
    wide, small, other = item("a", gigabytes=60), item("b", gigabytes=3), item("c", gigabytes=60)
    queue = Queue([wide, other, small], time.monotonic() + 60, 100.0)
    assert queue.take("") is wide
    assert queue.take("") is small  # the other does not fit beside the first
    queue.give_back(small)
    queue.give_back(wide)
    assert queue.take("") is other
    assert queue.take("") is None
    # what is larger than all there is runs alone
    alone = Queue([item("d", gigabytes=500)], time.monotonic() + 60, 100.0)
    assert alone.take("") is not None


def test_a_worker_goes_on_with_its_variant_if_one_is_near() -> None:
    found = [item(str(k), variant=("x", "y", "z")[k % 3]) for k in range(6)]
    queue = Queue(found, time.monotonic() + 60, 100.0)
    assert [queue.take("z") for _ in range(3)] == [found[2], found[5], found[0]]


def test_what_time_is_too_short_for_is_left() -> None:
    queue = Queue([item("long", seconds=50), item("short", seconds=1)], time.monotonic() + 20, 9.0)
    found = queue.take("")
    assert found is not None
    assert found.name == "short"
    assert [i.name for i in queue.left] == ["long"]


CHILD = """
import json, os, sys
for line in sys.stdin:
    name = line.strip()
    full = name == "always" or (name == "once" and not os.path.exists(sys.argv[1]))
    if name == "once":
        open(sys.argv[1], "w").close()
    said = {"status": "left out" if full else "pass", "reason": "", "out_of_memory": full}
    print("@@ " + json.dumps(said), flush=True)
"""


def test_what_runs_out_of_memory_is_tried_again_alone(tmp_path: Path) -> None:
    told: list[tuple[str, str, str]] = []
    children.run(
        [item("once"), item("always"), item("fits")], GPU, jobs=2, deadline=time.monotonic() + 60,
        command=[sys.executable, "-c", CHILD, str(tmp_path / "mark")],
        done=lambda i, outcome, s: told.append((i.name, outcome.status, outcome.reason)),
    )  # fmt: skip
    assert told[0] == ("fits", PASS, "")
    assert sorted(told[1:]) == [
        ("always", LEFT_OUT, "out of memory even alone: "), ("once", PASS, "")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_taken_for_a_lack_of_memory(error: Exception, is_memory: bool) -> None:
    assert children.out_of_memory(error) is is_memory


def test_every_item_has_its_phase_and_what_matters_comes_first() -> None:
    known = items.all_items(GPU)
    known = {name: i for name, i in known.items() if i.section != "tune"}
    parts = {phase.name: [i.name for i in mine] for phase, mine in plan.phases_of(known)}
    assert sum(map(len, parts.values())) == len(known)
    assert all(name.startswith(("smoke", "memcheck", "racecheck", "speed"))
               for name in parts["smoke"])  # fmt: skip
    assert sum(name.startswith("smoke: own ptxas: ") for name in parts["smoke"]) in range(8, 11)
    assert parts["first times"][:9] == [
        "rates", "host: layer", "host: nbody",
        *(f"times: random-64: {p}" for p in ("bf16", "highest", "high")),
        *(f"times: edges-random-64: {p}" for p in ("bf16", "highest", "high")),
    ]  # fmt: skip
    # what is timed alone was compiled side by side before
    assert len(parts["compile"]) == 8
    compiled = parts["compile"] + parts["used most"]
    for name in parts["first times"] + parts["more times"]:
        if name.startswith("times: ") and "torch.compile" not in name:
            assert name.replace("times: ", "compile: ") in compiled
    assert "kernels: bf16" in parts["first times"]
    assert all(name.startswith("at full size: ") for name in parts["full size"])
    assert not any(name.startswith("edge pass: option") for name in parts["used most"])
    assert sum(name.startswith("edge pass: option") for name in parts["the rest"]) > 30
    assert parts["more times"][0] == "times: random-64 beside torch.compile: bf16"
    # estimates of the phases that run one item after the other fit
    seconds = sum(known[name].seconds for name in parts["first times"])
    assert plan.PHASES[1].end + seconds <= plan.PHASES[2].end


HANGS = "import sys, time; sys.stdin.readline(); time.sleep(60)"


@pytest.mark.parametrize(
    ("limit", "status", "told"),
    [(1.0, FAIL, "not done after 1 s, so it was ended"),
     (90.0, LEFT_OUT, "ended after 1 s: the run's time was over")],
)  # fmt: skip
def test_only_what_had_all_its_time_has_failed(
    limit: float, status: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "GRACE", -1e6)
    found: list[Outcome] = []
    children.run(
        [item("slow", seconds=1, limit=limit)], GPU, jobs=1, deadline=time.monotonic() + 5,
        command=[sys.executable, "-c", HANGS], done=lambda i, outcome, s: found.append(outcome),
    )  # fmt: skip
    assert [(o.status, o.reason) for o in found] == [(status, told)]


def test_a_short_run_is_the_first_part_of_a_long_one() -> None:
    assert plan.ends(540, True) == [100, 125, 260, 330, 410, 490, 540]
    assert plan.ends(240, True) == [100, 125, 240, 240, 240, 240, 240]
    assert plan.ends(900, True)[-1] == 900
    assert plan.ends(1080, False) == [200, 250, 520, 660, 820, 980, 1080]

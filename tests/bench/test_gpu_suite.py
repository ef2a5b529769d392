"""The GPU suite without a GPU: all of it but CUDA itself, at sizes that the interpreter can do."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

# last: an installed package goes before the checkout
from bench.gpu import (
    cases,
    checks,
    children,
    command,
    derive,
    graphs,
    items,
    large,
    problems,
    sanitizer,
    smoke,
)
from bench.gpu.setting import FAIL, LEFT_OUT, PASS, PRECISIONS, Item, Outcome, Setting
from egnn_fast.bench.cases import FUSED, INFERENCE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_suite.py"
CPU, GPU = Setting("cpu", True), Setting("cuda")


def suite(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command as one would in a checkout that is not installed."""
    dropped = ("PYTHONPATH", "TRITON_INTERPRET")
    variables = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments], cwd=ROOT.parent, env=variables,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run through the interpreter, its checks and times in children."""
    folder = tmp_path_factory.mktemp("suite")
    patterns = ("edge pass: 17 edges*", "torch.compile: complete*", "2 N H*", "rates",
                "times: nbody*", "CUDA graph: complete*")  # fmt: skip
    chosen = [word for pattern in patterns for word in ("--case", pattern)]
    done = suite("--device", "cpu", "--quick", "--jobs", "1", "--out", str(folder), *chosen)
    return folder, done.stdout


def test_a_run_through_the_interpreter(run: tuple[Path, str]) -> None:
    folder, said = run
    content = json.loads((folder / "results.json").read_text())
    status = {row["name"]: row["status"] for row in content["items"]}
    assert status == {
        "edge pass: 17 edges of one row: highest": PASS,
        "torch.compile: complete: highest": PASS,
        "CUDA graph: complete: highest": LEFT_OUT,
        "2 N H beyond 2^31": PASS,
        "rates": PASS,
        "times: nbody: highest": PASS,
    }
    assert content["passed"] is True
    assert content["counts"] == {PASS: 5, FAIL: 0, LEFT_OUT: 1}
    rows = [row for row in content["found"]["checks"] if row["case"] == "17 edges of one row"]
    assert [row["quantity"] for row in rows] == ["outputs", "gradients", "second order"]
    assert all(0 < row["error"] <= row["bound"] < 1e-4 for row in rows)
    for measured in (INFERENCE, "training step"):
        peers = {r["peer"]: r for r in content["times"] if r["measured"] == measured}
        assert set(peers) == {FUSED, "reference", "official"}
        assert peers[FUSED]["ratio"] == 1
        assert peers["official"]["median_s"] > 0
        assert peers["official"]["floor_s"] is None  # of a GPU that is not there
    assert content["goals"] == []
    where = content["environment"]
    assert (where["device"], where["gpu"], where["torch"]) == ("cpu", None, torch.__version__)
    assert "--quick" in where["command"]
    for name in ("results.csv", "times.png", "speedup.png"):
        assert (folder / name).stat().st_size > 0
    with (folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {row["section"] for row in table} == {"item", "checks", "rates", "times"}
    assert "5 pass, 0 fail, 1 left out" in said


def test_a_run_is_continued(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = json.loads((folder / "results.json").read_text())
    # what was done is kept; what was left out is tried again
    again = ("--case", "rates", "--case", "CUDA graph: complete*", "--case", "edge pass: no edges*")
    done = suite("--device", "cpu", "--quick", "--jobs", "0", "--resume", "--out", str(folder),
                 *again)  # fmt: skip
    assert "5 items are kept" in done.stdout
    assert "] 2 items" in done.stdout
    after = json.loads((folder / "results.json").read_text())
    assert after["times"] == before["times"]
    assert len(after["items"]) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out FOLDER is required"),
        (["--out", "x", "--minutes", "0"], "--minutes: expected more than 0"),
        (["--out", "x", "--minutes", "nan"], "--minutes: expected more than 0"),
        (["--out", "x", "--variant", "best"], "--variant: expected one of own ptxas, newer"),
        (["--out", "x", "--plant", "odd=*"], "--plant: expected KIND=PATTERN, KIND one of wrong"),
        (["--out", "x", "--plant", "wrong"], "--plant: expected KIND=PATTERN"),
        (["--out", "x", "--jobs", "-1"], "--jobs: expected at least 0"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    done = suite("--out", str(tmp_path), check=False)
    assert done.returncode == 2
    assert "PyTorch sees no GPU; --device cpu tries the suite itself" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_every_width_option_and_precision() -> None:
    table = checks.table(GPU)
    for precision in PRECISIONS:
        here = [case for _, case, p in table if p == precision]
        assert {16, 33, 64, 128} <= {case.hidden for case in here}
        assert {2, 3, 8, 16} <= {case.dim for case in here}
        options = [case.options for case in here]
        assert {o.activation for o in options} == {"silu", "relu", "leaky_relu"}
        assert {o.attention for o in options} == {o.coord_tanh for o in options} == {False, True}
        assert {o.coord_agg for o in options} == {"mean", "sum", None}
        assert {type(o.coord_norm) for o in options} == {type(None), str, float}
        assert {o.coord_clamp is None for o in options} == {False, True}
        assert {case.mask for case in here} == {None, "soft", "binary"}
    assert {"hub", "power", "isolated", "complete"} <= {case.graph for _, case, _ in table}
    assert any(case.edges == 0 and case.nodes > 0 for _, case, _ in table)


def test_the_items_of_a_gpu() -> None:
    names = list(items.all_items(GPU))
    assert len(set(names)) == len(names)
    for wanted in (
        "same bits: edge pass: bf16", "CUDA graph: complete: highest", "racecheck: H 64: bf16",
        "memcheck: all options: bf16", "speed: newer ptxas", "host: layer",
        "torch.compile: edge list: bf16", "E H beyond 2^31", "times: random-64: bf16",
        "times: radius-128: bf16", "times: fluid: bf16", "times: nbody: highest",
        "times: qm9: bf16", "kernels: bf16", "reach", "times: random-64 beside torch.compile: bf16",
        "no host synchronisation: complete: bf16", "equivariance: D 8: fp16",
        "NaN stays in its row: H 160: bf16", "approximate activations: bf16",
    ):  # fmt: skip
        assert wanted in names
    # each time of a large layer or edge pass rests on a check of the same size
    for case in cases.TIMED:
        for precision in case.precisions:
            row = {"case": case.name, "precision": precision}
            assert derive.check_of(row) in names or not case.is_one_pass


def test_sizes_that_are_timed() -> None:
    assert cases.BY_NAME["random-64"].num_edges == 32_000_000
    assert cases.BY_NAME["radius-128"].hidden == 128
    fluid = cases.BY_NAME["fluid"]
    assert (fluid.num_nodes, fluid.num_edges, fluid.layers) == (113_140, 1_706_973, 4)
    assert cases.BY_NAME["nbody"].sizes == (5,) * 100
    assert len(cases.BY_NAME["qm9"].sizes) == 96


# in a process of its own: Triton decides at its import whether kernels are interpreted
INTERPRETED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bench.gpu import checks, graphs, large, tune
from bench.gpu.setting import Outcome, Setting
from egnn_fast.backends import triton as triton_backend

found = {}
problem = large.Pass(graphs.random_graph(6, 20, "cpu"), 16)
found["right"] = large._compare(problem, "highest", "right").record()
backward = triton_backend.backward.Backward
collect = backward._collect
backward._collect = lambda self: [
    t if t is None else t * (1 + 3e-5) for t in collect(self)
]
found["wrong"] = large._compare(problem, "highest", "wrong").record()
backward._collect = collect

outcome = Outcome()
with checks.launched(outcome, "forward"):
    pass
found["idle"] = outcome.record()

own, blocks = triton_backend.call.blocks_for, tune._blocks(tune.Shape(16, 8, False), 3)
with tune.override("forward", blocks):
    found["overridden"] = [
        triton_backend.call.blocks_for("forward", "bf16", 64) == blocks,
        triton_backend.call.blocks_for("backward", "bf16", 64) == own("backward", "bf16", 64),
    ]
found["restored"] = triton_backend.call.blocks_for is own
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """What the script found."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(ROOT)], cwd=ROOT.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_wrong_kernel_is_found(interpreted: Any) -> None:
    assert interpreted["right"]["status"] == PASS
    wrong = interpreted["wrong"]
    assert wrong["status"] == FAIL
    assert "off by" in wrong["reason"]
    assert wrong["rows"]["checks"][0]["passed"] is False


def test_a_kernel_that_did_not_run_is_found(interpreted: Any) -> None:
    assert interpreted["idle"]["status"] == FAIL
    assert interpreted["idle"]["reason"] == "the forward kernel did not run"


def test_blocks_are_overridden_for_one_direction(interpreted: Any) -> None:
    assert interpreted["overridden"] == [True, True]
    assert interpreted["restored"] is True


def test_chunks_of_the_reference_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large.Pass(graphs.random_graph(7, 50, "cpu"), 8, attrs=2)
    assert problem.graph.perm is not None
    whole = problem.reference(None)
    monkeypatch.setattr(large, "CHUNK_NUMBERS", 8 * 11)
    for name, value in problem.reference(None).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)


def test_p_and_q_of_an_edge_pass_are_those_of_a_layer() -> None:
    """In autocast's dtype, where they are timed and where they are checked."""
    setting, low = Setting("cpu"), torch.bfloat16
    by_name = {case.name: case for case in cases.timed(setting)}
    problem = problems.build(by_name["edges-random-64"], setting)
    assert problems.at(problem, "highest", "cpu").inputs is problem.inputs
    found = problems.at(problem, "bf16", "cpu")
    dtypes = {name: t.dtype for name, t in found.inputs.items()}
    assert dtypes == {"p": low, "q": low, "x": torch.float32}
    m, x = found.forward(found.module)
    assert m.dtype == x.dtype == torch.float32
    leaves = list(found.inputs.values())
    grads = torch.autograd.grad(m.sum() + x.sum(), leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    layer = problems.build(by_name["random-64"], setting)
    assert problems.at(layer, "bf16", "cpu").inputs is layer.inputs

    own = large.Pass(graphs.random_graph(7, 50, "cpu"), 8)
    assert own.at("high").leaves == own.leaves
    rounded = own.at("bf16")
    assert {k for k, t in rounded.leaves.items() if t.dtype == low} == {"P", "Q"}
    gradients = rounded.reference("bf16")
    assert {k for k, t in gradients.items() if t.dtype == low} == {"gradient of P", "gradient of Q"}
    assert {t.dtype for t in rounded.reference(None).values()} == {torch.float64}


def test_radius_graph_is_that_of_all_pairs() -> None:
    for nodes, radius in ((200, 0.21), (50, 0.6), (9, 2.0)):
        x = graphs.positions(nodes, radius, "cpu")
        near = (torch.cdist(x.double(), x.double()) <= radius).fill_diagonal_(False)
        found = graphs.radius_graph(x, radius)
        edges = torch.stack((found.receivers, found.sorted_senders()))
        assert torch.equal(edges, near.nonzero().T)
    kept = graphs.with_edges(found, 5)
    assert kept.num_edges == 5
    with pytest.raises(ValueError, match="the graph has 5, 6 were asked for"):
        graphs.with_edges(kept, 6)
    assert graphs.cutoff(1000, 32) ** 3 * 1000 * 4 / 3 * math.pi == pytest.approx(32)


def test_regular_graph() -> None:
    graph = graphs.regular_graph(5, 3, "cpu")
    assert (graph.num_nodes, graph.num_edges) == (5, 15)
    assert graph.degree.tolist() == [3] * 5
    assert graph.shared_edge_index().max() < 5


def item(name: str, run: Any, **more: Any) -> Item:
    return Item(name, more.pop("section", "checks"), run, **more)


def test_an_exception_fails_its_item_alone() -> None:
    def explode(setting: Setting) -> Outcome:
        raise ValueError("a\n  reason")

    told: list[tuple[str, str, str]] = []
    left = children.run(
        [item("one", explode), item("two", lambda s: Outcome()), item("late", None, seconds=1e9)],
        CPU, jobs=0, deadline=time.monotonic() + 60,
        done=lambda i, outcome, s: told.append((i.name, outcome.status, outcome.reason)),
    )  # fmt: skip
    assert told[0][:2] == ("one", FAIL)
    assert told[0][2].startswith("ValueError: a reason (test_gpu_suite.py:")
    assert told[1:] == [("two", PASS, "")]
    assert [i.name for i in left] == ["late"]


CHILD = """
import json, sys, time
for line in sys.stdin:
    name = line.strip()
    if name == "die":
        print("a last word", file=sys.stderr); sys.exit(3)
    if name == "hang":
        time.sleep(60)
    print("noise")
    print("@@ " + json.dumps({"status": "pass", "reason": name, "rows": {}}), flush=True)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_dies_or_hangs_takes_one_item_with_it(jobs: int) -> None:
    told: dict[str, tuple[str, str]] = {}
    names = ("a", "die", "b", "hang", "c")
    children.run(
        [item(name, None, limit=2.0, seconds=1, alone=name == "c") for name in names], GPU,
        jobs=jobs, deadline=time.monotonic() + 60, command=[sys.executable, "-c", CHILD],
        done=lambda i, outcome, s: told.update({i.name: (outcome.status, outcome.reason)}),
    )  # fmt: skip
    assert {name: told[name] for name in "abc"} == {name: (PASS, name) for name in "abc"}
    assert told["die"] == (FAIL, "its process ended with status 3: a last word")
    assert told["hang"] == (FAIL, "not done after 2 s, so it was ended")


RACES = "RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"
NO_RACES = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"


@pytest.mark.parametrize(
    ("tool", "status", "said", "expected"),
    [
        ("memcheck", 0, f"{sanitizer.DONE}\n=== ERROR SUMMARY: 0 errors", PASS),
        ("memcheck", 1, "=== Invalid __global__ read of size 4\n=== ERROR SUMMARY: 2 errors", FAIL),
        ("memcheck", 1, "Traceback\n=== ERROR SUMMARY: 0 errors", FAIL),
        ("memcheck", 0, "=== ERROR SUMMARY: 0 errors", FAIL),
        ("memcheck", 1, "unable to attach", LEFT_OUT),
        ("racecheck", 0, f"{sanitizer.DONE}\n=== {NO_RACES}", PASS),
        ("racecheck", 0, f"{sanitizer.DONE}\n=== {RACES}", FAIL),
        ("racecheck", 1, f"Traceback\n=== {NO_RACES}", FAIL),
    ],
)
def test_what_compute_sanitizer_says(tool: str, status: int, said: str, expected: str) -> None:
    assert sanitizer.outcome_of(tool, status, said).status == expected


def test_sanitized_cases_are_among_those_whose_kernels_the_smoke_compiles() -> None:
    smoked = {(s.name, s.precision) for s in smoke.cases(GPU)}
    for check in sanitizer.CHECKS:
        assert (check.case, check.precision) in smoked

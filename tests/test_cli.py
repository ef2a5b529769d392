from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbody import cache_of

import egnn_fast
from egnn_fast import backends, checks, cli
from egnn_fast.experiments.io import CACHE_VARIABLE
from egnn_fast.experiments.nbody import data, speed
from egnn_fast.experiments.nbody import run as run_module
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import DataSpec
from egnn_fast.experiments.nbody.summary import PAPER
from egnn_fast.experiments.nbody.train import train

PNG = b"\x89PNG\r\n\x1a\n"
TRAIN = ["train", "nbody", "--hidden", "8", "--layers", "2", "--train-systems", "60"]
TRAIN += ["--batch-size", "20", "--test-every", "1"]

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as error:
            cli.main([str(arg) for arg in args])
        streams = capsys.readouterr()
        return int(error.value.code or 0), streams.out, streams.err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """The official data from this test run's cache; short timing."""
    monkeypatch.setattr(speed, "ROUNDS", 2)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache_of(DataSpec())))
    monkeypatch.setattr(speed, "SECONDS", 0.01)


def refused(outcome: Outcome, *words: object, code: int = 2) -> None:
    """One line on stderr, with the words in it."""
    assert outcome[0] == code
    assert outcome[2].startswith("error: ")
    assert outcome[2].count("\n") == 1
    for word in words:
        assert str(word) in outcome[2]


def test_help_and_version(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in ("info", "check", "train"))
    assert call("--version")[:2] == (0, egnn_fast.__version__ + "\n")
    code, out, _ = call("train", "nbody", "--help")
    assert code == 0
    assert all(f"--{f}" in out for f in ("epochs", "seed", "backend", "device", "out", "resume"))


def test_the_installed_command_is_this_one() -> None:
    command = [sys.executable, "-m", "egnn_fast.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, egnn_fast.__version__ + "\n")


def test_info_names_each_backend_and_why(call: Call) -> None:
    code, out, _ = call("info")
    assert code == 0
    assert all(name in out for name in backends.BACKENDS)
    code, out, _ = call("info", "--json")
    found = {line["name"]: line for line in json.loads(out)["backends"]}
    assert code == 0
    assert found == {line.name: line._asdict() for line in backends.info()}
    assert found["reference"]["available"]


@pytest.mark.usefixtures("without_triton")
def test_check_passes_and_tells_the_errors(call: Call) -> None:
    code, out, _ = call("check", "--quick", "--backend", "cpu", "--dtype", "float64")
    assert code == 0
    assert "PASSED" in out
    assert "rotation" in out
    assert "gradients" in out
    assert "float32" not in out
    code, out, _ = call("check", "--quick", "--dtype", "float32", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["passed"]
    assert {row["backend"] for row in report["rows"]} == {"cpu"}


def test_check_fails_where_an_error_is_too_large(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = checks.Row("cpu", "float64", "some case", "outputs", 1e-3, 1e-11, "h")
    report = checks.Report((row,), (), {"cuda": "not here"}, 0.0)
    monkeypatch.setattr(checks, "run", lambda *args: report)
    code, out, _ = call("check")
    assert code == 1
    assert "FAILED: 0 of 1" in out
    assert "not here" in out
    assert call("check", "--json")[0] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["train", "nonsense"], ["nonsense"]),
        (["info", "--nonsense"], ["--nonsense"]),
        (["check", "--backend", "tpu"], ["--backend", "tpu", "reference"]),
        (["check", "--backend", "auto"], ["auto"]),
        (["check", "--backend", "cuda"], ["cuda"]),
        (["check", "--dtype", "int8"], ["--dtype", "int8"]),
        (["train", "nbody", "--epochs"], ["--epochs"]),
        (["train", "nbody", "--epochs", "many"], ["--epochs"]),
        (["train", "nbody", "--epochs", "0"], ["--epochs", "at least 1", "0"]),
        (["train", "nbody", "--lr", "-1"], ["--lr", "positive", "-1"]),
        (["train", "nbody", "--seed", "-3"], ["--seed", "-3"]),
        (["train", "nbody", "--batch-size", "4000"], ["--batch-size", "4000"]),
        (["train", "nbody", "--backend", "cuda"], ["--backend", "cuda", "triton"]),
        (["train", "nbody", "--backend", "tpu"], ["--backend", "tpu", "reference"]),
        (["train", "nbody", "--device", "[tpu]"], ["--device", "[tpu]"]),
        (["train", "nbody", "--precision", "8"], ["--precision", "8"]),
        (["train", "nbody", "extra"], ["extra"]),
    ],
)
def test_wrong_arguments_are_one_line(args: list[str], words: list[str], call: Call) -> None:
    refused(call(*args), *words)


def test_no_command_shows_the_help(call: Call) -> None:
    code, out, err = call()
    assert code == 2
    assert "train" in out
    assert err == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--backend", "triton", "--precision", "64-true"], ["--backend", "triton"]),
        (["--device", "cuda:99"], ["--device", "cuda:99"]),
        (["--resume"], ["--resume", "no run"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(
    args: list[str], words: list[str], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load_arrays", None)
    refused(call(*TRAIN, "--out", tmp_path / "out", *args), *words)


def test_an_output_folder_that_cannot_be_written_is_told_before_any_work(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load_arrays", None)
    (tmp_path / "file").write_text("in the way")
    refused(call(*TRAIN, "--out", tmp_path / "file"), "--out", tmp_path / "file")
    refused(call(*TRAIN, "--out", "/dev/null/x"), "--out", "/dev/null/x")


@pytest.mark.usefixtures("quick")
def test_training_from_start_to_pictures(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    code, told, err = call(*TRAIN, "--epochs", 3, "--out", out, "--backend", "cpu", "--seed", 5)
    assert (code, err) == (0, "")
    assert "egnn_fast" in told
    assert all(f"{value:.4f}" in told for value in PAPER.values())
    for name in ("curve.png", "trajectories.png", "metrics.csv", "best.pt", "summary.json"):
        assert str(out / name) in told
        assert (out / name).exists()
    assert (out / "curve.png").read_bytes().startswith(PNG)
    assert (out / "trajectories.png").read_bytes().startswith(PNG)
    summary = json.loads((out / "summary.json").read_text())
    rows = (out / "metrics.csv").read_text().splitlines()[1:]
    best = min(rows, key=lambda row: float(row.split(",")[2]))
    assert summary["best"]["epoch"] == int(best.split(",")[0])
    assert summary["best"]["test_mse"] == float(best.split(",")[3])
    assert summary["options"]["seed"] == 5
    assert summary["epochs_done"] == 3
    rates = summary["steps_per_second"]
    assert rates["ratio"] == rates["run"] / rates["reference"] > 0
    assert rates["backend"].startswith("cpu")


@pytest.mark.usefixtures("quick")
def test_resuming_by_command(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call(*TRAIN, "--epochs", 2, "--out", out)[0] == 0
    refused(call(*TRAIN, "--out", out), "--resume", "--overwrite")
    refused(call("train", "nbody", "--out", out, "--resume", "--lr", 1), "--lr", "0.0005", "1.0")
    refused(call("train", "nbody", "--out", out, "--resume", "--epochs", 1), "--epochs", "2 epochs")
    # options that are not given are those of the run
    assert call("train", "nbody", "--out", out, "--resume", "--epochs", 4)[0] == 0
    straight = tmp_path / "straight"
    assert call(*TRAIN, "--epochs", 4, "--out", straight)[0] == 0
    assert (out / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    code, told, _ = call("train", "nbody", "--out", out, "--resume")
    assert code == 0
    assert "all 4 epochs are done" in told
    assert (out / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    assert call(*TRAIN, "--epochs", 1, "--out", out, "--overwrite")[0] == 0
    assert (out / "metrics.csv").read_text().count("\n") == 2


@pytest.mark.usefixtures("quick")
def test_damaged_files_are_one_line(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call(*TRAIN, "--epochs", 1, "--out", out)[0] == 0
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    refused(call(*TRAIN, "--out", out, "--resume"), last, "corrupt or truncated", code=1)


def test_a_damaged_data_set_is_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    path = data.cache_path(DataSpec())
    path.write_bytes(b"broken")
    refused(call(*TRAIN, "--out", tmp_path / "run"), path, "corrupt", "delete it", code=1)


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_is_done(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def interrupted(*args: Any, on_epoch: Any, **kwargs: Any) -> Any:
        def tell(report: Any) -> None:
            if report.epoch == 1:
                raise KeyboardInterrupt

        return train(*args, on_epoch=tell, **kwargs)

    monkeypatch.setattr(run_module, "train", interrupted)
    code, told, err = call(*TRAIN, "--epochs", 3, "--out", out)
    assert code == 130
    assert "--resume goes on" in told
    assert "Traceback" not in told + err
    assert (out / "metrics.csv").read_text().count("\n") == 3


def test_ctrl_c_before_training_promises_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(data, "generate", interrupted)
    code, told, err = call(*TRAIN, "--out", tmp_path / "run")
    assert code == 130
    assert "--resume" not in told
    assert "Traceback" not in told + err
    assert not list((tmp_path / "cache").iterdir())


def test_the_defaults_are_the_official_ones() -> None:
    assert dataclasses.asdict(Config()) == {
        "epochs": 300,
        "seed": 1,
        "lr": 5e-4,
        "weight_decay": 1e-12,
        "batch_size": 100,
        "hidden": 64,
        "layers": 4,
        "train_systems": 3000,
        "test_every": 5,
        "backend": "auto",
        "device": "cpu",
        "precision": "32-true",
    }

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from nbody import TINY, golden, official, small
from torch import Tensor

from egnn_fast.experiments import checkpoint
from egnn_fast.experiments.errors import CheckpointError, TrainingError, UsageError
from egnn_fast.experiments.nbody import train as module
from egnn_fast.experiments.nbody.config import Config
from egnn_fast.experiments.nbody.data import linear_error
from egnn_fast.experiments.nbody.folder import History, RunFolder
from egnn_fast.experiments.nbody.task import NBodyModel, Trainer, batches, make_model
from egnn_fast.experiments.nbody.train import make_trainer, train, try_out


def first_losses(backend: str) -> list[float]:
    right = golden("first30")
    model = NBodyModel(backend=backend)
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in right.items() if "/" in k}
    model.egnn.load_state_dict(state)
    trainer = Trainer(Fabric(accelerator="cpu", devices=1), model, 5e-4, 1e-12)
    order = torch.arange(3000)
    return [float(trainer.step(batch)) for batch in batches(official().train, order, 100)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_first_losses_are_the_official_ones(backend: str) -> None:
    right = torch.from_numpy(golden("first30")["losses"])
    found = torch.tensor(first_losses(backend), dtype=torch.float64)
    assert found.shape == (30,)
    assert ((found - right) / right).abs().max() <= 1e-4


def test_initial_weights_are_the_official_ones_to_the_bit() -> None:
    before = torch.random.get_rng_state()
    state = make_model(1, hidden=64, layers=4, backend=None).egnn.state_dict()
    right = {k.removeprefix("state/"): v for k, v in golden("first30").items() if "/" in k}
    assert list(state) == list(right)
    assert all((state[key].numpy() == right[key]).all() for key in right)
    assert (torch.random.get_rng_state() == before).all()


def test_batches_cover_an_epoch_and_drop_the_rest() -> None:
    systems = small().train
    order = torch.randperm(40)
    found = list(batches(systems, order, 12))
    assert [len(batch) for batch in found] == [12, 12, 12]
    assert (torch.cat([b.target for b in found]) == systems.target[order[:36]]).all()
    assert (torch.cat([b.edge_attr for b in found]) == systems.edge_attr[order[:36]]).all()


def test_systems_do_not_see_each_other() -> None:
    trainer = make_trainer(TINY)
    systems = small().val
    alone = torch.cat([trainer.predict(systems[k : k + 1]) for k in range(len(systems))])
    assert torch.allclose(trainer.predict(systems), alone, atol=1e-6)


def test_evaluation_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(TINY)
    whole = trainer.evaluate(small().val)
    monkeypatch.setattr("egnn_fast.experiments.nbody.task.EVAL_BATCH", 5)
    assert trainer.evaluate(small().val) == pytest.approx(whole, rel=1e-6)
    error = trainer.predict(small().val) - small().val.target
    assert whole == pytest.approx(float((error**2).mean()), rel=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_training_learns() -> None:
    data = official()
    trainer = make_trainer(dataclasses.replace(TINY, lr=5e-3))
    for _ in range(8):
        trainer.epoch(data.train[:500], torch.arange(500), 20)
    # better than the best straight lines
    error = trainer.evaluate(data.test)
    assert error < 0.9 * linear_error(data.test, 0.724)


@pytest.mark.filterwarnings("ignore:no fused kernel")  # for bfloat16 there is none
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions_train(precision: str) -> None:
    config = dataclasses.replace(TINY, precision=precision)
    trainer = make_trainer(config)
    dtype = module.data_dtype(config)
    systems = small().train
    typed = dataclasses.replace(
        systems, **{f.name: getattr(systems, f.name).to(dtype) for f in dataclasses.fields(systems)}
    )
    losses = [trainer.epoch(typed, torch.arange(40), 10) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert next(trainer.model.parameters()).dtype == dtype
    right = make_trainer(TINY).epoch(systems, torch.arange(40), 10)
    assert losses[0] == pytest.approx(right, rel=1e-6 if precision == "64-true" else 0.05)


# ---- resuming ----------------------------------------------------------------------------------


def go(folder: Path, epochs: int = TINY.epochs, *, resume: bool = False) -> History:
    run = RunFolder(folder, resume=resume)
    saved = run.load_run() if resume else None
    config = dataclasses.replace(TINY, epochs=epochs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is far too small for more
    try:
        return train(config, small(), run, resume=saved)[1]
    finally:
        torch.set_num_threads(threads)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = [flat(v, f"{name}/{k}") for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [flat(v, f"{name}/{k}") for k, v in enumerate(value)]
    else:
        return {name: value}
    return {k: v for part in parts for k, v in part.items()}


def same_bits(a: Path, b: Path) -> bool:
    """Metrics, last and best checkpoint."""
    if (a / "metrics.csv").read_bytes() != (b / "metrics.csv").read_bytes():
        return False
    for name in ("last.pt", "best.pt"):
        x, y = (flat(torch.load(folder / name, weights_only=True)) for folder in (a, b))
        if x.keys() != y.keys():
            return False
        for key, value in x.items():
            if isinstance(value, Tensor):
                equal = value.dtype == y[key].dtype and value.numpy().tobytes() == (
                    y[key].numpy().tobytes()
                )
            else:
                equal = value == y[key]
            if not equal and key != "/config/epochs":
                return False
    return True


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    history = go(folder)
    assert len(history) == TINY.epochs
    return folder


def test_metrics_have_a_line_for_each_epoch(uninterrupted: Path) -> None:
    saved = RunFolder(uninterrupted, resume=True).load_run()
    history: History = saved["history"]
    header, *rows = (uninterrupted / "metrics.csv").read_text().splitlines()
    assert header == "epoch,train_mse,val_mse,test_mse"
    assert len(rows) == TINY.epochs
    for epoch, row in enumerate(rows):
        number, loss, val, test = row.split(",")
        assert int(number) == epoch
        assert float(loss) == history.train[epoch]
        assert (val != "") == (test != "") == (epoch % TINY.test_every == 0)
    best = RunFolder(uninterrupted, resume=True).load_best()
    vals = [v for v in history.val if not math.isnan(v)]
    assert best["val_mse"] == min(vals)
    assert history.test[best["epoch"]] == best["test_mse"]


def test_the_best_checkpoint_has_the_error_it_says(uninterrupted: Path) -> None:
    trainer = make_trainer(TINY)
    folder = RunFolder(uninterrupted, resume=True)
    best = folder.load_best()
    checkpoint.load_state(trainer.model.egnn, best["model"], folder.best)
    assert trainer.evaluate(small().val) == best["val_mse"]
    assert trainer.evaluate(small().test) == best["test_mse"]


def test_another_run_has_the_same_bits_and_another_seed_has_not(
    uninterrupted: Path, tmp_path: Path
) -> None:
    go(tmp_path / "same")
    assert same_bits(tmp_path / "same", uninterrupted)
    train(dataclasses.replace(TINY, seed=2), small(), RunFolder(tmp_path / "other"))
    assert not same_bits(tmp_path / "other", uninterrupted)


def test_a_finished_run_continues_to_more_epochs(uninterrupted: Path, tmp_path: Path) -> None:
    go(tmp_path, epochs=3)
    go(tmp_path, resume=True)
    assert same_bits(tmp_path, uninterrupted)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("when", range(1, 11))
def test_a_run_that_dies_at_any_write_resumes_to_the_bit(
    when: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # dies just before the file gets its name, at each file in turn: the first is the start's
    # last.pt, the second metrics.csv
    count = 0
    replace = os.replace

    def die(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == when:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            go(tmp_path)
    go(tmp_path, resume=(tmp_path / "last.pt").exists())
    assert same_bits(tmp_path, uninterrupted)


SCRIPT = """
import sys
from pathlib import Path
folder, how, *sys.path[:0] = sys.argv[1:]
from test_nbody_train import go
go(Path(folder), epochs=120, resume=how == "resume")
"""


def started(folder: Path, how: str) -> subprocess.Popen[bytes]:
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent / "support")]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), how, *paths])


def written_rows(folder: Path) -> int:
    metrics = folder / "metrics.csv"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    right, folder = tmp_path / "right", tmp_path / "killed"
    with started(right, "start") as process:
        assert process.wait(timeout=120) == 0
    for rows, how in ((15, "start"), (60, "resume")):
        with started(folder, how) as process:
            while process.poll() is None and written_rows(folder) < rows:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert rows <= written_rows(folder) <= 120
    with started(folder, "resume") as process:
        assert process.wait(timeout=120) == 0
    assert same_bits(folder, right)
    assert not list(folder.glob(".tmp-*"))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    data = small()
    target = data.train.target.clone()
    target[3, 0, 0] = math.nan
    poisoned = dataclasses.replace(data, train=dataclasses.replace(data.train, target=target))
    with pytest.raises(TrainingError, match=r"nan in epoch 0.*--lr.*last\.pt"):
        train(TINY, poisoned, RunFolder(tmp_path))
    assert RunFolder(tmp_path, resume=True).load_run()["epochs"] == 0


# ---- folders and checkpoints that are not right --------------------------------------------------


def test_a_run_is_neither_overwritten_nor_continued_unasked(tmp_path: Path) -> None:
    go(tmp_path, epochs=1)
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / ".tmp-last.pt-abc").write_text("left over by a kill")
    with pytest.raises(UsageError, match=r"--out.*--resume.*--overwrite"):
        RunFolder(tmp_path)
    with pytest.raises(UsageError, match="exclude"):
        RunFolder(tmp_path, resume=True, overwrite=True)
    RunFolder(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UsageError, match="no run"):
        RunFolder(tmp_path, resume=True)
    with pytest.raises(UsageError, match="no run"):
        RunFolder(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UsageError, match=f"--out: cannot write.*{path}"):
            RunFolder(path)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda b: b"", "corrupt or truncated"),
        (lambda b: b"not a checkpoint", "corrupt or truncated"),
        (lambda b: b[: len(b) // 2], "corrupt or truncated"),
        (lambda b: b[:5000] + bytes([b[5000] ^ 1]) + b[5001:], "corrupt"),
    ],
    ids=["empty", "text", "half", "one bit"],
)
def test_a_damaged_checkpoint_is_named(
    damage: Any, match: str, uninterrupted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(damage((uninterrupted / "last.pt").read_bytes()))
    with pytest.raises(CheckpointError, match=match) as error:
        RunFolder(tmp_path, resume=True).load_run()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_kind_is_named(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes((uninterrupted / "best.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"last\.pt.*another kind.*run.*model"):
        RunFolder(tmp_path, resume=True).load_run()
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"last\.pt.*another kind"):
        RunFolder(tmp_path, resume=True).load_run()
    torch.save({"kind": "egnn_fast n-body run, version 1", "epochs": 3, "more": 1}, path)
    with pytest.raises(CheckpointError, match=r"missing keys .*model.*unexpected keys more"):
        RunFolder(tmp_path, resume=True).load_run()


def edited(uninterrupted: Path, tmp_path: Path, edit: Any) -> RunFolder:
    content = torch.load(uninterrupted / "last.pt", weights_only=True)
    edit(content)
    torch.save(content, tmp_path / "last.pt")
    return RunFolder(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c["model"].pop("gcl_0.edge_mlp.0.bias"), "missing keys gcl_0.edge_mlp.0.bias"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "unexpected keys extra"),
        (
            lambda c: c["model"].update({"embedding.bias": torch.ones(3)}),
            r"wrong shapes embedding.bias \(3,\) for \(8,\)",
        ),
        (lambda c: c.update(model=3), "no mapping"),
        (lambda c: c["optimizer"].update(param_groups=[]), "does not fit"),
        (lambda c: c.update(optimizer={}), "does not fit"),
        (lambda c: c.update(shuffle=torch.zeros(3, dtype=torch.uint8)), "does not fit"),
        (lambda c: c.update(history=torch.zeros(2, 3)), "history"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    edit: Any, match: str, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = edited(uninterrupted, tmp_path, edit)
    with pytest.raises(CheckpointError, match=match) as error:
        train(TINY, small(), folder, resume=folder.load_run())
    assert str(folder.last) in str(error.value)


def test_options_of_another_run_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    saved = RunFolder(uninterrupted, resume=True).load_run()["config"]
    config = Config.from_checkpoint(saved, tmp_path)
    assert config == TINY
    assert config.resumed({"epochs": 9, "lr": TINY.lr}) == dataclasses.replace(TINY, epochs=9)
    with pytest.raises(UsageError, match=r"--batch-size.* started with 10, got 20"):
        config.resumed({"batch_size": 20})
    for wrong in ({"epochs": 3}, {**saved, "new": 1}, {**saved, "lr": -1.0}, {**saved, "lr": "a"}):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            Config.from_checkpoint(wrong, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"seed": -1}, "--seed"),
        ({"lr": 0.0}, "--lr"),
        ({"lr": math.nan}, "--lr"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 3001}, "--batch-size"),
        ({"train_systems": 10001}, "--train-systems"),
        ({"hidden": 0}, "--hidden"),
        ({"layers": 0}, "--layers"),
        ({"test_every": 0}, "--test-every"),
        ({"backend": "cuda"}, "--backend"),
        ({"device": "tpu"}, "--device"),
        ({"device": "cuda:x"}, "--device"),
        ({"precision": "16"}, "--precision"),
    ],
)
def test_impossible_options_are_named(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Config(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"device": "cuda:99"}, {"backend": "triton", "precision": "64-true"}]
)
def test_what_cannot_run_here_is_told_before_any_work(wrong: dict[str, str]) -> None:
    name = next(iter(wrong))
    config = Config(**{**TINY.to_dict(), **wrong})
    with pytest.raises(UsageError, match=f"--{name}"):
        try_out(config)


def test_trying_out_changes_nothing() -> None:
    before = torch.random.get_rng_state()
    try_out(TINY)
    assert (torch.random.get_rng_state() == before).all()

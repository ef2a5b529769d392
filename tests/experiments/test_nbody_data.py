from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nbody import SMALL, cache_at, cache_of, golden, official, small

from egnn_fast import Graph
from egnn_fast.experiments.errors import CacheError, UsageError
from egnn_fast.experiments.io import cache_folder
from egnn_fast.experiments.nbody import data as module
from egnn_fast.experiments.nbody.data import (
    Arrays,
    DataSpec,
    cache_path,
    generate,
    linear_error,
    load_arrays,
    read_arrays,
    splits,
    still_error,
    write_arrays,
)


@pytest.fixture
def arrays() -> Arrays:
    with cache_at(cache_of(SMALL)):
        return load_arrays(SMALL)


def equal(a: Arrays, b: Arrays) -> bool:
    return all((getattr(a, f.name) == getattr(b, f.name)).all() for f in dataclasses.fields(a))


def test_known_errors_of_the_official_test_set() -> None:
    test = official().test
    assert still_error(test) == pytest.approx(0.27147, abs=5e-6)
    assert linear_error(test, 0.724) == pytest.approx(0.08348, abs=5e-6)


def test_official_systems_are_the_golden_ones() -> None:
    right, found = golden("seed43"), official()
    train = found.train[:4]
    assert (len(found.train), len(found.val), len(found.test)) == (3000, 2000, 2000)
    assert (train.x.numpy() == right["loc"][:4, 30].transpose(0, 2, 1).astype("f4")).all()
    assert (train.v.numpy() == right["vel"][:4, 30].transpose(0, 2, 1).astype("f4")).all()
    assert (train.target.numpy() == right["loc"][:4, 40].transpose(0, 2, 1).astype("f4")).all()
    chaotic = found.test[12366 - 12000 : 12366 - 12000 + 1]
    assert (chaotic.target[0].numpy() == right["loc"][4, 40].T.astype("f4")).all()
    assert (chaotic.charges[0].numpy() == right["charges"][4, :, 0]).all()


def test_edge_attributes_follow_the_edges_of_a_complete_graph() -> None:
    systems = small().val
    receiver, sender = Graph.complete([5]).edge_index
    for k in range(len(systems)):
        q, x = systems.charges[k], systems.x[k]
        assert (systems.edge_attr[k, :, 0] == q[receiver] * q[sender]).all()
        distance = (x[receiver] - x[sender]).norm(dim=1)
        assert torch.allclose(systems.edge_attr[k, :, 1].sqrt(), distance, atol=1e-6)
        assert torch.allclose(systems.h[k, :, 0], systems.v[k].norm(dim=1), atol=1e-6)


def test_parts_are_taken_after_all_training_draws() -> None:
    # 50 training systems are drawn, 40 used
    whole = generate(dataclasses.replace(SMALL, train=50))
    part = generate(SMALL)
    assert (whole.x_in[:40] == part.x_in[:40]).all()
    assert (whole.x_in[50:] == part.x_in[40:]).all()
    assert len(part.x_in) == SMALL.size == 60


def test_float64_keeps_the_simulated_digits(arrays: Arrays) -> None:
    with cache_at(cache_of(SMALL)):
        train = splits(SMALL, dtype=torch.float64).train
    assert train.x.dtype == torch.float64
    assert (train.x.numpy() == arrays.x_in[:40].transpose(0, 2, 1)).all()


def test_cache_is_written_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: Arrays
) -> None:
    monkeypatch.setenv("EGNN_FAST_CACHE", str(tmp_path / "new" / "folder"))
    first = load_arrays(SMALL)
    monkeypatch.setattr(module, "generate", None)  # would fail if it were called again
    assert equal(load_arrays(SMALL), first)
    assert equal(first, arrays)
    assert [p.name for p in cache_folder().iterdir()] == [SMALL.file_name]


def test_every_parameter_changes_the_name() -> None:
    changed = {"drawn_train": 60, "frame_in": 0, "frame_out": 2, "length": 600, "sample_every": 50}
    names = {SMALL.file_name}
    for field in dataclasses.fields(SMALL):
        value = changed.get(field.name, getattr(SMALL, field.name) - 1)
        names.add(dataclasses.replace(SMALL, **{field.name: value}).file_name)
    assert len(names) == len(dataclasses.fields(SMALL)) + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b"no archive at all",
        lambda b: b[: len(b) // 2],
        lambda b: b[:-1],
        lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:],
        lambda b: b[: len(b) // 2] + bytes(64) + b[len(b) // 2 + 64 :],
    ],
    ids=["empty", "text", "half", "last byte", "one bit", "zeros"],
)
def test_a_damaged_cache_is_named(damage: Any, tmp_path: Path, arrays: Arrays) -> None:
    with cache_at(tmp_path):
        path = cache_path(SMALL)
        write_arrays(path, arrays, SMALL)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CacheError, match="delete it") as error:
            load_arrays(SMALL)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "data.npz"
    write_arrays(path, arrays, SMALL)
    whole = path.read_bytes()
    noticed = 0
    for place in np.random.default_rng(1).integers(0, len(whole), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = read_arrays(path, SMALL)
        except CacheError:
            noticed += 1
        else:  # in a time stamp, say
            assert equal(found, arrays)
    assert noticed > 100


def test_a_file_under_a_wrong_name_is_refused(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "data.npz"
    write_arrays(path, arrays, dataclasses.replace(SMALL, seed=44))
    with pytest.raises(CacheError, match="other parameters"):
        read_arrays(path, SMALL)


def test_changed_numbers_with_valid_archive_are_refused(tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "data.npz"
    write_arrays(path, arrays, SMALL)
    with np.load(path) as file:
        content = dict(file)
    content["x_in"] = content["x_in"].copy()
    content["x_in"][0, 0, 0] += 1e-12
    np.savez(path, **content)
    with pytest.raises(CacheError, match="checksum"):
        read_arrays(path, SMALL)
    content["meta"] = np.array(json.dumps({"format": 0}))
    np.savez(path, **content)
    with pytest.raises(CacheError, match="corrupt"):
        read_arrays(path, SMALL)


def test_a_write_that_dies_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: Arrays
) -> None:
    def die(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_arrays(tmp_path / "data.npz", arrays, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_that_cannot_be_written_fails_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EGNN_FAST_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(module, "generate", None)
    with pytest.raises(UsageError, match=r"EGNN_FAST_CACHE.*folder"):
        load_arrays(SMALL)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGNN_FAST_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"
    monkeypatch.delenv("EGNN_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/egnn_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "egnn_fast"


@pytest.mark.parametrize(
    "wrong",
    [{"train": 0}, {"train": 51}, {"frame_in": 3}, {"frame_out": 4}, {"frame_in": -1}],
)
def test_impossible_sets_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected"):
        dataclasses.replace(SMALL, **wrong)


def test_the_default_is_the_official_set() -> None:
    spec = DataSpec()
    assert (spec.frames, spec.size, spec.drawn_train) == (49, 7000, 10000)

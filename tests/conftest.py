"""What every test runs in: a fixed seed, and nothing left behind for the next test."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Of several processes at once each has one thread, and so have its children: what threads do is
# tested alone. OpenMP reads it once, when PyTorch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

# Triton reads it while its kernels are imported. The tests' tensors lie on the CPU, on a machine
# with a GPU too: what only a GPU can show is not tested here.
os.environ["TRITON_INTERPRET"] = "1"
# what tests share; and bench/, the checkout's own folder, is not installed
sys.path.append(str(Path(__file__).resolve().with_name("support")))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from egnn_fast import backends, checks
from egnn_fast.backends import available, decision
from egnn_fast.runtime import native

pytest.register_assert_rewrite(
    *(path.stem for path in Path(__file__).with_name("support").glob("*.py"))
)
# the same examples in each run, so that a change is to blame for a failure
settings.register_profile("egnn_fast", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("brief", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("egnn_fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alone", action="store_true", help="only the tests that -n leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """No test marked alone under -n, and only these under --alone."""
    only, parallel = config.getoption("--alone"), "PYTEST_XDIST_WORKER" in os.environ
    if only or parallel:
        left_out = [item for item in items if bool(item.get_closest_marker("alone")) != only]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@functools.cache
def shared_by(path: Path) -> str | None:
    """What the tests of a file share and should be made once: they run on one worker."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "from nbody import" in text:
        return "n-body data"
    return str(path) if 'scope="module"' in text else None


# pytest-xdist's own groups (--dist loadgroup) are lost in pytest 9.2: its issue 1386
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Any test to any worker, but for those that share what takes long to make; these first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_by(config.rootpath / nodeid.split("::")[0]) or nodeid

    return Scheduler(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENV_BACKEND, raising=False)
    monkeypatch.setattr(decision, "_warned", set())
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    isa = None if native.core is None else native.core.instruction_set()
    yield
    torch.set_num_threads(threads)
    if native.core is not None:
        native.core.set_instruction_set(isa)


@pytest.fixture(autouse=True)
def _known_builtins(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("interpreted"):
        import interpreter

        interpreter.know_builtins()


@pytest.fixture
def one_thread() -> None:
    """For many small problems: threads would wait for each other longest."""
    torch.set_num_threads(1)


@pytest.fixture
def bfloat16() -> Iterator[None]:
    """Triton's interpreter computes bfloat16 rightly, and its sums go through parts of it."""
    import interpreter

    with interpreter.bfloat16():
        yield


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is not installed."""
    monkeypatch.setattr(available, "find_spec", lambda name: None)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, and integers far out of range: what is not written shows."""
    with checks.poisoned_memory():
        yield

"""Which backend runs, how it is chosen, and what is said about it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from cases import FUSED_BACKENDS, kernel_calls
from torch import Tensor

import egnn_fast
from egnn_fast import BackendError, Options, backends, functional, kernels
from egnn_fast.backends import decision
from egnn_fast.checks.cases import Case
from egnn_fast.runtime import native
from egnn_fast.weights import LayerWeights

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case("backends", nodes=6, edges=20, features=3)


def layer(
    backend: str | None = None, dtype: torch.dtype = torch.float32, **kwargs: object
) -> Tensor:
    leaves = CASE.layer(dtype).leaves
    weights = LayerWeights(**{k: leaves[k] for k in LayerWeights._fields if k in leaves})
    return functional.egcl(
        leaves["h"],
        leaves["x"],
        CASE.build_graph(),
        weights,
        Options(),
        backend=backend,
        **kwargs,  # type: ignore[arg-type]
    )[0]


def fused() -> bool:
    """Whether a call without a backend of its own runs the CPU kernel."""
    assert native.core is not None, native.load_error
    before = native.core.calls()[0]
    layer()
    return bool(native.core.calls()[0] > before)


def test_the_cpu_kernel_is_there() -> None:
    assert "cpu" in FUSED_BACKENDS
    assert backends.unavailable("cpu") is None, backends.unavailable("cpu")


def test_auto_takes_the_kernel() -> None:
    for name in (None, "auto", "cpu"):
        with kernel_calls(forward=1, backward=0):
            layer(name)
    with kernel_calls(forward=0, backward=0):
        layer("reference")


def test_context_goes_before_environment_and_argument_before_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EGNN_FAST_BACKEND", "reference")
    assert not fused()
    with egnn_fast.use_backend("cpu"):
        assert fused()
        with egnn_fast.use_backend("reference"):
            assert not fused()
            with kernel_calls(forward=1, backward=0):
                layer("cpu")
        assert fused()
    assert not fused()
    monkeypatch.setenv("EGNN_FAST_BACKEND", "auto")
    assert fused()


def test_use_backend_ends_with_an_error_inside() -> None:
    with pytest.raises(KeyError), egnn_fast.use_backend("reference"):
        raise KeyError
    assert fused()


def test_use_backend_is_this_threads_affair() -> None:
    found = []
    with egnn_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(fused()))
        thread.start()
        thread.join()
        assert not fused()
    assert found == [True]


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^backend: expected 'auto' or one of"):
        layer("mps")
    with pytest.raises(ValueError, match=r"^name: expected"), egnn_fast.use_backend("mps"):
        pass
    monkeypatch.setenv("EGNN_FAST_BACKEND", "mps")
    with pytest.raises(ValueError, match=r"^EGNN_FAST_BACKEND: expected"):
        layer()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user without a GPU: Triton is there, but not to interpret."""
    monkeypatch.setattr(kernels, "_INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    name, reason = "triton", "PyTorch sees no GPU"
    with pytest.raises(BackendError, match=f"backend '{name}' cannot run this call: {reason}"):
        layer(name)
    with pytest.raises(BackendError, match=name), egnn_fast.use_backend(name):
        layer()
    monkeypatch.setenv("EGNN_FAST_BACKEND", name)
    with pytest.raises(BackendError, match=name):
        layer()


def test_triton_on_a_machine_without_a_gpu() -> None:
    """Without its interpreter: named, it says why; "auto" runs the CPU kernel, and says nothing."""
    code = """
import sys, warnings
import torch
from egnn_fast import BackendError, backends, functional
from egnn_fast.runtime import native
from egnn_fast.backends import available
from egnn_fast.checks.cases import Case
warnings.simplefilter("error")
torch.cuda.is_available = lambda: False
problem = Case("child", nodes=4, edges=9).edge_pass(torch.float32)
try:
    problem.run(problem.leaves, "triton", 0)
except BackendError as error:
    print(error)
before = native.core.calls()[0]
problem.run(problem.leaves, "auto", 0)
print(native.core.calls()[0] - before)
available.find_spec = lambda name: None
try:
    problem.run(problem.leaves, "triton", 0)
except BackendError as error:
    print(error)
problem.run(problem.leaves, "auto", 0)
print(native.core.calls()[0] - before)
print("egnn_fast.backends.triton" in sys.modules)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    refusal, runs, absence, runs_again, imported = done.stdout.splitlines()
    start = "backend 'triton' cannot run this call: "
    if importlib.util.find_spec("triton") is not None:
        assert refusal.startswith(f"{start}PyTorch sees no GPU; TRITON_INTERPRET=1 ")
    assert absence == f"{start}triton is not installed: pip install triton"
    assert (runs, runs_again) == ("1", "2")
    assert imported == "False"


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer("reference")
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "load_error", "egnn_fast._core is not built")
    with pytest.raises(BackendError, match="not built"):
        layer("cpu")
    with pytest.warns(UserWarning, match=r"using the reference: .*not built"):
        assert torch.equal(layer(), right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        layer()
    state = {line.name: line for line in egnn_fast.info()}
    assert not state["cpu"].available
    assert "not built" in state["cpu"].reason
    assert state["reference"].available


def test_importing_works_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['egnn_fast._core'] = None\n"
        "import torch, egnn_fast\n"
        "from egnn_fast import nn\n"
        "state = {line.name: line for line in egnn_fast.info()}\n"
        "assert not state['cpu'].available and 'pip install' in state['cpu'].reason\n"
        "graph = egnn_fast.Graph.complete([3])\n"
        "assert nn.EGNN(2, 4, 1)(torch.ones(3, 2), torch.rand(3, 3), graph)[0].shape == (3, 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_activation_that_no_kernel_knows_runs_on_the_reference() -> None:
    gelu = torch.nn.functional.gelu
    for name in (None, "cpu", "reference"):
        decision._warned.clear()
        with warnings.catch_warnings(record=True) as caught, kernel_calls(forward=0, backward=0):
            warnings.simplefilter("always")
            layer(name, activation=gelu)
            layer(name, activation=gelu)
        assert len(caught) == (0 if name == "reference" else 1)
        if caught:
            assert "only SiLU, ReLU and LeakyReLU run fused" in str(caught[0].message)


def test_warnings_point_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="fused") as caught:
        layer(activation=torch.nn.functional.gelu)
    assert len(caught) == 1


def test_info_lists_every_backend() -> None:
    lines = egnn_fast.info()
    assert [line.name for line in lines] == ["reference", "cpu", "triton"]
    state = {line.name: line for line in lines}
    assert state["cpu"].available
    assert backends.instruction_set("cpu") in state["cpu"].reason
    for line in lines:
        assert line.reason


@pytest.mark.usefixtures("without_gpu")
def test_explain() -> None:
    leaves = CASE.layer(torch.float32).leaves
    h, x = leaves["h"], leaves["x"]
    assert native.core is not None
    found = functional.explain(h, x, hidden=16)
    assert found.backend == "cpu"
    assert found.instruction_set == native.core.instruction_set()
    assert set(found.refused) == {"triton"}
    assert functional.explain(h, x, hidden=16, backend="reference").backend == "reference"
    half = functional.explain(h.half(), x.half(), hidden=16)
    assert half.backend == "reference"
    assert "float16" in half.refused["cpu"]
    unknown = functional.explain(h, x, hidden=16, activation=torch.nn.Tanh())
    assert unknown.backend == "reference"
    assert "fused" in unknown.refused["cpu"]
    with egnn_fast.use_backend("reference"):
        assert functional.explain(h, x, hidden=16).backend == "reference"
    with pytest.raises(BackendError, match="triton"):
        functional.explain(h, x, hidden=16, backend="triton")
    with pytest.raises(ValueError, match=r"^backend: "):
        functional.explain(h, x, hidden=16, backend="gpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_explain_tells_what_runs(dtype: torch.dtype) -> None:
    for tensor_dtype in (torch.float32, torch.float64, dtype):
        leaves = CASE.layer(tensor_dtype).leaves
        told = functional.explain(leaves["h"], leaves["x"], hidden=16).backend
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with kernel_calls(forward=int(told == "cpu"), backward=0):
                layer(dtype=tensor_dtype)


def test_instruction_sets() -> None:
    core = native.core
    assert core is not None, native.load_error
    names = core.supported_instruction_sets()
    for name in names:
        core.set_instruction_set(name)
        assert core.instruction_set() == name
        assert backends.instruction_set("cpu") == name
        assert (
            functional.explain(torch.ones(2, 1), torch.ones(2, 3), hidden=4).instruction_set == name
        )
    with pytest.raises(ValueError, match="sse9"):
        core.set_instruction_set("sse9")


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_environment_chooses_the_instruction_set(name: str) -> None:
    core = native.core
    assert core is not None, native.load_error
    code = (
        "import torch\nfrom egnn_fast import functional\n"
        "print(functional.explain(torch.ones(2, 1), torch.ones(2, 3), hidden=4)"
        ".instruction_set)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "EGNN_FAST_CPU_ISA": name},
    )  # fmt: skip
    if name in core.supported_instruction_sets():
        assert done.stdout.strip() == name, done.stderr
    else:
        assert f"this machine cannot run {name}" in done.stderr


@pytest.mark.parametrize(
    ("gpu", "proven", "expected"),
    [
        ((9, 0), {(9, 0)}, None),
        ((9, 0), set(), "^not every check of its kernels has passed on such a GPU yet; backend="),
        ((8, 0), {(9, 0)}, "^its kernels were compiled and interpreted, but not yet run on such"),
    ],
)
def test_auto_says_what_is_known_of_a_gpu(
    gpu: tuple[int, int], proven: set[tuple[int, int]], expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from egnn_fast.backends import available

    monkeypatch.setattr(available, "PROVEN", frozenset(proven))
    monkeypatch.setattr(available, "_on_nvidia", lambda: True)
    monkeypatch.setattr(available, "_architecture", lambda: gpu)
    reason = available.unproven("triton")
    if expected is None:
        assert reason is None
    else:
        assert reason is not None
        assert re.search(expected, reason)
    assert available.unproven("cpu") is None

"""Which assembler Triton would call, which are refused, and what machine code is called."""

from __future__ import annotations

import datetime
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

if sys.platform != "linux":
    pytest.skip("Triton's wheels are for Linux alone", allow_module_level=True)

import triton
from triton.backends.nvidia import compiler

from egnn_fast import BackendError, backends, info
from egnn_fast.backends import available
from egnn_fast.cli import app
from egnn_fast.kernels import assembler
from egnn_fast.kernels.assembler import REPORTS, Assembler, doubt, doubt_here, in_use

CALL = backends.Call("cuda", torch.float32, hidden=64, coord_dim=3, activation="silu")
OWN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GOOD, BAD, DOUBTED = "13.5.37", "12.9.86", "13.1.80"
Install = Callable[[str], str]


def version(number: str, wgmma: bool = True) -> Assembler:
    return Assembler("/a/ptxas", number, "TRITON_PTXAS_PATH", "TRITON_PTXAS_PATH", wgmma)


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Makes a program that says it is ptxas of a version; its path."""

    def script(number: str) -> str:
        path = tmp_path / f"ptxas-{number}"
        release = ".".join(number.split(".")[:2])
        path.write_text(
            "#!/bin/sh\necho 'ptxas: NVIDIA (R) Ptx optimizing assembler'\n"
            f"echo 'Cuda compilation tools, release {release}, V{number}'\n"
        )
        path.chmod(0o755)
        return str(path)

    return script


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose Triton has compiled nothing, on a Hopper GPU that is not there."""
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "DISABLE_MMA_V3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(assembler, "_ANY", False)
    monkeypatch.setattr(available, "interpreting", lambda: False)
    monkeypatch.setattr(available, "_on_nvidia", lambda: True)
    monkeypatch.setattr(available, "_architecture", lambda: (9, 0))
    compiler.get_ptxas_version.cache_clear()
    assembler._doubt_with.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


# ---- which one ----------------------------------------------------------------------------------
def test_triton_s_own_is_told_in_full() -> None:
    for arch in (80, 90, 100):
        found = in_use(arch)
        assert found is not None
        assert Path(found.path).parent == OWN
        told = subprocess.run([found.path, "--version"], capture_output=True, text=True).stdout
        assert f"V{found.version}" in told
        assert found.origin == f"Triton {triton.__version__}"
        assert found.label == f"ptxas {found.version} of Triton {triton.__version__}"


def test_the_environment_s_is_told(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", install(GOOD))
    found = in_use(80)
    assert found is not None
    assert found == (os.environ["TRITON_PTXAS_PATH"], GOOD, found.origin, found.variable, True)
    assert found.origin == found.variable == "TRITON_PTXAS_PATH"


def test_each_architecture_has_its_variable(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever Triton asks for it: Hopper's is Blackwell's from Triton 3.9 on."""
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", install("13.4.59"))
    monkeypatch.setenv("TRITON_PTXAS_PATH", install(GOOD))
    for arch in (80, 90, 100, 120):
        found = in_use(arch)
        assert found is not None
        assert found.path == compiler.get_ptxas(arch).path == os.environ[found.variable]
    assert in_use(100) != in_use(80)


def test_a_path_to_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes its own then, without a word."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/no/such/ptxas")
    found = in_use(80)
    assert found is not None
    assert Path(found.path).parent == OWN
    assert "as TRITON_PTXAS_PATH names no ptxas that runs: /no/such/ptxas" in found.label


def test_a_replaced_file_is_read_again(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install(BAD)
    monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    assert in_use(80).version == BAD  # type: ignore[union-attr]
    Path(path).write_text(Path(install(GOOD)).read_text())
    os.utime(path, ns=(1, 1))
    assert in_use(80).version == GOOD  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "0", "false", "2", ""])
def test_wgmma_is_off_where_triton_has_it_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MMA_V3", value)
    found = in_use(90)
    assert found is not None
    assert found.wgmma == (value in ("0", "false", "2", ""))
    assert found.label.endswith(", without wgmma") != found.wgmma


def test_amd_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert in_use(90) is None
    assert doubt_here(90) is None


# ---- which are refused --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "level"),
    [
        ("12.4.131", "warn"),
        ("12.8.61", "refuse"),
        ("12.8.93", "refuse"),
        (BAD, "refuse"),
        ("13.0.48", "refuse"),
        ("13.0.88", "refuse"),
        (DOUBTED, "warn"),
        ("13.2.86", "warn"),
        ("13.3.33", None),
        (GOOD, None),
        ("14.0.1", None),
        ("12.8", "refuse"),  # all that Triton itself tells
    ],
)
def test_what_is_known_of_a_version(number: str, level: str | None) -> None:
    found = doubt(90, version(number))
    assert (found and found.level) == level
    if found:
        assert f"ptxas {number} of TRITON_PTXAS_PATH" in found.reason
        assert re.search(r"\((fla|triton)#\d+", found.reason)
        for way in ("TRITON_PTXAS_PATH", "13.3 or newer", "DISABLE_MMA_V3=1", assembler.ENV_ANY):
            assert way in found.reason
    assert doubt(90, version(number, wgmma=False)) is None
    for arch in (80, 86, 89, 100, 120):
        assert doubt(arch, version(number)) is None


def test_reports_cover_what_is_not_safe_once() -> None:
    bounds = sorted((report.since, report.before) for report in REPORTS)
    assert [since for since, _ in bounds] == [(0, 0), *(before for _, before in bounds[:-1])]
    assert ".".join(map(str, bounds[-1][1])) == assembler._SAFE
    for report in REPORTS:
        assert report.level in ("refuse", "warn")
        assert re.fullmatch(r"(fla|triton)#\d+(, (fla|triton)#\d+)*", report.evidence)
        datetime.date.fromisoformat(report.date)


# ---- what a call does ---------------------------------------------------------------------------
def use(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Hopper, whichever variable this Triton reads for it."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", path)


@pytest.mark.usefixtures("hopper")
def test_a_bad_one_is_refused(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install(BAD), monkeypatch)
    with pytest.raises(BackendError, match=r"'triton' cannot run this call: ptxas 12\.9\.86 of T"):
        backends.select("triton", CALL)
    with pytest.warns(UserWarning, match=r"using the reference: ptxas 12\.9\.86"):
        assert backends.select("auto", CALL) == "reference"
    state = {line.name: line for line in info()}["triton"]
    assert not state.available
    assert "triton#11781" in state.reason
    assert "triton#11781" in backends.explain_call("auto", CALL).refused["triton"]
    with pytest.raises(BackendError, match="DISABLE_MMA_V3=1"):
        backends.explain_call("triton", CALL)


@pytest.mark.usefixtures("hopper")
def test_a_doubted_one_runs_with_one_warning(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(install(DOUBTED), monkeypatch)
    with pytest.warns(UserWarning, match=r"triton#9433"):
        assert backends.select("triton", CALL) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("triton", CALL) == "triton"
    assert backends.unavailable("triton") is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("way", ["newer", "without wgmma", "any", "another GPU"])
def test_the_ways_out(way: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install(GOOD if way == "newer" else BAD), monkeypatch)
    if way == "without wgmma":
        monkeypatch.setenv("DISABLE_MMA_V3", "1")
    if way == "any":
        monkeypatch.setattr(assembler, "_ANY", True)
    if way == "another GPU":
        monkeypatch.setattr(available, "_architecture", lambda: (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("triton", CALL) == "triton"


@pytest.mark.usefixtures("hopper")
def test_info_and_explain_name_it(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    use(install(GOOD), monkeypatch)
    told = "sm_90, ptxas 13.5.37 of TRITON_PTXAS_PATH"
    state = {line.name: line for line in info()}["triton"]
    assert (state.available, state.reason) == (True, f"ready ({told})")
    assert backends.explain_call("triton", CALL).instruction_set == told
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["info"]).output
    assert max(map(len, shown.splitlines())) <= 80
    assert "ptxas 13.5.37" in shown


@pytest.mark.usefixtures("hopper")
def test_the_environment_may_change_until_something_is_compiled(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton names what it compiles by the first assembler of the process, and keeps it."""
    use(install(BAD), monkeypatch)
    assert backends.unavailable("triton") is not None
    use(install(GOOD), monkeypatch)
    assert backends.unavailable("triton") is None
    use(install(BAD), monkeypatch)
    compiler.get_ptxas_version(90)  # as the first compilation does
    use(install(GOOD), monkeypatch)
    with pytest.raises(BackendError, match=r"13\.5\.37 .* chosen too late: .* ptxas 12\.9\.86"):
        backends.select("triton", CALL)
    # from a good one to another nothing wrong can be loaded
    compiler.get_ptxas_version.cache_clear()
    compiler.get_ptxas_version(90)
    use(install("13.4.59"), monkeypatch)
    assert backends.unavailable("triton") is None


@pytest.mark.usefixtures("hopper")
def test_a_triton_without_an_assembler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(arch: int) -> None:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(compiler, "get_ptxas", missing)
    assert backends.unavailable("triton") == "Triton has no assembler: Cannot find ptxas"


def test_compiled_code_takes_it_for_a_constant(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(install(DOUBTED), monkeypatch)

    def count(x: torch.Tensor) -> torch.Tensor:
        return x + len(available.warning() or "")

    compiled = torch.compile(count, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == count(torch.zeros(1)) > 100


def test_the_import_loads_neither_triton_nor_torch() -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({assembler.__file__!r})\n"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("value", "said"), [("", False), ("0", False), ("1", True), ("ON", True)])
def test_any_is_read_at_import(value: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(assembler.ENV_ANY, value)
    assert runpy.run_path(str(assembler.__file__))["_ANY"] == said

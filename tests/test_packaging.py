"""Wheel, sdist and editable install hold what they should, with and without the extension."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# the folder that an ordinary build of this checkout uses: nothing is compiled twice
BUILD_DIR = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
EXT_SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
X86_64 = platform.machine().lower() in ("x86_64", "amd64")


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with more environment variables and without what this process was given."""
    dropped = ("PYTHONPATH", "EGNN_FAST_NO_EXT", "EGNN_FAST_SANITIZE", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment.update(variables)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280
    )


def succeed(command: list[str], cwd: Path = ROOT, **variables: str) -> str:
    result = run(command, cwd, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(folder: Path, **variables: str) -> Path:
    """Build a wheel where importing torch fails: the build must not need it."""
    (folder / "blocked").mkdir(parents=True)
    (folder / "blocked" / "torch.py").write_text("raise ImportError('torch at build time')\n")
    # a build folder of its own for setuptools, so that nothing old can get in or hide a lack
    (folder / "distutils.cfg").write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    variables["DIST_EXTRA_CONFIG"] = str(folder / "distutils.cfg")
    variables["PYTHONPATH"] = str(folder / "blocked")
    succeed([*pip, "--wheel-dir", str(folder), str(ROOT)], ROOT, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    succeed([*pip, "--target", str(folder), str(wheel)])
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), EGNN_FAST_BUILD_DIR=str(BUILD_DIR))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("pure"), EGNN_FAST_NO_EXT="1")


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an editable install of this checkout."""
    folder = tmp_path_factory.mktemp("editable")
    build = f"from setuptools import build_meta; build_meta.build_editable({str(folder)!r})"
    succeed([sys.executable, "-c", build], EGNN_FAST_NO_EXT="1")
    (built,) = folder.glob("*.whl")
    return install(built, folder / "site")


def test_wheel_holds_extension_and_kernels(wheel: Path) -> None:
    held = names(wheel)
    assert f"egnn_fast/_core{EXT_SUFFIX}" in held
    assert {"egnn_fast/kernels/__init__.py", "egnn_fast/py.typed"} <= held
    sources = {f"egnn_fast/{p.relative_to(ROOT / 'egnn_fast')}" for p in modules("egnn_fast")}
    sources |= {f"egnn_fast/kernels/{p.relative_to(ROOT / 'kernels')}" for p in modules("kernels")}
    assert {name for name in held if name.endswith(".py")} == sources


def modules(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts]


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    for name in names(wheel):
        top = name.split("/")[0]
        assert top == "egnn_fast" or top.endswith(".dist-info"), name
        assert name.endswith((".py", EXT_SUFFIX, "py.typed")) or ".dist-info/" in name, name


def test_sdist_holds_the_manual_and_the_sources(tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    succeed([sys.executable, "-c", build], EGNN_FAST_NO_EXT="1")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert len(pages) > 5
    assert pages | {"README.md", "CONTRIBUTING.md", "Makefile", "CMakeLists.txt"} <= held
    assert {"csrc/bindings.cpp", "kernels/forward.py", "tests/conftest.py"} <= held


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path / "site")
    code = "import egnn_fast._core as c, egnn_fast.kernels as k; print(c.__file__, k.__file__)"
    core, kernels = succeed(
        [sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(site)
    ).split()
    assert Path(core).parent == site / "egnn_fast"
    assert Path(kernels).parent == site / "egnn_fast" / "kernels"


def test_imports_without_extension(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not any("_core" in name for name in names(pure_wheel))
    site = install(pure_wheel, tmp_path / "site")
    code = "import egnn_fast, egnn_fast.kernels; print(egnn_fast.__file__, egnn_fast.__version__)"
    file, version = succeed(
        [sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(site)
    ).split()
    assert Path(file).parent == site / "egnn_fast"
    assert f"-{version}-" in pure_wheel.name


@pytest.mark.parametrize("at_root", [True, False])
def test_editable_install_finds_kernels(editable: Path, tmp_path: Path, at_root: bool) -> None:
    code = f"import site; site.addsitedir({str(editable)!r}); import egnn_fast.kernels as k; "
    code += "import egnn_fast; print(egnn_fast.__file__, k.__file__)"
    cwd = ROOT if at_root else tmp_path
    package, kernels = succeed([sys.executable, "-c", code], cwd=cwd).split()
    assert Path(package) == ROOT / "egnn_fast" / "__init__.py"
    assert Path(kernels) == ROOT / "kernels" / "__init__.py"


@pytest.mark.usefixtures("editable")
def test_mypy_finds_kernels(tmp_path: Path) -> None:
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    mypy += ["--cache-dir", str(ROOT / ".mypy_cache"), "--follow-imports", "silent"]
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("from egnn_fast import kernels\n\nname: str = kernels.__name__\n")
    bad.write_text("from egnn_fast import kernels\n\nkernels.no_such_kernel\n")
    succeed([*mypy, str(good)])
    # an error here shows that the module was found: one that is not has every attribute
    result = run([*mypy, str(bad)], ROOT)
    assert 'Module has no attribute "no_such_kernel"' in result.stdout, result.stdout


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    command += ["--build-temp", str(tmp_path)]
    result = run(command, ROOT, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "needs a C++17 compiler" in result.stderr
    assert "no-such-compiler" in result.stderr
    assert "EGNN_FAST_NO_EXT=1" in result.stderr


def test_core_builds_without_python(tmp_path: Path) -> None:
    # what cmake and ninja would do: compiling it again would take a minute
    from cmake import CMAKE_BIN_DIR

    cmake = str(Path(CMAKE_BIN_DIR) / "cmake")
    options = ["-DEGNN_FAST_PYTHON=OFF", "-DEGNN_FAST_WERROR=ON"]
    options += [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("pybind11", "Python")]
    succeed([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), *options])
    plan = succeed([cmake, "--build", str(tmp_path), "--", "-t", "commands"])
    assert "libegnn_fast_core.a" in plan
    assert "_core.cpython" not in plan
    for source in (ROOT / "csrc" / "core").rglob("*.cpp"):
        assert str(source) in plan
    assert "-Werror" in plan
    assert "-ffast-math" not in plan


@pytest.mark.usefixtures("wheel")
def test_extension_links_neither_openmp_nor_torch() -> None:
    if sys.platform == "darwin":
        needed = succeed(["otool", "-L", str(BUILD_DIR / f"_core{EXT_SUFFIX}")])
    else:
        needed = succeed(["readelf", "--dynamic", str(BUILD_DIR / f"_core{EXT_SUFFIX}")])
    assert "libstdc++" in needed or "libc++" in needed
    for library in ("gomp", "iomp", "libomp", "torch", "c10"):
        assert library not in needed


@pytest.mark.skipif(not X86_64, reason="only x86-64 has kernels for several instruction sets")
@pytest.mark.usefixtures("wheel")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_sets_do_not_leak(isa: str) -> None:
    """No inline function compiled for AVX may stand in for the one that portable code calls.

    The linker keeps one copy of a function defined in several objects ("weak"), whichever comes
    first. If it were the copy made for AVX-512, older processors would meet illegal instructions.
    """
    (compiled,) = BUILD_DIR.rglob(f"vectorised/kernel_{isa}.cpp.o")
    symbols = succeed(["nm", "--defined-only", "--demangle", str(compiled)]).splitlines()
    kinds = [line.split(maxsplit=2)[1:] for line in symbols]
    assert any(kind == "T" for kind, _ in kinds)
    # what lies in the namespace of the instruction set is called from there alone
    assert [name for kind, name in kinds if kind == "W" and f"egnn::{isa}::" not in name] == []

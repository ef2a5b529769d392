"""Build of egnn_fast: the packages and, through CMake, the extension ``egnn_fast._core``.

Everything that is plain metadata stands in pyproject.toml. Environment variables:

``EGNN_FAST_NO_EXT=1``     install the pure Python package; layers run on the reference path
``EGNN_FAST_BUILD_DIR``    where CMake builds, so that several builds can share their objects
``EGNN_FAST_SANITIZE=1``   build with AddressSanitizer and UndefinedBehaviorSanitizer
``EGNN_FAST_WERROR=1``     treat compiler warnings as errors
``CMAKE_ARGS``             further arguments for CMake's configure step
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
# Type checkers do not follow package_dir: they find egnn_fast.kernels through this link instead
# (mypy_path and pyright's stubPath in pyproject.toml).
KERNELS_LINK = ROOT / "build" / "typing" / "egnn_fast" / "kernels"

NO_COMPILER = """\
egnn_fast needs a C++17 compiler to build its CPU kernels, and {what}.
  Debian, Ubuntu:  apt install g++ python3-dev
  Fedora:          dnf install gcc-c++ python3-devel
  macOS:           xcode-select --install
  conda:           conda install cxx-compiler
Or name one in the environment variable CXX.
To install without the fused kernels (the layers then run on the slow reference path):
  EGNN_FAST_NO_EXT=1 pip install .
"""


def flag(name: str) -> bool:
    """Whether an environment variable is set to something other than an explicit no."""
    return os.environ.get(name, "").lower() not in ("", "0", "off", "no", "false")


def tool(name: str) -> str:
    """The path of cmake or ninja: the one of the build environment, else the one on PATH."""
    try:
        module = import_module(name)
    except ImportError:
        folder = None
    else:
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    found = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if found is None:
        raise PlatformError(f"{name} was not found; install it with: pip install {name}")
    return found


def require_compiler() -> None:
    """Say what is missing before CMake does so at length."""
    if "CMAKE_CXX_COMPILER" not in os.environ.get("CMAKE_ARGS", ""):
        named = os.environ.get("CXX")
        names = shlex.split(named)[:1] if named else ["c++", "g++", "clang++", "icpx"]
        if not any(shutil.which(name) for name in names):
            raise PlatformError(NO_COMPILER.format(what=f"found none of: {', '.join(names)}"))
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        raise PlatformError(NO_COMPILER.format(what=f"there is no Python.h in {include}"))


def remove_foreign_build(build_dir: Path) -> None:
    """Remove the build of another checkout, as after a copy or a move: CMake refuses to use it."""
    cache = build_dir / "CMakeCache.txt"
    if cache.is_file():
        lines = cache.read_text().splitlines()
        ours = "CMAKE_PROJECT_NAME:STATIC=egnn_fast" in lines
        if ours and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}" not in lines:
            shutil.rmtree(build_dir)


class CMakeExtension(Extension):
    """An extension whose sources only CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, build and put the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        target = Path(self.get_ext_fullpath(ext.name))
        build_dir = self._build_dir()
        remove_foreign_build(build_dir)
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        # what goes wrong comes on stderr
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), *self._configuration()]
        self._run(configure, stdout=subprocess.DEVNULL)
        self._run([cmake, "--build", str(build_dir), "--target", "_core", "--", "--quiet"])

        target.parent.mkdir(parents=True, exist_ok=True)
        # copyfile, not copy2: with its old date an unchanged module would look out of date to make
        shutil.copyfile(build_dir / target.name, target)
        shutil.copymode(build_dir / target.name, target)

    def _build_dir(self) -> Path:
        named = os.environ.get("EGNN_FAST_BUILD_DIR")
        if named:
            return Path(named).resolve()
        # one per ABI and kind, kept between builds: ninja then compiles only what changed
        kind = "sanitize-" if flag("EGNN_FAST_SANITIZE") else "cmake-"
        return ROOT / "build" / (kind + str(sysconfig.get_config_var("SOABI")))

    def _configuration(self) -> list[str]:
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            # named in full each time: an isolated build leaves paths in the cache that are gone
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "EGNN_FAST_PYTHON": "ON",
            "EGNN_FAST_SANITIZE": "ON" if flag("EGNN_FAST_SANITIZE") else "OFF",
            "EGNN_FAST_WERROR": "ON" if flag("EGNN_FAST_WERROR") else "OFF",
            "PYTHON_MODULE_EXTENSION": str(sysconfig.get_config_var("EXT_SUFFIX")),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": import_module("pybind11").get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        return ["-G", "Ninja", *defines, *extra]

    def _run(self, command: list[str], stdout: int | None = None) -> None:
        if subprocess.run(command, stdout=stdout).returncode:
            raise ExecError(
                "building egnn_fast._core failed; the compiler's message is above. "
                "EGNN_FAST_NO_EXT=1 installs the package without its fused kernels."
            )


class BuildPy(build_py):
    """Starts clean, and lets type checkers find egnn_fast.kernels in an editable install."""

    def run(self) -> None:
        # else a module deleted since the last build would still go into the wheel
        shutil.rmtree(Path(self.build_lib) / "egnn_fast", ignore_errors=True)
        super().run()
        if self.editable_mode:
            KERNELS_LINK.parent.mkdir(parents=True, exist_ok=True)
            KERNELS_LINK.unlink(missing_ok=True)
            KERNELS_LINK.symlink_to(os.path.relpath(ROOT / "kernels", KERNELS_LINK.parent))


packages = find_packages(include=["egnn_fast", "egnn_fast.*"])
kernel_packages = ["egnn_fast.kernels"]
kernel_packages += [f"egnn_fast.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=packages + kernel_packages,
    package_dir={"egnn_fast.kernels": "kernels"},
    ext_modules=[] if flag("EGNN_FAST_NO_EXT") else [CMakeExtension("egnn_fast._core")],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)

"""Builds the native libraries: finds torch and the build tools, calls CMake, nothing else.

CMakeLists.txt owns sources and flags. Environment variables:

    NNCX_CUDA              auto (default): CUDA ops where nvcc is found; 0: never; 1: required
    TORCH_CUDA_ARCH_LIST   GPU architectures, such as "8.0;9.0+PTX"
    MAX_JOBS               compilers at a time; default: one for each CPU of this process
    NNCX_SANITIZE          for gcc's -fsanitize=, as scripts/sanitize.sh needs it
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "nncx/_version.py").read_text(), re.M)[1]
SANITIZE = os.environ.get("NNCX_SANITIZE", "")
PLATFORM = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
BUILD = ROOT / "build" / "-".join(filter(None, ["cmake", PLATFORM, SANITIZE]))
OLDEST_TORCH = (2, 10)


def find_torch() -> Path | None:
    """The torch to build against: the target environment's, which an isolated build hides from
    sys.path but not from the file system, else the one of the build environment."""
    installed = Path(sysconfig.get_path("platlib")) / "torch"
    if not (installed / "version.py").is_file():
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        installed = Path(spec.origin).parent
    refuse_old_torch(installed)
    return installed


def refuse_old_torch(folder: Path) -> None:
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
    if version and (int(version[2]), int(version[3])) < OLDEST_TORCH:
        sys.exit(
            f"nncx: needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, found {version[1]} in "
            f"{folder}; run `pip install --upgrade torch`"
        )


def tool(name: str) -> str:
    """The program of the installed package `name`, which build-system.requires asks for, also where
    the environment is not activated; else the program on PATH."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return name
    programs = (f.locate().resolve() for f in files if f.parts[-2:] == ("bin", name))
    return str(next(programs, name))


def max_jobs() -> str:
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not (jobs.isdecimal() and int(jobs) > 0):
        sys.exit(f"nncx: MAX_JOBS must be a number of compilers, at least 1, got '{jobs}'")
    return jobs


def call(*command: str) -> None:
    if subprocess.run(command).returncode:
        sys.exit(
            "nncx: building the native libraries failed, the reason is in the lines above; "
            "NNCX_CUDA=0 leaves out the CUDA ops"
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch = find_torch()
        if torch is None:
            sys.exit("nncx: needs torch >= 2.10 to build, found none; run `pip install torch`")
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One of an earlier build would otherwise be packaged when this one makes none.
        (module.parent / "_cuda.so").unlink(missing_ok=True)
        # What an isolated build finds elsewhere each time is given anew (-U: looked for anew), so
        # that the build folder stays valid and a rebuild compiles only what changed.
        call(
            *(tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-U", "NVCC"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'RelWithDebInfo' if SANITIZE else 'Release'}",  # to name lines
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DNNCX_VERSION={VERSION}",
            f"-DNNCX_MODULE_FILE={module.name}",
            f"-DNNCX_OUTPUT_DIR={module.parent}",
            f"-DNNCX_TORCH_DIR={torch}",
            f"-DNNCX_SANITIZE={SANITIZE}",
            f"-DNNCX_CUDA={os.environ.get('NNCX_CUDA') or 'auto'}",
            f"-DNNCX_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
        )
        call(tool("cmake"), "--build", str(BUILD), "-j", max_jobs())

    def copy_extensions_to_source(self) -> None:
        """Editable installs: setuptools copies the modules it knows, but _cuda.so is none."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "nncx" / "_cuda.so"
        if built.exists():
            self.copy_file(str(built), str(ROOT / "nncx" / "_cuda.so"))
        else:
            (ROOT / "nncx" / "_cuda.so").unlink(missing_ok=True)


setup(
    version=VERSION,
    ext_modules=[Extension("nncx._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)

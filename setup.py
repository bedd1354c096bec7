"""Builds the native libraries: locates torch, calls CMake, nothing else.

CMakeLists.txt owns sources and flags. Environment: NNCX_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST,
MAX_JOBS.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "nncx/_version.py").read_text(), re.M)[1]


def find_torch() -> Path | None:
    """The torch to build against: the target environment's, which an isolated build hides from
    sys.path but not from the file system, else the one of the build environment."""
    installed = Path(sysconfig.get_paths()["platlib"]) / "torch"
    if (installed / "include").is_dir():
        return installed
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_dir = find_torch()
        if torch_dir is None:
            sys.exit(
                "nncx: building needs torch >= 2.10, found none; run `pip install torch` first"
            )
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = (
            ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        )
        # A fresh configuration, because an isolated build's tools live elsewhere each time; objects
        # are kept, so that a rebuild compiles only what changed.
        configure = [
            *("cmake", "--fresh", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DNNCX_VERSION={VERSION}",
            f"-DNNCX_MODULE_FILE={module.name}",
            f"-DNNCX_OUTPUT_DIR={module.parent}",
            f"-DNNCX_TORCH_DIR={torch_dir}",
            f"-DNNCX_CUDA={os.environ.get('NNCX_CUDA', 'auto')}",
            f"-DNNCX_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: setuptools copies the modules it knows, but _cuda.so is none."""
        super().copy_extensions_to_source()
        library = Path(self.build_lib) / "nncx" / "_cuda.so"
        if library.exists():
            shutil.copy2(library, ROOT / "nncx" / library.name)


setup(
    version=VERSION,
    ext_modules=[Extension("nncx._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if find_torch() else ["torch>=2.10"],
)

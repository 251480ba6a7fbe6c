"""Compiles the kernel into the package; everything else about the build is in pyproject.toml.

`BLOOMDESK_TARGET` names another system of runner/kernel/compiler.py, for which scripts/wheels makes a wheel.
"""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

# Loaded by its path: the package itself needs torch.
COMPILER = runpy.run_path(str(Path(__file__).parent / "runner" / "kernel" / "compiler.py"))
TARGET = os.environ.get("BLOOMDESK_TARGET") or COMPILER["this_target"]()
# Of a wheel for each system; the kernel calls nothing of Python.
PLATFORMS = {
    "linux-x86_64": "manylinux_2_17_x86_64",
    "linux-aarch64": "manylinux_2_17_aarch64",
    "macos-x86_64": "macosx_11_0_x86_64",
    "macos-aarch64": "macosx_11_0_arm64",
    "windows-x86_64": "win_amd64",
}


class BuildWithKernel(build_py):
    def run(self) -> None:
        COMPILER["compile_all"](TARGET, COMPILER["find_compiler"]())
        # What an earlier build has left there, perhaps for another system, would become a part of the wheel.
        shutil.rmtree(Path(self.build_lib, "runner", "kernel", "lib"), ignore_errors=True)
        super().run()


class KernelWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", PLATFORMS[TARGET]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernel, "bdist_wheel": KernelWheel}, distclass=BinaryDistribution)

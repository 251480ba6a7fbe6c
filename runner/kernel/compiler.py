"""Compiles kernel.c for each kind of processor that a system may have, with the clang in the wheel `ziglang`.

    lib/
      avx2-3f0c2a91b7de.so          one library for each variant, named after what it was made from
      avx512-3f0c2a91b7de.so
      sse2-3f0c2a91b7de.so

It runs when bloomdesk is installed, and in a checkout whose kernel.c has changed since. The standard library is enough
for this file, so that the build can use it alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE, LIBRARIES = HERE / "kernel.c", HERE / "lib"

# For each architecture its variants and what their processors have; every processor runs the first.
# `processor_level` of kernel.c says how far down a processor may go.
VARIANTS = {
    "x86_64": {
        "sse2": "x86_64",
        "avx2": "x86_64_v3",
        "avx512": "x86_64_v4+avx512vbmi+avx512vbmi2",
    },
    "aarch64": {"neon": "generic"},
}
# Names of systems and architectures, and for each what the compiler calls it and how its libraries end.
TARGETS = {
    "linux-x86_64": ("x86_64-linux-gnu.2.17", ".so"),
    "linux-aarch64": ("aarch64-linux-gnu.2.17", ".so"),
    "macos-x86_64": ("x86_64-macos.11.0", ".dylib"),
    "macos-aarch64": ("aarch64-macos.11.0", ".dylib"),
    "windows-x86_64": ("x86_64-windows-gnu", ".dll"),
}
# Contraction would fuse additions that are to be rounded by themselves.
OPTIONS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-mprefer-vector-width=512")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
HIDDEN = ("-fPIC", "-fvisibility=hidden", "-fno-sanitize=all")
# Seconds after which a temporary folder is that of a build that was killed.
LONGEST_BUILD = 3600


def this_target() -> str:
    """The name in `TARGETS` that this machine would have."""
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower()
    return f"{system}-{ {'amd64': 'x86_64', 'arm64': 'aarch64'}.get(machine, machine) }"


def variants(target: str) -> dict[str, str]:
    """The variants of a target and what their processors have, the one that every processor runs first."""
    return VARIANTS[target.split("-")[1]]


def library(target: str, variant: str, folder: Path = LIBRARIES) -> Path:
    """Where the library of a variant lies, if it was made from today's source."""
    digest = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    return folder / f"{variant}-{digest[:12]}{TARGETS[target][1]}"


def find_compiler() -> list[str] | None:
    """The command of the C compiler, or None if there is none."""
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    zig = shutil.which("zig")
    return [zig, "cc"] if zig else None


def compile_all(target: str, compiler: Sequence[str], folder: Path = LIBRARIES) -> None:
    """Make the libraries of all variants of a target, and remove others and what killed builds left.

    Raises `CalledProcessError` if that fails.
    """
    folder.mkdir(exist_ok=True)
    made = [library(target, variant, folder) for variant in variants(target)]
    compiler = [*compiler, "-target", TARGETS[target][0]]
    # Processes that need them at once each make their own.
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for path, features in zip(made, variants(target).values(), strict=True):
            new, object_file = Path(place, path.name), Path(place, path.stem + ".o")
            _run(
                [
                    *compiler,
                    f"-mcpu={features}",
                    *OPTIONS,
                    *WARNINGS,
                    *HIDDEN,
                    "-c",
                    SOURCE,
                    "-o",
                    object_file,
                ]
            )
            # Without its features, for which the compiler would make the system's own library once more. Macs have a
            # library's name in it, which would be the whole path.
            name = ["-install_name", f"@rpath/{path.name}"] if path.suffix == ".dylib" else []
            _run([*compiler, "-shared", "-fno-sanitize=all", "-s", *name, object_file, "-o", new])
            new.replace(path)
    for path in set(folder.iterdir()) - set(made):
        # On Windows, not while a process uses it.
        with suppress(OSError):
            if path.is_file():
                path.unlink()
            elif time.time() - path.stat().st_mtime > LONGEST_BUILD:
                shutil.rmtree(path)


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    compile_all(os.environ.get("BLOOMDESK_TARGET") or this_target(), find_compiler() or ["zig", "cc"])

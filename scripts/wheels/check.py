"""What is wrong with a wheel: its libraries, their kind and functions, and paths of the machine that made it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import lief

from runner.kernel import compiler
from runner.kernel.library import FUNCTIONS

# Of each kind of library, by the name of its class: what its header calls each architecture.
MACHINES = {
    "ELF": {"x86_64": lief.ELF.ARCH.X86_64, "aarch64": lief.ELF.ARCH.AARCH64},
    "MACHO": {"x86_64": lief.MachO.Header.CPU_TYPE.X86_64, "aarch64": lief.MachO.Header.CPU_TYPE.ARM64},
    "PE": {"x86_64": lief.PE.Header.MACHINE_TYPES.AMD64},
}
FORMATS = {"linux": "ELF", "macos": "MACHO", "windows": "PE"}
# What a library may want of the system beside itself; the last two are parts of Windows.
IMPORTED = re.compile(
    r"libc\.so\.6|ld-linux\S*\.so\.\d|/usr/lib/libSystem\.B\.dylib|api-ms-win-crt\S+|KERNEL32\.dll", re.I
)
# The newest version of glibc that a wheel's tag, manylinux_2_17, promises to do without.
GLIBC = (2, 17)


def faults(wheel: Path, target: str, private: Sequence[str]) -> list[str]:
    """What is wrong with a wheel for `target`; none of the texts `private`, such as paths, may be in it."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("runner/kernel/lib/")}
        expected = {
            f"runner/kernel/lib/{compiler.library(target, each).name}" for each in compiler.variants(target)
        }
        if names != expected:
            found.append(f"libraries are {sorted(names)}, not {sorted(expected)}")
        for name in archive.namelist():
            data = archive.read(name)
            found += [f"{name} has the text {text!r}" for text in private if text.encode() in data]
        for name in sorted(names & expected):
            found += [f"{name} {fault}" for fault in library_faults(archive.read(name), target)]
    return found


def library_faults(data: bytes, target: str) -> Iterator[str]:
    """What is wrong with a library for `target`."""
    system, architecture = target.split("-")
    binary = lief.parse(data)
    kind = binary.format.name if binary else "no library"
    if kind != FORMATS[system]:
        yield f"is {kind}, not {FORMATS[system]}"
        return
    header = binary.header
    machine = {"ELF": "machine_type", "MACHO": "cpu_type", "PE": "machine"}[kind]
    if getattr(header, machine) != MACHINES[kind][architecture]:
        yield f"is for {getattr(header, machine)}, not {architecture}"
    # Macs put an underscore before the names of C.
    exported = {function.name.removeprefix("_") for function in binary.exported_functions}
    if missing := FUNCTIONS.keys() - exported:
        yield f"does not export {', '.join(sorted(missing))}"
    if other := [name for name in imported(binary) if not IMPORTED.fullmatch(name)]:
        yield f"needs {', '.join(other)}"
    if kind == "ELF" and (newer := [each for each in glibc_versions(binary) if each > GLIBC]):
        yield f"needs glibc {newer}"


def imported(binary: lief.Binary) -> list[str]:
    """The names of the libraries that a library asks for."""
    if isinstance(binary, lief.MachO.Binary):
        own = lief.MachO.LoadCommand.TYPE.ID_DYLIB
        return [each.name for each in binary.libraries if each.command != own]
    return [each if isinstance(each, str) else each.name for each in binary.libraries]


def glibc_versions(binary: lief.ELF.Binary) -> list[tuple[int, ...]]:
    """The versions of glibc's functions that a library asks for."""
    names = [aux.name for need in binary.symbols_version_requirement for aux in need.get_auxiliary_symbols()]
    found = [re.fullmatch(r"GLIBC_(\d+(?:\.\d+)*)", name) for name in names]
    return [tuple(map(int, match[1].split("."))) for match in found if match]

"""The compiled kernel.c that suits this processor, as functions of Python.

`BLOOMDESK_KERNEL=avx2` takes another variant than the best that the processor runs: for tests and measurements.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from subprocess import CalledProcessError

from runner.errors import BloomdeskError
from runner.kernel import compiler

ENVIRONMENT = "BLOOMDESK_KERNEL"

_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64
# What each function returns and takes.
FUNCTIONS = {
    "processor_level": (_NUMBER,),
    "open_task": (None, _ADDRESS),
    "close_task": (None, _ADDRESS, _ADDRESS),
    "spin_for_tasks": (_NUMBER, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS),
    "watch_mapped": (_ADDRESS, _NUMBER, _NUMBER),
    "forget_mapped": (None, _ADDRESS),
    "multiply": (None, _ADDRESS, _ADDRESS),
    "layer_norm": (None, _ADDRESS, _ADDRESS),
    "attend": (None, _ADDRESS, _ADDRESS),
    "store": (None, _ADDRESS, _ADDRESS),
    "decode_rows": (_NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS),
    "encode_rows": (None, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _ADDRESS),
    "encode_quantised": (_NUMBER, _NUMBER, _NUMBER, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS),
    "decode_quantised": (None, *[_NUMBER] * 2, *[_ADDRESS] * 2, *[_NUMBER] * 2, *[_ADDRESS] * 2),
    "scratch_bytes_of_decoder": (_NUMBER,),
    "scratch_bytes_of_encoder": (_NUMBER,),
}


@cache
def load_kernel() -> ctypes.CDLL:
    """The library for this processor; its functions let go of the interpreter's lock.

    Raises `BloomdeskError` if there is none, or none of the variant that the environment names.
    """
    possible = usable_variants()
    variant = os.environ.get(ENVIRONMENT) or possible[-1]
    if variant not in possible:
        raise BloomdeskError(
            f"{ENVIRONMENT} is {variant!r}, which this processor does not run",
            f"unset it, or choose one of: {', '.join(possible)}",
        )
    return open_library(variant)


@cache
def usable_variants() -> tuple[str, ...]:
    """Names of the variants that this processor runs, the best one last."""
    target = compiler.this_target()
    if target not in compiler.TARGETS:
        raise BloomdeskError(
            f"bloomdesk has no kernel for {target}", f"it runs on: {', '.join(compiler.TARGETS)}"
        )
    names = tuple(compiler.variants(target))
    return names[: 1 + open_library(names[0]).processor_level()]


@cache
def open_library(variant: str) -> ctypes.CDLL:
    """The library of a variant. Raises `BloomdeskError` if there is none, and none can be made, or it does not load."""
    path = _compiled(variant)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BloomdeskError(f"the kernel cannot be loaded: {error}", "install bloomdesk again") from error
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _compiled(variant: str) -> Path:
    """Where the library of a variant lies; in a checkout it is made if kernel.c has changed."""
    target = compiler.this_target()
    path = compiler.library(target, variant)
    if path.exists():
        return path
    command = compiler.find_compiler()
    if command is None:
        raise BloomdeskError(
            f"the kernel is not compiled: there is no {path}",
            "in a checkout run: pip install -c constraints.txt -e . ; elsewhere install bloomdesk again",
        )
    try:
        compiler.compile_all(target, command)
    except (CalledProcessError, OSError) as error:
        said = error.stderr if isinstance(error, CalledProcessError) else error
        raise BloomdeskError(f"the kernel cannot be compiled: {said}", "install bloomdesk again") from error
    return path

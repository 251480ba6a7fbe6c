"""What the multipliers of this processor can do: float32 multiply-adds a second in a loop that does nothing else."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.bench.turns import CannotRun

SOURCE = Path(__file__).with_name("multipliers.c")
ROUNDS = 5_000_000


def multipliers(threads: int) -> Callable[[], int]:
    """A function that keeps `threads` cores busy for some tenths of a second; it returns its number of multiply-adds.

    Raises `CannotRun` without a C compiler.
    """
    compiler = shutil.which("cc")
    if not compiler:
        raise CannotRun("no C compiler (cc) to measure the multipliers with")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "multipliers.so")
        options = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, SOURCE, "-o", library], check=True)
        function = ctypes.CDLL(str(library)).multiply_add
    function.restype, function.argtypes = ctypes.c_long, [ctypes.c_long, ctypes.c_void_p]
    pool = ThreadPoolExecutor(threads)

    def one(_: int) -> int:
        out = (ctypes.c_float * 16)(*[0.5] * 16)
        return function(ROUNDS, ctypes.byref(out))

    return lambda: sum(pool.map(one, range(threads)))

"""Pages of mapped files that cannot be had: counted, in place of the bus error that would end the process.

A file that is cut short loses pages that are mapped, and a failing disk may not give one back. Reading such a page is a
bus error. In a watched range zeros take its place, and whoever used them finds `has_failed`. Bus errors elsewhere go to
whoever handled them before. Windows has none: there a mapped file cannot be cut short, and a disk that fails under a
page ends the process.
"""

from __future__ import annotations

import ctypes
import weakref

from runner.kernel.library import load_kernel

# Where `struct mapped` of kernel.c counts.
_FAULTS_OFFSET = 16


class WatchedRange:
    """The `nbytes` mapped bytes from `address`, watched for as long as this object lives."""

    def __init__(self, address: int, nbytes: int) -> None:
        kernel = load_kernel()
        self._faults = ctypes.c_int64()
        if found := kernel.watch_mapped(address, address + nbytes):
            self._faults = ctypes.c_int64.from_address(found + _FAULTS_OFFSET)
            weakref.finalize(self, kernel.forget_mapped, found)

    @property
    def has_failed(self) -> bool:
        """Whether a page could not be had; zeros are in its place, and in that of all that come after."""
        return self._faults.value > 0

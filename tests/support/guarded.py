"""Memory that ends where a page begins that nobody may touch."""

from __future__ import annotations

import ctypes


class Guarded:
    """Memory that ends where a page begins that cannot be read."""

    def __init__(self, nbytes: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._nbytes, page = nbytes, 2**16
        self._whole = -(-nbytes // page) * page + page
        self._start = self._libc.mmap(None, self._whole, 3, 0x22, -1, 0)
        assert self._libc.mprotect(self._start + self._whole - page, page, 0) == 0
        self._place = self._start + self._whole - page - nbytes

    def __enter__(self) -> memoryview:
        return memoryview((ctypes.c_ubyte * self._nbytes).from_address(self._place)).cast("B")

    def __exit__(self, *_: object) -> None:
        self._libc.munmap(self._start, self._whole)

"""A shard known by a few of its bytes: whether it is the one that was there when its siblings were still there.

When `--delete-source` has deleted the shards of finished parts, nothing else tells whether the rest is of the same
checkpoint. Further training changes nearly every byte of a shard, so blocks spread over the file show it.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from runner.format.safetensors import open_regular
from toolkit.io.disk import read_errors

BLOCKS, BLOCK = 64, 4096


def sample(path: Path) -> str:
    """The xxh3-128 of a file's size, as text, and of 64 blocks of 4,096 bytes that are spread evenly over it.

    Raises `BloomdeskError` if it can't be read.
    """
    with read_errors(path), open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        own = xxhash.xxh3_128(str(size).encode())
        for index in range(BLOCKS):
            file.seek(max(0, size - BLOCK) * index // (BLOCKS - 1))
            own.update(file.read(BLOCK))
    return own.hexdigest()

"""The cache of huggingface_hub: files that are there need not be fetched. It is read, and never changed.

    HF_HUB_CACHE/                               by default ~/.cache/huggingface/hub
      models--OWNER--NAME/
        blobs/HASH                              a file, by its sha256 or its git blob sha1
        snapshots/COMMIT/NAME -> ../../blobs/HASH   where links can be made; otherwise the file itself

Its files are copied, not linked: what is written to a copy, or deletes it, leaves the cache as it is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from toolkit.hub.revision import COMMIT, HubFile, Revision
from toolkit.io.hasher import Digest

FOLDER = re.compile(r"models--(.+)")
SHA256 = re.compile(r"[0-9a-f]{64}")
BUFFER = 8 * 2**20


def cache_directory() -> Path:
    """Where huggingface_hub keeps its files, by the variables that it reads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(name):
            return Path(given).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def cached_file(revision: Revision, file: HubFile) -> Path | None:
    """A file of the cache that by its name and size is `file` of `revision`; its bytes may be others."""
    folder = cache_directory() / f"models--{revision.repo.replace('/', '--')}"
    names = (known for known in (file.sha256, file.git_sha1) if known)
    places = [
        folder / "snapshots" / revision.commit / file.path,
        *(folder / "blobs" / name for name in names),
    ]
    for place in places:
        # What cannot be looked at is not there.
        with suppress(OSError):
            found = place.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size == file.size:
                return place
    return None


def cached_bytes(revision: Revision, file: HubFile) -> bytes | None:
    """The bytes of a small file, if the cache has them and they are right."""
    path, digest = cached_file(revision, file), file.digest()
    data = None
    if path is not None:
        with suppress(OSError):
            data = path.read_bytes()
            digest.update(data)
    return data if data is not None and not file.difference(digest) else None


def blocks_of(path: Path, start: int) -> Iterator[memoryview]:
    """The bytes of a cached file from `start` on, as far as they can be read."""
    buffer = memoryview(bytearray(BUFFER))
    with suppress(OSError), path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            yield buffer[:count]


def snapshot_of(directory: Path) -> tuple[str, str] | None:
    """Repo and commit of a directory that is a snapshot of a cache, by its place alone, or None."""
    commit, snapshots, folder = (*directory.absolute().parts[:0:-1], "", "", "")[:3]
    found = FOLDER.fullmatch(folder)
    if snapshots != "snapshots" or not COMMIT.fullmatch(commit) or found is None:
        return None
    return found[1].replace("--", "/", 1), commit


def blob_name(path: Path) -> str | None:
    """The sha256 that the file at `path` has by the blob that it leads to, or None if it is no link of a cache."""
    if not path.is_symlink():
        return None
    target = Path(os.path.realpath(path))
    is_blob = target.parent.name == "blobs" and SHA256.fullmatch(target.name)
    return target.name if is_blob else None


def is_blob(path: Path, data: bytes) -> bool:
    """Whether the small file at `path` is a link of a cache, and `data` are the bytes that its blob is named by."""
    if not path.is_symlink():
        return False
    digest = Digest(len(data))
    digest.update(data)
    return Path(os.path.realpath(path)).name in (digest.sha256, digest.git_sha1)

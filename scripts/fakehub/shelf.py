"""Directories as the local hub's repositories: their files with sizes and hashes, and their commits."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path

LARGE = re.compile(r".*\.(bin|safetensors|h5|msgpack|pt|onnx)|tokenizer\.json|.*tfevents.*")


@dataclass(frozen=True)
class Repo:
    """A directory served as a repository; its only commit is `commit`, or follows from its contents.

    With `token`, the repository is private: for other callers it does not exist. With `gated` too, all may see it and
    only that token may download it.
    """

    directory: Path
    commit: str | None = None
    token: str | None = None
    gated: bool = False
    branches: tuple[str, ...] = ("main",)


@dataclass(frozen=True)
class Entry:
    """A file as the Hub describes it: large files by sha256 and a pointer, others by git blob sha1."""

    path: str
    size: int
    sha256: str
    git_sha1: str
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_sha1

    def as_json(self) -> dict:
        body = {"type": "file", "oid": self.git_sha1, "size": self.size, "path": self.path}
        if self.large:
            version = "version https://git-lfs.github.com/spec/v1"
            pointer = f"{version}\noid sha256:{self.sha256}\nsize {self.size}\n"
            body["oid"] = git_blob(pointer.encode())
            body["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        return body


def git_blob(data: bytes) -> str:
    """The git blob sha1 of `data`."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class Shelf:
    """The entries of directories; a file is hashed again only if its size or time of change differs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[Path, int, int], Entry] = {}

    def entries(self, repo: Repo) -> dict[str, Entry]:
        """All files of a repository by their path in it, sorted."""
        files = sorted(path for path in repo.directory.rglob("*") if path.is_file())
        with self._lock:
            entries = [self._entry(repo.directory, path) for path in files]
        return {entry.path: entry for entry in entries}

    def commit(self, repo: Repo) -> str:
        """The given commit, or one that depends on the contents alone."""
        if repo.commit is not None:
            return repo.commit
        lines = (f"{entry.path} {entry.sha256}\n" for entry in self.entries(repo).values())
        return hashlib.sha1("".join(lines).encode(), usedforsecurity=False).hexdigest()

    def _entry(self, directory: Path, path: Path) -> Entry:
        found = path.stat()
        key = (path, found.st_size, found.st_mtime_ns)
        if key not in self._known:
            sha256 = hashlib.sha256()
            sha1 = hashlib.sha1(f"blob {found.st_size}\0".encode(), usedforsecurity=False)
            with path.open("rb", buffering=0) as file:
                while block := file.read(2**20):
                    sha256.update(block)
                    sha1.update(block)
            name = path.relative_to(directory).as_posix()
            large = LARGE.fullmatch(path.name) is not None
            self._known[key] = Entry(name, found.st_size, sha256.hexdigest(), sha1.hexdigest(), large)
        return self._known[key]

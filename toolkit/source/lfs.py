"""Git LFS: a clone whose work tree holds pointers, and whose objects lie in its git directory.

    CLONE/
      pytorch_model_00001-of-00072.bin       version https://git-lfs.github.com/spec/v1
                                             oid sha256:4d7a2146...
                                             size 7193290147
      .git/lfs/objects/4d/7a/4d7a2146...     the file itself

`GIT_LFS_SKIP_SMUDGE=1 git clone` and `git lfs fetch` make it so: nothing is on the disk twice.
The format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError, in_shell
from runner.format.safetensors import open_regular
from toolkit.io.disk import read_errors, read_if_exists

LARGEST_POINTER = 1024
POINTER = re.compile(
    rb"version https://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/v1\n(?:[a-z0-9.-]+ [^\n]*\n)*?"
    rb"oid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n?"
)
LARGEST_GITDIR = 4096


@dataclass(frozen=True)
class LfsObject:
    """What a pointer stands for: the file `path` should have `size` bytes with this sha256."""

    path: Path
    sha256: str
    size: int


def find_objects(files: Iterable[Path]) -> dict[Path, LfsObject]:
    """The objects of those `files` that are pointers.

    Raises `BloomdeskError` if some of them are not there whole, with the command that fetches them.
    """
    found: dict[Path, LfsObject] = {}
    absent: list[Path] = []
    for file in files:
        pointer = _pointer(file)
        if pointer is None:
            continue
        sha256, size = pointer
        clone = _clone_of(file)
        if clone is None:
            raise BloomdeskError(
                f"{file} is a pointer of Git LFS, not the file of {size:,} bytes that it stands for",
                "fetch the files themselves: git lfs pull in the clone, or bloomdesk download",
            )
        path = _git_directory(clone) / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256
        found[file] = LfsObject(path, sha256, size)
        if not path.is_file():
            absent.append(file)
        elif path.stat().st_size != size:
            raise BloomdeskError(
                f"{path} has {path.stat().st_size:,} bytes, the pointer {file} says {size:,}",
                f"delete it, and fetch it again: {fetch_command([file])}",
            )
    if absent:
        others = f" (and {len(absent) - 1:,} more)" if len(absent) > 1 else ""
        first = found[absent[0]]
        raise BloomdeskError(
            f"{absent[0]}{others} is a pointer of Git LFS whose object {first.sha256} of {first.size:,} bytes "
            f"is not in the clone",
            f"fetch it: {fetch_command(absent)}",
        )
    return found


def read_small_file(path: Path, largest: int) -> bytes | None:
    """All bytes of a small file or, if it is a pointer, of its object; None if there is none.

    Raises `BloomdeskError` if it can't be read, or the object is not there or not what the pointer says.
    """
    data = read_if_exists(path, largest)
    if data is None or not POINTER.fullmatch(data):
        return data
    known = find_objects([path])[path]
    data = read_if_exists(known.path, largest)
    if data is None or hashlib.sha256(data).hexdigest() != known.sha256:
        raise BloomdeskError(
            f"{known.path} is damaged: its sha256 is not the one that the pointer {path} says",
            f"delete it, and fetch it again: {fetch_command([path])}",
        )
    return data


def _pointer(file: Path) -> tuple[str, int] | None:
    """The sha256 and the size that a pointer names, or None if the file is none."""
    with read_errors(file), open_regular(file) as opened:
        found = POINTER.fullmatch(opened.read(LARGEST_POINTER + 1))
    return (found[1].decode(), int(found[2])) if found else None


def _clone_of(file: Path) -> Path | None:
    """The work tree that `file` lies in."""
    return next((folder for folder in file.absolute().parents if (folder / ".git").exists()), None)


def _git_directory(clone: Path) -> Path:
    """The directory that holds the objects; a linked work tree or a submodule has a file in its place."""
    git = clone / ".git"
    if git.is_dir():
        return git
    with read_errors(git):
        text = (read_if_exists(git, LARGEST_GITDIR) or b"").decode(errors="replace").strip()
    git = clone / text.removeprefix("gitdir:").strip()
    common = read_if_exists(git / "commondir", LARGEST_GITDIR)
    return git / common.decode(errors="replace").strip() if common is not None else git


def fetch_command(files: list[Path]) -> str:
    """The command that fetches the objects of these pointers."""
    clone = _clone_of(files[0]) or files[0].parent
    names = [file.absolute().relative_to(clone).as_posix() for file in files]
    if len(names) > 3:
        names = sorted({f"*{file.suffix}" for file in files})
    return f'git -C {in_shell(clone)} lfs fetch --include "{",".join(names)}"'

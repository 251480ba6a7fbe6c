"""A revision on the Hub: its files, sizes and hashes, and which of them a BLOOM checkpoint needs.

The facts of bigscience/bloom at the commit that bloomdesk was made for ship in pins/, and are believed before
the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runner.errors import BloomdeskError
from runner.format.layout import COMPANIONS, REQUIRED_COMPANIONS
from toolkit.hub.client import fetch_json
from toolkit.hub.environment import check_timeouts
from toolkit.hub.failures import Resource, endpoint, offline, offline_error
from toolkit.hub.line import Line
from toolkit.io.hasher import Digest, hash_file
from toolkit.io.progress import FileProgress, Progress
from toolkit.source.foreign import what_is_there
from toolkit.source.index import FORMS, LARGEST_INDEX, parse_index

PINS = Path(__file__).with_name("pins")
PINNED = {"bigscience/bloom": "bigscience_bloom.json"}
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file of a revision: its size in bytes, and the sha256 of its bytes or its git blob sha1."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None

    def digest(self) -> Digest:
        """The hashes to take of the file's bytes."""
        return Digest(None if self.sha256 else self.size)

    def difference(self, digest: Digest) -> str:
        """Empty if the bytes that `digest` has seen are the file's, else what was expected and what was found."""
        kind, expected, found = "sha256", self.sha256, digest.sha256
        if expected is None:
            kind, expected, found = "git blob sha1", self.git_sha1, digest.git_sha1
        return "" if found == expected else f"its {kind} should be {expected} and is {found}"

    def check(self, path: Path, progress: Progress) -> str | None:
        """The sha256 of the file at `path` if its bytes are this file's, else None."""
        digest = self.digest()
        hash_file(path, digest, FileProgress(progress, self.path, self.size))
        return None if self.difference(digest) else digest.sha256


@dataclass(frozen=True)
class Revision:
    """A commit of a repository and files that it holds; `pinned` if the list ships with the toolkit.

    `dtype` is that of the weights, if it is pinned too.
    """

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    pinned: bool = False
    dtype: str | None = None

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def find(self, path: str) -> HubFile | None:
        return next((file for file in self.files if file.path == path), None)

    def __str__(self) -> str:
        return f"{self.repo} at {self.commit[:12]}"


def pinned(repo: str, revision: str | None = None) -> Revision | None:
    """The pinned revision of `repo`, or None if there is none or another one is named."""
    if repo not in PINNED:
        return None
    body = json.loads((PINS / PINNED[repo]).read_text(encoding="utf-8"))
    if revision is not None and revision.lower() != body["commit"]:
        return None
    files = tuple(HubFile(path, size, sha256) for path, (size, sha256) in body["files"].items())
    return Revision(repo, body["commit"], files, pinned=True, dtype=body.get("dtype"))


def resolve(
    repo: str, revision: str | None = None, line: Line | None = None, *, named: bool = True
) -> Revision:
    """The commit that `revision` (a branch, tag, short name or commit; else `main`) means, with its files.

    For bigscience/bloom the default is the pinned commit, and its list is the pinned one: the Hub is not
    asked. `named` if the user has named the revision. Raises `BloomdeskError` if the Hub does not have it, refuses it
    or cannot be reached.
    """
    check_repo_name(repo)
    known = pinned(repo, revision)
    if known is not None:
        return known
    line, resource = line or Line(), Resource(repo, revision or "main", named=named)
    if offline():
        raise offline_error(f"the files of {repo} at {resource.revision} cannot be listed")
    commit = resource.revision.lower()
    if not COMMIT.fullmatch(commit):
        commit = _commit_of(resource, line)
    return pinned(repo, commit) or Revision(
        repo, commit, _list_files(replace(resource, revision=commit), line)
    )


def check_repo_name(repo: str) -> None:
    """Raise `BloomdeskError` if `repo` cannot be the name of a repository."""
    check_timeouts()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise BloomdeskError(
            f"{repo!r} is not the name of a repository", "a name looks like bigscience/bloom-560m"
        ) from None


def _commit_of(resource: Resource, line: Line) -> str:
    path = f"/api/models/{resource.repo}/revision/{quote(resource.revision, safe='')}"
    for page in fetch_json(path, resource, line):
        commit = page.get("sha") if isinstance(page, dict) else None
        if isinstance(commit, str) and COMMIT.fullmatch(commit):
            return commit
    raise _not_understood(resource, "no commit")


def _list_files(resource: Resource, line: Line) -> tuple[HubFile, ...]:
    path = f"/api/models/{resource.repo}/tree/{resource.revision}?recursive=true&expand=false"
    files = []
    for page in fetch_json(path, resource, line):
        try:
            files += [_decode(entry) for entry in page if entry["type"] == "file"]
        except (KeyError, TypeError, ValueError) as error:
            raise _not_understood(resource, f"a list of files with {error}") from None
    return tuple(files)


def _decode(entry: Any) -> HubFile:
    path, lfs = entry["path"], entry.get("lfs")
    size = lfs["size"] if lfs else entry["size"]
    content_id = lfs["oid"] if lfs else entry["oid"]
    if not isinstance(path, str) or type(size) is not int or size < 0:
        raise ValueError("an entry without name or size")
    if not re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", content_id):
        raise ValueError(f"no hash for {path}")
    return HubFile(path, size, content_id, None) if lfs else HubFile(path, size, None, content_id)


def _not_understood(resource: Resource, what: str) -> BloomdeskError:
    return BloomdeskError(
        f"{endpoint()} gives {what} for {resource.repo} at {resource.revision}",
        "check HF_ENDPOINT: it must be a Hub's address",
    )


def needed(revision: Revision, read: Callable[[HubFile], bytes]) -> Revision:
    """`revision` with just what a BLOOM checkpoint needs: config, tokenizer, and one form of the weights.

    `read` gives the checked bytes of a small file (an index). Raises `BloomdeskError` if something is
    missing, or an index names anything but files beside it.
    """
    if revision.pinned:
        return revision
    _refuse_foreign(revision, read)
    missing = [path for path in REQUIRED_COMPANIONS if revision.find(path) is None]
    if missing:
        raise BloomdeskError(
            f"{revision} holds no {' and no '.join(missing)}: it is not a whole BLOOM checkpoint"
        )
    companions = [file for file in map(revision.find, COMPANIONS) if file is not None]
    return replace(revision, files=(*companions, *_weights(revision, read)))


def _refuse_foreign(revision: Revision, read: Callable[[HubFile], bytes]) -> None:
    """Raise `BloomdeskError` if the repo has other things than weights that bloomdesk reads, and not those too."""

    def small(name: str) -> bytes | None:
        file = revision.find(name)
        return read(file) if file is not None and file.size <= LARGEST_INDEX else None

    names = {file.path for file in revision.files}
    if names.isdisjoint(name for form in FORMS for name in form[:2]):
        found = what_is_there(names, small)
        if found is not None:
            raise BloomdeskError(f"{revision} holds {found[0]}", found[1])


def _weights(revision: Revision, read: Callable[[HubFile], bytes]) -> list[HubFile]:
    gaps = []
    for index_name, single_name, suffix in FORMS:
        index, single = revision.find(index_name), revision.find(single_name)
        if single is not None:
            # As transformers does it, also beside an index.
            return [single]
        if index is not None:
            if index.size > LARGEST_INDEX:
                raise BloomdeskError(
                    f"{index.path} of {revision} has {index.size:,} bytes: no index is that large"
                )
            data = read(index)
            names = sorted(set(parse_index(data, suffix, f"{index_name} of {revision}").values()))
            shards = [revision.find(name) for name in names]
            if None not in shards:
                return [index, *(shard for shard in shards if shard is not None)]
            absent = [name for name, shard in zip(names, shards, strict=True) if shard is None]
            gaps.append(
                f"{index_name} names {absent[0]}, which is not there ({len(absent)} of {len(names)} missing)"
            )
    why = "; ".join(gaps) or "neither safetensors nor .bin files by their usual names"
    raise BloomdeskError(f"{revision} holds no whole set of weights: {why}", "choose another --revision")

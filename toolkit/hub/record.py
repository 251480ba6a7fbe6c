"""The download record: what a directory of source shards should hold, and what of it has been checked.

bloom-source/
  bloomdesk-download.json       this record
  config.json, tokenizer.json, ..., the index, the shards
  SHARD.incomplete              a shard that is still coming
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.format.digest import digest
from runner.format.layout import is_file_name
from runner.system.atomic import write_atomically
from toolkit.hub.revision import COMMIT, HubFile, Revision
from toolkit.io.disk import read_if_exists, reason

RECORD = "bloomdesk-download.json"
FORMAT = "bloomdesk-download"
FORMAT_VERSION = 1
LARGEST_RECORD = 16 * 2**20  # of BLOOM-176B's 77 files it has 0.02 MB


@dataclass(frozen=True)
class RecordedFile(HubFile):
    """A needed file with the state in which it was last seen to be sound.

    `mtime_ns` is None until the file is in place; `sha256` is known from then on, even if the Hub gave
    only `git_sha1`.
    """

    mtime_ns: int | None = None

    def sound_in(self, directory: Path) -> bool:
        """True if the file is as it was when its hash was checked, by size and time of change."""
        try:
            found = (directory / self.path).stat()
        except OSError:
            return False
        return self.mtime_ns is not None and (found.st_size, found.st_mtime_ns) == (self.size, self.mtime_ns)

    def describes(self, file: HubFile) -> bool:
        """True if this records the bytes of `file`."""
        same = self.git_sha1 == file.git_sha1 if file.sha256 is None else self.sha256 == file.sha256
        return same and (self.path, self.size) == (file.path, file.size)


@dataclass(frozen=True)
class DownloadRecord:
    """Where a directory's files come from, and each of them by name."""

    repo: str
    commit: str
    files: Mapping[str, RecordedFile]

    @classmethod
    def of(cls, revision: Revision, earlier: DownloadRecord | None) -> DownloadRecord:
        """The record of a download of `revision`, with what an earlier one has checked of the same bytes."""
        files = {}
        for file in revision.files:
            known = earlier.files.get(file.path) if earlier is not None else None
            fresh = RecordedFile(file.path, file.size, file.sha256, file.git_sha1)
            files[file.path] = known if known is not None and known.describes(file) else fresh
        return cls(revision.repo, revision.commit, files)

    @property
    def revision(self) -> Revision:
        """The needed files, as the Hub gave them when the record was begun."""
        files = (HubFile(file.path, file.size, file.sha256, file.git_sha1) for file in self.files.values())
        return Revision(self.repo, self.commit, tuple(files))

    def missing_in(self, directory: Path) -> tuple[str, ...]:
        """Files that are not in place as they were when they were checked."""
        return tuple(file.path for file in self.files.values() if not file.sound_in(directory))

    def with_file(self, path: str, sha256: str, mtime_ns: int) -> DownloadRecord:
        """This record with a file that is in place and sound."""
        checked = replace(self.files[path], sha256=sha256, mtime_ns=mtime_ns)
        return replace(self, files={**self.files, path: checked})

    def to_json(self) -> str:
        """The record's text; the same record always gives the same text."""
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "repo": self.repo,
            "commit": self.commit,
            "files": [asdict(file) for file in self.files.values()],
        }
        return json.dumps({**body, "sha256": digest(body)}, indent=1) + "\n"


def load_record(directory: Path) -> DownloadRecord | None:
    """The record of `directory`, or None if there is none; `BloomdeskError` if it is damaged."""
    path = directory / RECORD
    data = read_if_exists(path, LARGEST_RECORD)
    if data is None:
        return None
    try:
        return _decode(json.loads(data))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BloomdeskError(
            f"{path} is not a sound download record: {reason(error)}",
            "delete it and run the download again: files that are there are checked, not fetched again",
        ) from None


def save_record(directory: Path, record: DownloadRecord) -> None:
    """Write the record, whole or not at all."""
    write_atomically(directory / RECORD, record.to_json().encode())


def _decode(body: dict[str, Any]) -> DownloadRecord:
    if body["format"] != FORMAT or body["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format is not {FORMAT} {FORMAT_VERSION}")
    if body.pop("sha256") != digest(body):
        raise ValueError("its own checksum does not match: it was edited or damaged")
    repo, commit = body["repo"], body["commit"]
    if not isinstance(repo, str) or not repo.isprintable() or len(repo) > 200 or not COMMIT.fullmatch(commit):
        raise ValueError("it names no commit")
    files = [_decode_file(entry) for entry in body["files"]]
    if not files or len({file.path for file in files}) != len(files):
        raise ValueError("it lists no files, or one of them twice")
    return DownloadRecord(repo, commit, {file.path: file for file in files})


def _decode_file(entry: dict[str, Any]) -> RecordedFile:
    if set(entry) != {field.name for field in fields(RecordedFile)}:
        raise ValueError("a file has unknown or missing fields")
    file = RecordedFile(**entry)
    if not is_file_name(file.path):
        raise ValueError(f"{file.path!r} is not the name of a file here")
    if type(file.size) is not int or file.size < 0 or type(file.mtime_ns) not in (int, type(None)):
        raise ValueError(f"{file.path} has no size or time")
    for found, length in ((file.sha256, 64), (file.git_sha1, 40)):
        if found is not None and not re.fullmatch(rf"[0-9a-f]{{{length}}}", found):
            raise ValueError(f"{file.path} has no sound hash")
    known = file.sha256 if file.git_sha1 is None or file.mtime_ns is not None else file.git_sha1
    if known is None:
        raise ValueError(f"{file.path} has no hash")
    return file

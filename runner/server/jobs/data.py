"""The data directory: what a server keeps between its runs.

    DATA/
      data.json                  says what this directory is
      files/FILE_ID.data         the bytes of a file
      files/FILE_ID.json         its name, size, sha256; written last, and without it the file does not count
      batches/BATCH_ID.json      a batch: what was asked, and its status; replaced as a whole
      batches/BATCH_ID.journal   the tokens and results of its lines, appended; gone when the batch is done
      answers/                   of requests that are no jobs; `runner/server/kept.py` draws it

Ids are drawn here. Nothing that a client sends becomes part of a path: what it sends is looked up among known ids.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError, explained, reading
from runner.format.digest import digest
from runner.format.safetensors import read_small
from runner.system.atomic import TEMPORARY_SUFFIX, write_atomically
from runner.system.lock import sole_writer

MARK, FORMAT, FORMAT_VERSION = "data.json", "bloomdesk-data", 1
FILES, BATCHES, ANSWERS = "files", "batches", "answers"
RECORD, CONTENT, JOURNAL = ".json", ".data", ".journal"
LARGEST_RECORD = 2**24
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


@contextmanager
def data_directory(path: Path) -> Iterator[Path]:
    """Hold the data directory at `path`, which is made if it is new or empty, until the block ends.

    Raises `BloomdeskError` if another server holds it, or it is something else.
    """
    with _named(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with sole_writer(path):
        with _named(path):
            _prepare(path)
        yield path


def _prepare(path: Path) -> None:
    _mark(path)
    for name in (FILES, BATCHES, ANSWERS):
        (path / name).mkdir(mode=0o700, exist_ok=True)
        for unfinished in (path / name).glob(f"*{TEMPORARY_SUFFIX}"):
            unfinished.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise BloomdeskError(f"{path} is not a directory", "give another --data") from None
    except OSError as error:
        why, step = explained(error, path)
        raise BloomdeskError(f"{path} cannot be used: {why}", step) from error


def _mark(path: Path) -> None:
    mark = path / MARK
    if mark.exists():
        found = read_record(mark)
        if (found.get("format"), found.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise BloomdeskError(f"{mark} is not {FORMAT} {FORMAT_VERSION}", "give another --data")
        return
    # On Windows the lock is a file in it.
    if any(not each.name.startswith((".bloomdesk", MARK)) for each in path.iterdir()):
        raise BloomdeskError(
            f"{path} is no server's data directory and is not empty", "give a new directory as --data"
        )
    write_record(mark, {"format": FORMAT, "format_version": FORMAT_VERSION})


def write_record(path: Path, body: Mapping[str, Any]) -> None:
    """Replace the record at `path`. Raises `OSError` if the disk fails; then it is as it was."""
    write_atomically(path, json.dumps({**body, "checksum": digest(dict(body))}).encode() + b"\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record, as it was written. Raises `BloomdeskError` if it is damaged, or cannot be read."""
    hint = "restore it from a copy, or move it away: what it is of is not done then"
    with reading(path, hint):
        data = read_small(path, LARGEST_RECORD)
    try:
        body = json.loads(data)
        if body.pop("checksum") != digest(body):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BloomdeskError(f"{path} is not sound: it was edited or damaged", hint) from None
    return body


def records(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ids and the records of a directory."""
    for path in sorted(directory.glob(f"*{RECORD}")):
        if _ID.fullmatch(path.stem):
            yield path.stem, read_record(path)

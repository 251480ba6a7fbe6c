"""A file of results, one JSON object a line, each synced to the disk before the next."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from runner.cli.machines import slices_of
from runner.errors import AGAIN, BloomdeskError, explained, in_shell
from runner.system.atomic import sync_directory
from runner.system.lock import lock

# How every line begins.
_BEGINNING = b'{"index": '


class Item(Protocol):
    """What has a result: number `index`, known by `key`. Its `identity` is the fields that say what it is of."""

    index: int

    @property
    def key(self) -> tuple[str, str | int]: ...

    @property
    def identity(self) -> Mapping[str, object]: ...


def require_usable_name(path: Path, source: Path) -> None:
    """Raise `BloomdeskError` unless results of the file `source` may be written to `path`."""
    if path.suffix != ".jsonl":
        raise BloomdeskError(f"--out {path}: results are lines of JSON", "give a name that ends in .jsonl")
    with suppress(OSError):
        if path.samefile(source):
            raise BloomdeskError(f"--out {path} is the file that is read", "give another --out")


def model_of(directory: Path, also: Sequence[Path] = ()) -> str:
    """The name that results give the model in a prepared directory: the beginning of its fingerprint.

    `also` are its slices that have moved. Raises `BloomdeskError` if there is none, or not all of it.
    """
    return slices_of(directory, also).fingerprint[:16]


class Results(AbstractContextManager["Results"]):
    """The results of these prompts, or other items, so far, and those to come.

    A line that a kill cut off is removed, so that running the command again resumes. `done` holds, by the index of the
    prompt, the numbers of its continuations that have a result, found by id or index and compared by text; `lines`
    are the last results read, by index. Each line names its `model`, if that is given; those of older versions do not.
    """

    def __init__(self, path: Path, items: Sequence[Item], model: str = "") -> None:
        """Raises `BloomdeskError` if the file cannot be used, another process uses it, or it holds anything else."""
        self._path, self._model = path, model
        self.done: dict[int, set[int]] = {}
        self.lines: dict[int, Mapping[str, Any]] = {}
        with self._named("opened"):
            is_new = not path.exists()
            # A pipe would be waited for, and a device read without an end.
            if not is_new and not (path.is_file() or path.is_dir()):
                raise BloomdeskError(f"{path} is not a regular file", "give --out the name of a new file")
            # Without a buffer, closing writes nothing that could fail.
            self._file = path.open("ab", buffering=0)
            try:
                lock(self._file.fileno(), path)
                self.done = self._read({item.key: item for item in items})
                if is_new:
                    sync_directory(path.absolute().parent)
            except BaseException:
                self._file.close()
                raise

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, index: int, result: Mapping[str, object]) -> None:
        """Add a result, which is on the disk when this returns. Raises `BloomdeskError` if that fails."""
        named = {"model": self._model} if self._model else {}
        line = json.dumps({"index": index, **named, **result}, ensure_ascii=False)
        left = memoryview(line.encode() + b"\n")
        with self._named("written"):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        self.done.setdefault(index, set()).add(result.get("choice", 0))

    def _read(self, expected: Mapping[tuple[str, str | int], Item]) -> dict[int, set[int]]:
        done: dict[int, set[int]] = {}
        end = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._cut(line, number, end)
                    break
                index, choice = self._known(line, number, expected)
                done.setdefault(index, set()).add(choice)
                end += len(line)
        return done

    def _cut(self, line: bytes, number: int, end: int) -> None:
        """Remove the last line if it is the beginning of a result, or empty."""
        # A power cut can leave zeros.
        written = line.rstrip(b"\0")
        if not _BEGINNING.startswith(written[: len(_BEGINNING)]):
            raise self._foreign(number, "it does not end like a file of results")
        self._file.truncate(end)

    def _known(
        self, line: bytes, number: int, expected: Mapping[tuple[str, str | int], Item]
    ) -> tuple[int, int]:
        """Index of the prompt whose result this line is, and the number of the continuation."""
        try:
            found = json.loads(line)
            identity = found.get("id")
            key = ("index", found["index"]) if identity is None else ("id", identity)
            choice, item = int(found.get("choice", 0)), expected.get(key)
            identity = item.identity if item is not None else {}
            told = {name: found[name] for name in identity}
        except (ValueError, OverflowError, RecursionError, AttributeError, KeyError, TypeError):
            raise self._foreign(number, "it is not a result") from None
        if item is None:
            raise self._foreign(number, f"there is no prompt with the {key[0]} {key[1]!r}")
        for name, wanted in identity.items():
            if told[name] != wanted:
                other = f"that with the {key[0]} {key[1]!r} {_short(wanted)}"
                raise self._foreign(number, f"the {name} is {_short(told[name])}, {other}")
        if self._model and found.get("model", self._model) != self._model:
            raise self._foreign(number, "it is of another model")
        self.lines[item.index] = found
        return item.index, choice

    def _foreign(self, number: int, why: str) -> BloomdeskError:
        return BloomdeskError(
            f"{self._path} does not hold results of these prompts: line {number}: {why}",
            "give another --out, or the prompts of those results",
        )

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why, step = explained(error, self._path)
            if isinstance(error, FileNotFoundError):
                step = f"make its directory: mkdir -p {in_shell(self._path.parent)}"
            again = "run the same command again" + (
                ": it resumes, and keeps what is done" if self.done else ""
            )
            step = (
                f"{step.removesuffix(AGAIN).rstrip(' ,;')}; {again}" if step else f"see to it, then {again}"
            )
            raise BloomdeskError(f"{self._path} cannot be {what}: {why}", step) from error


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

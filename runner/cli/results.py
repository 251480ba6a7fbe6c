"""A file of results, one JSON object a line, each there for good as soon as it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from runner.cli.prompts import Prompt
from runner.errors import BloomdeskError
from runner.system.atomic import sync_directory
from runner.system.lock import lock

_BEGINNING = b'{"index": '  # of every line


class Results:
    """The results of these prompts so far, and those to come.

    A line that a kill cut off in the middle is taken away, so that running again is going on. `done` holds the indices
    of the prompts whose results are there, known by id or index and by their text.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt]) -> None:
        """Raises `BloomdeskError` where the file cannot be used, is in another process's use, or holds anything but
        results of these prompts.
        """
        self._path = path
        with self._worded("opened"):
            is_new = not path.exists()
            self._file = path.open("ab", buffering=0)  # nothing is left to be written when it is closed
            try:
                lock(self._file.fileno(), path)
                self.done = self._read({prompt.key: prompt for prompt in prompts})
                if is_new:
                    sync_directory(path.absolute().parent)
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, index: int, result: Mapping[str, object]) -> None:
        """Add a result, on the disk when this returns. Raises `BloomdeskError` where that cannot be."""
        line = json.dumps({"index": index, **result}, ensure_ascii=False)
        left = memoryview(line.encode() + b"\n")
        with self._worded("written"):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        self.done.add(index)

    def _read(self, expected: Mapping[tuple[str, str | int], Prompt]) -> set[int]:
        done, end = set(), 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._cut(line, number, end)
                    break
                done.add(self._known(line, number, expected))
                end += len(line)
        return done

    def _cut(self, line: bytes, number: int, end: int) -> None:
        """Take the last line away where it is the beginning of a result, or of nothing yet."""
        written = line.rstrip(b"\0")  # after a power cut
        if not _BEGINNING.startswith(written[: len(_BEGINNING)]):
            raise self._foreign(number, "it does not end like a file of results")
        self._file.truncate(end)

    def _known(self, line: bytes, number: int, expected: Mapping[tuple[str, str | int], Prompt]) -> int:
        """The index of the prompt whose result this is."""
        try:
            found = json.loads(line)
            identity = found.get("id")
            key = ("index", found["index"]) if identity is None else ("id", identity)
            text = found["prompt"]
            prompt = expected.get(key)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
            raise self._foreign(number, "it is no result") from None
        if prompt is None:
            raise self._foreign(number, f"there is no prompt with the {key[0]} {key[1]!r}")
        if prompt.text != text:
            raise self._foreign(
                number,
                f"the prompt is {_short(text)}, that with the {key[0]} {key[1]!r} {_short(prompt.text)}",
            )
        return prompt.index

    def _foreign(self, number: int, why: str) -> BloomdeskError:
        return BloomdeskError(
            f"{self._path} holds something else than results of these prompts: line {number}: {why}",
            "give another --out, or the prompts that it was made from",
        )

    @contextmanager
    def _worded(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BloomdeskError(
                f"{self._path} cannot be {what}: {error.strerror}",
                "what is done stays; see to it, then run the same command again: it goes on where it stopped",
            ) from error


def _short(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

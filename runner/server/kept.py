"""Kept answers: the tokens of ordinary requests on the disk. A client that repeats a request after a restart gets them.

    DATA/answers/KEY.growing   a journal: the head of an answer, then what each pass gave its texts
    DATA/answers/KEY.ended     one whose texts have all ended

KEY is a hash of who asked, where, and what: neither API keys nor prompts are here, since the client sends both again.
Nothing is synced: the end of the process loses nothing that was written, and a power cut what the system held.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from runner.generation.sequence import Restored
from runner.server.engine import Growth
from runner.server.jobs.journal import Journal, records
from runner.server.jobs.work import Record, Text, new_in, prompt_digest
from runner.server.orders import Order

GROWING, ENDED = ".growing", ".ended"
# Bounds of those that nobody waits for, of each kind; the last one is kept however long it is.
MOST_FILES, MOST_BYTES = 512, 64 * 2**20
# The least seconds between two searches for files that are too old.
SWEEP = 60.0

AnyBody = TypeVar("AnyBody", bound=BaseModel)


@dataclass(frozen=True)
class Kept:
    """What the disk has of an answer: what its order was given beside the body, and its `texts` by their places.

    `digest` is equal for equal weights and prompts.
    """

    id: str
    created: int
    seed: int | None
    digest: str
    texts: dict[int, Text] = field(default_factory=dict)

    def seeded(self, body: AnyBody) -> AnyBody:
        """The body, with the seed that was drawn for it."""
        return body if self.seed is None else body.model_copy(update={"seed": self.seed})

    def is_of(self, order: Order) -> bool:
        """Whether the texts are of this order; the weights, the tokenizer or a template may be others now."""
        return self.digest == _digest(order)

    def named(self, order: Order) -> Order:
        return replace(order, id=self.id, created=self.created)

    def restored(self, order: Order) -> tuple[Restored, ...]:
        """The tokens from which the requests of the order continue."""
        return tuple(self.texts.get(place, Text()).restored for place in range(len(order.requests)))


class KeptAnswers:
    """Answers in a directory, by the keys of their requests. One thread reads and writes, in the order of the calls.

    What cannot be written is not kept; the answer comes all the same.
    """

    def __init__(self, directory: Path, keep: float, now: Callable[[], float] = time.time) -> None:
        """Answers are kept for `keep` seconds after their last pass, unfinished ones from now on."""
        self._directory, self._keep, self._now = directory, keep, now
        self._open: set[str] = set()
        # Of the thread: the journals of answers that grow.
        self._journals: dict[str, Journal] = {}
        self._thread = ThreadPoolExecutor(1, "answers")
        for path in directory.glob(f"*{GROWING}"):
            # While there was no server, no client could come again.
            _touch(path, now())
        self._sweep()

    async def find(self, key: bytes) -> Kept | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._find, key.hex())

    def begin(self, key: bytes, order: Order, kept: Kept | None) -> Callable[[Sequence[Growth]], None]:
        """What takes the growths of an answer, from the first on; those that are `kept` are not written again."""
        self._open.add(key.hex())
        return _Recorder(order, kept, partial(self._thread.submit, self._write, key.hex())).add

    def wake(self, key: bytes) -> None:
        """An answer that was at rest grows again."""
        self._open.add(key.hex())

    def rest(self, key: bytes, *, has_ended: bool) -> None:
        """Nobody waits for an answer any more: its time begins."""
        self._thread.submit(self._rest, key.hex(), has_ended)

    def close(self) -> None:
        """Return when all is written."""
        self._thread.shutdown()
        for name in [*self._journals]:
            self._close(name)

    def _path(self, name: str, suffix: str) -> Path:
        return self._directory / f"{name}{suffix}"

    def _find(self, name: str) -> Kept | None:
        path, ended = self._path(name, GROWING), self._path(name, ENDED)
        try:
            if not path.exists() and ended.exists():
                ended.replace(path)
            if not path.exists() or self._now() - path.stat().st_mtime > self._keep:
                return None
            found = None
            for _, record in records(path):
                if "id" in record:
                    found = Kept(**record)
                elif found:
                    found.texts.setdefault(record["place"], Text()).add(record)
            return found
        except (OSError, KeyError, TypeError):
            # The disk fails, or another version wrote it.
            return None

    def _write(self, name: str, new: Sequence[Record], is_first: bool) -> None:
        path = self._path(name, GROWING)
        try:
            if name not in self._journals:
                if not (is_first or path.exists()):
                    # Without its beginning it is worth nothing.
                    return
                self._journals[name] = Journal(path, syncs=False)
            self._journals[name].append(new)
        except OSError:
            self._close(name)
            with suppress(OSError):
                path.unlink()

    def _close(self, name: str) -> None:
        if journal := self._journals.pop(name, None):
            journal.close()

    def _rest(self, name: str, has_ended: bool) -> None:
        self._open.discard(name)
        self._close(name)
        path = self._path(name, GROWING)
        with suppress(OSError):
            _touch(path, self._now())
            if has_ended:
                path.replace(self._path(name, ENDED))
        if self._now() - self._swept > SWEEP:
            self._sweep()

    def _sweep(self) -> None:
        """Remove what is there too long, and the oldest beyond the bounds."""
        self._swept = self._now()
        for suffix in (GROWING, ENDED):
            found = [(path.stat(), path) for path in self._directory.glob(f"*{suffix}")]
            nbytes, found = 0, [each for each in found if each[1].stem not in self._open]
            found.sort(key=lambda each: each[0].st_mtime, reverse=True)
            for number, (status, path) in enumerate(found):
                nbytes += status.st_size
                is_beyond = number and (number >= MOST_FILES or nbytes > MOST_BYTES)
                if is_beyond or self._now() - status.st_mtime > self._keep:
                    with suppress(OSError):
                        path.unlink()


class _Recorder:
    """Makes records of an answer's growths."""

    def __init__(
        self, order: Order, kept: Kept | None, write: Callable[[Sequence[Record], bool], object]
    ) -> None:
        stored = kept.texts if kept else {}
        self._texts = [stored.get(place) or Text() for place in range(len(order.requests))]
        self._told = [Text() for _ in self._texts]
        head = {
            "id": order.id,
            "created": order.created,
            "seed": order.sampling.seed,
            "digest": _digest(order),
        }
        self._head = [] if kept else [head]
        self._write = write

    def add(self, growths: Sequence[Growth]) -> None:
        new = [new_in(each, self._told[each.place], self._texts[each.place]) for each in growths]
        if new := list(filter(None, new)):
            self._write([*self._head, *new], bool(self._head))
            self._head = []


def _touch(path: Path, now: float) -> None:
    os.utime(path, (now, now))


def _digest(order: Order) -> str:
    return hashlib.sha256(f"{order.fingerprint} {prompt_digest(order)}".encode()).hexdigest()

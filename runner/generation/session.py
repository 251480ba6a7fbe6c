"""A session: a text whose tokens and KV cache outlive the process, so that a later one goes on from there."""

from __future__ import annotations

import collections.abc
import ctypes
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from runner.errors import BloomdeskError
from runner.generation.options import CONSTRAINTS, Sampling
from runner.generation.scoring import TokenScore
from runner.generation.sequence import Ids, Request, Sequence, common_length
from runner.generation.session_files import CACHE, SessionFiles, SessionRequest
from runner.model.kv_cache import KVCache

# Positions of a prompt in one record: a later prompt that differs behind them keeps the records before it.
POSITIONS_A_RECORD = 64
# Options that decide no token.
IDLE_OPTIONS = ("n", "stop", "ignore_eos")


class Session:
    """A session's files, and the sequence that they are of. `warn` gets a sentence if the disk stops taking more."""

    def __init__(
        self, directory: Path, fingerprint: str, request: Request, warn: Callable[[str], None]
    ) -> None:
        """Raises `BloomdeskError` if the directory is another model's session, or holds something else."""
        self._files = SessionFiles.load(directory)
        self._warn = warn
        self._is_written = True
        wanted = SessionRequest(fingerprint, tuple(request.prompt_ids), _options(request.sampling))
        known = self._files.request
        if known is not None and known.fingerprint != fingerprint:
            raise BloomdeskError(
                f"{directory} is a session of another model", "give another --session, or that model"
            )
        if known == wanted:
            # What two processes have written into one session is no text.
            common = common_length((*wanted.prompt_ids, *self.new_ids), self._files.ids)
            self._guarded(lambda: self._files.truncate(common))
        else:
            # The last token of a prompt gives the first new one, so it is fed again.
            common = common_length(wanted.prompt_ids[:-1], self._files.ids)
            self._guarded(lambda: self._files.begin(wanted, common))
        self.restored = self._files.positions

    @property
    def new_ids(self) -> tuple[int, ...]:
        return self._files.new_ids

    @property
    def scores(self) -> list[TokenScore]:
        return [
            TokenScore(token, logprob, tuple(map(tuple, top))) for token, logprob, top in self._files.scores
        ]

    def fill(self, cache: KVCache) -> None:
        """Load the keys and values of all positions into an empty cache."""
        load_positions(self._files, cache)

    def save(self, sequence: Sequence) -> None:
        """Append what the last pass has committed."""
        done, cache = self._files.positions, sequence.cache
        if not self._is_written or cache is None:
            return
        text, new, scores = sequence.text, [], []
        while done < cache.length:
            stop = cache.length
            if done < len(sequence.prompt_ids):
                stop = min(stop, done + POSITIONS_A_RECORD)
            if stop == cache.length:
                new = sequence.ids[len(self._files.new_ids) :]
                found = sequence.scores[len(self._files.scores) :]
                scores = [(each.token, each.logprob, each.top) for each in found]
            self._guarded(partial(append_positions, self._files, cache, text[done:stop], new, scores))
            if not self._is_written:
                return
            done = stop

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._is_written = False
            self._warn(f"{self._files.directory}: the session is not written any more: {error.strerror}")


def load_positions(files: SessionFiles, cache: KVCache, most: int | None = None) -> None:
    """Append the keys and values of the recorded positions, up to position `most`, to an empty cache."""
    first = cache.blocks[0]
    records = [record for record in files.records if most is None or record.stop <= most]
    if not records:
        return
    with (files.directory / CACHE).open("rb") as file:
        for record in records:
            file.seek(record.data[0])
            shape = (len(cache.blocks), 2, first.n_head, len(record.ids), first.head_dim)
            data = torch.empty(shape, dtype=first.keys.dtype)
            # Where there are no heads there is nothing to read.
            if data.numel():
                read = bytearray(file.read(record.data[1]))
                data = torch.frombuffer(read, dtype=first.keys.dtype).view(shape)
            cache.load(data)


def append_positions(
    files: SessionFiles,
    cache: KVCache,
    ids: Ids,
    new: Ids = (),
    scores: collections.abc.Sequence[tuple[object, ...]] = (),
) -> None:
    """Record the next positions, whose tokens are `ids`, and the `new` tokens that they gave. Raises `OSError`."""
    stored = cache.stored(files.positions, files.positions + len(ids))
    data = (ctypes.c_char * stored.nbytes).from_address(stored.data_ptr()) if stored.nbytes else b""
    files.append(ids, new, scores, memoryview(data).cast("B"))


def _options(sampling: Sampling) -> dict[str, object]:
    options = {name: value for name, value in asdict(sampling).items() if name not in IDLE_OPTIONS}
    for name in CONSTRAINTS:
        if options[name] is None:
            del options[name]  # sessions of older versions have none
    return {**options, "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()}}


def seed_of(directory: Path) -> int | None:
    """The seed of the session in `directory`, if it has one. Raises `BloomdeskError` as `Session` does."""
    request = SessionFiles.load(directory).request
    return request.options.get("seed") if request else None

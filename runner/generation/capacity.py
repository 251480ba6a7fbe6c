"""How many prompts go together, how many rows a pass may carry, and how the RAM is shared out for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError
from runner.generation import memory_plan as budget
from runner.generation.memory_plan import Budget
from runner.generation.sequence import Request
from runner.generation.speculation.cost import SLOPE
from runner.model.kv_cache import KVCache
from runner.weights.ring import buffer_bytes

if TYPE_CHECKING:
    from runner.generation.model import Model

# More prompts at a time hardly save anything: a pass of so many rows computes for longer than a disk reads.
MOST_AT_A_TIME = 64
# How much more may be streamed for the sake of rows that are not strictly needed.
SHARE_FOR_ROWS = 0.1
# How much faster memory is than a disk: it decides nothing but what is worth its RAM.
MEMORY_TO_DISK = 10.0


@dataclass(frozen=True)
class Capacity:
    """What fits. `batch` sequences at a time, whose caches take up to `cache_nbytes`; `rows` rows a pass, of which
    `logit_rows` give logits."""

    batch: int
    cache_nbytes: int
    rows: int
    logit_rows: int
    shares: Budget


class Planner:
    """Finds the capacity for these requests, with up to `proposals` tokens on trial for each in a pass.

    `draft_bytes` says what a draft takes for a number of sequences of so many positions each.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        proposals: int,
        draft_bytes: Callable[[int, int], int] | None,
    ) -> None:
        self._model = model
        self._shape, self._dtype = model.weights.model, model.weights.dtype
        self._chunks = [chunk.nbytes for chunk in model.weights.stream.chunks]
        self._prompts = sorted((len(request.prompt_ids) for request in requests), reverse=True)
        self._capacities = sorted((request.capacity for request in requests), reverse=True)
        self._proposals = proposals
        self._draft_bytes = draft_bytes

    def plan(self, batch: int | None) -> Capacity:
        """For up to `batch` sequences at a time; without it, as many as promise the most tokens a second.

        Raises `BloomdeskError` where the RAM is too little for the largest request alone.
        """
        best = self._largest_alone()
        for count in range(2, min(batch or MOST_AT_A_TIME, len(self._capacities)) + 1):
            try:
                found = self._fitting(count)
            except BloomdeskError:
                break
            if batch or self._worth(found) > self._worth(best):
                best = found
        return best

    def _largest_alone(self) -> Capacity:
        try:
            return self._fitting(1)
        except BloomdeskError as error:
            if len(self._capacities) == 1:
                raise
            positions = f"{self._capacities[0]:,} tokens of prompt and output"
            raise BloomdeskError(
                f"{error.message}, for the longest of the prompts: {positions}", error.hint
            ) from error

    def without_draft(self, found: Capacity) -> Capacity:
        """The same once the draft has gone; what stays now goes on staying."""
        self._draft_bytes = None
        return self._capacity(found.batch, found.rows, found.logit_rows, found.shares.resident)

    def _worth(self, found: Capacity) -> float:
        """Tokens for each byte of weights that is computed with; one read from the disk counts for several."""
        computed = sum(self._chunks) * (1 + SLOPE * (found.batch - 1))
        return found.batch / max(computed, MEMORY_TO_DISK * found.shares.streamed_bytes)

    def _fitting(self, batch: int) -> Capacity:
        """The capacity for `batch` sequences. What is not needed is left out where it would take too much."""
        longest = self._prompts[0]
        least = self._capacity(
            batch, batch, batch
        )  # a row for each is needed, and raises where it does not fit
        shares = least.shares
        room = shares.activations + shares.unused
        room += SHARE_FOR_ROWS * min(shares.resident_bytes, shares.streamed_bytes)
        logit_rows, proposals = batch, self._proposals
        while proposals and logit_rows == batch:
            if self._activations(batch * (1 + proposals), batch * (1 + proposals)) <= room:
                logit_rows = batch * (1 + proposals)
            proposals //= 2
        wanted = max(logit_rows, sum(self._prompts[:batch]))
        rows = _most(logit_rows, wanted, lambda rows: self._activations(rows, logit_rows) <= room)
        # A prompt that a pass can carry as a whole never goes through two.
        whole = max(rows, longest)
        try:
            return self._capacity(batch, whole, logit_rows)
        except BloomdeskError:
            rows = _most(logit_rows, whole, lambda rows: self._fits(batch, rows, logit_rows))
            return self._capacity(batch, rows, logit_rows)

    def _fits(self, batch: int, rows: int, logit_rows: int) -> bool:
        try:
            self._capacity(batch, rows, logit_rows)
        except BloomdeskError:
            return False
        return True

    def _activations(self, rows: int, logit_rows: int) -> int:
        return budget.activation_bytes(
            self._shape, rows, self._capacities[0], self._dtype.itemsize, logit_rows
        )

    def _capacity(
        self, batch: int, rows: int, logit_rows: int, keep: frozenset[int] = frozenset()
    ) -> Capacity:
        cache = sum(KVCache.nbytes(self._shape, each, self._dtype) for each in self._capacities[:batch])
        shares = budget.share_out(
            self._model.ram,
            self._model.process_nbytes,
            cache,
            self._activations(rows, logit_rows),
            self._chunks,
            max(map(buffer_bytes, self._chunks)),
            self._draft_bytes(batch, self._capacities[0]) if self._draft_bytes else 0,
            keep,
        )
        return Capacity(batch, cache, rows, logit_rows, shares)


def _most(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where `least` is taken to."""
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least

"""How a number of bytes of RAM is shared out: what has to be there, what is read ahead, and what stays resident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner import units
from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.system import memory

# Of what the machine has to spare, so that it stays a machine to work on.
DEFAULT_SHARE = 0.9
FEWEST_BUFFERS, MOST_BUFFERS = 3, 16
# What the process takes beside what is counted: compiled code, threads, page tables, the text so far.
MARGIN = 48 * 2**20
# Bytes for each element: float32 sums, their rounded form, and what an activation function makes of them on its way.
BYTES_BY_FEATURE = 14
BYTES_BY_SCORE = 14
# Scores of a long prompt are computed for so many bytes at a time, or for a few rows.
SCORE_BYTES = 64 * 2**20
LEAST_SCORE_ROWS = 4


def score_rows(n_head: int, length: int) -> int:
    """Rows of a sequence whose scores over `length` positions are computed at a time."""
    return max(LEAST_SCORE_ROWS, SCORE_BYTES // (n_head * length * BYTES_BY_SCORE))


def activation_bytes(
    model: Hyperparameters, rows: int, length: int, element_size: int, logit_rows: int = 1
) -> int:
    """The most that a pass needs beside weights and caches.

    `rows` rows, those of one sequence over up to `length` positions; `logit_rows` of them give logits.
    """
    widest = rows * 4 * model.hidden_size * BYTES_BY_FEATURE
    scores = model.n_head * min(rows, score_rows(model.n_head, length)) * length * BYTES_BY_SCORE
    states = 8 * rows * model.hidden_size * element_size
    return max(widest, scores) + states + 8 * logit_rows * model.vocab_size


@dataclass(frozen=True)
class Budget:
    """Where `total` bytes go. `resident` holds the indices of the chunks that stay."""

    total: int
    process: int
    cache: int
    activations: int
    draft: int  # a draft model with all that is its own
    buffers: int
    buffer_nbytes: int
    resident: frozenset[int]
    resident_bytes: int
    streamed_bytes: int  # in each pass

    @property
    def read_ahead(self) -> int:
        return self.buffers * self.buffer_nbytes

    @property
    def unused(self) -> int:
        """What nothing has a use for."""
        taken = self.process + self.cache + self.activations + self.draft + MARGIN
        return self.total - taken - self.read_ahead - self.resident_bytes


def default_total() -> int:
    """Bytes for this process when nobody says: most of what machine and control group can spare."""
    return int(DEFAULT_SHARE * (memory.memory_to_spare() + memory.memory_of_its_own()))


def share_out(
    total: int,
    process: int,
    cache: int,
    activations: int,
    chunks: Sequence[int],
    buffer_nbytes: int,
    draft: int = 0,
    keep: frozenset[int] = frozenset(),
) -> Budget:
    """Share `total` bytes out, for chunks of these sizes in the order of a pass.

    What stays resident is spread evenly over the pass, so that the disk is never idle while resident chunks are
    computed; the chunks `keep`, which are in RAM already, go on staying where they fit. Raises `BloomdeskError` where
    not even streaming everything fits.
    """
    weights = sum(chunks)
    spare = total - process - cache - activations - draft - MARGIN
    if spare >= weights:
        everything = frozenset(range(len(chunks)))
        return Budget(total, process, cache, activations, draft, 0, 0, everything, weights, 0)
    ahead = min(FEWEST_BUFFERS * buffer_nbytes, weights)
    needed = total - spare + ahead
    if needed > total:
        drafting, without = "", ""
        if draft:
            drafting, without = f", the draft {units.size(draft)}", ", or without the draft"
        raise BloomdeskError(
            f"{units.size(total)} of RAM are too little: {units.size(needed)} are needed, of which the program "
            f"{units.size(process + MARGIN)}, the KV cache {units.size(cache)}, a pass {units.size(activations)}"
            f"{drafting}, reading ahead {units.size(ahead)}",
            f"run it with --ram {-(-needed // 10**8) / 10:.1f}GB or more, or with a shorter prompt or fewer new "
            f"tokens{without}",
        )
    buffers = min(MOST_BUFFERS, max(FEWEST_BUFFERS, spare // 8 // buffer_nbytes))
    resident = spread(chunks, spare - buffers * buffer_nbytes, keep)
    kept = sum(chunks[index] for index in resident)
    return Budget(
        total, process, cache, activations, draft, buffers, buffer_nbytes, resident, kept, weights - kept
    )


def spread(sizes: Sequence[int], room: int, keep: frozenset[int] = frozenset()) -> frozenset[int]:
    """Indices of chunks that together fit into `room`, as evenly spread as their sizes allow.

    Those of `keep` are among them if all of these fit, and the others are spread beside them.
    """
    chosen = set(keep) if sum(sizes[index] for index in keep) <= room else set()
    room -= sum(sizes[index] for index in chosen)
    open_sizes = {index: size for index, size in enumerate(sizes) if index not in chosen}
    share = min(1.0, max(0, room) / max(1, sum(open_sizes.values())))
    credit = 0.0
    for index, size in open_sizes.items():
        credit += size * share
        if credit >= size / 2 and size <= room:
            chosen.add(index)
            credit -= size
            room -= size
    for index, size in open_sizes.items():  # what rounding left over
        if index not in chosen and size <= room:
            chosen.add(index)
            room -= size
    return frozenset(chosen)

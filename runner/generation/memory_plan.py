"""The memory plan: how bytes of RAM are divided between process, caches, activations, buffers and weights."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from runner import units
from runner.errors import BloomdeskError
from runner.format.hyperparameters import Hyperparameters
from runner.model.activations import activation_bytes
from runner.model.kv_cache import CacheShape, JoinedValues, KVCache, OwnHeads, whole_lanes
from runner.system import memory
from runner.weights.checkpoint import TORCH_DTYPES
from runner.weights.chunks import Chunk, buffer_bytes

# Fraction of what the machine can spare that a run takes by default; the rest keeps the machine usable.
DEFAULT_SHARE = 0.9
FEWEST_BUFFERS, MOST_BUFFERS = 3, 16
# Bytes of the process beside what is counted: compiled code, threads, page tables, the text so far.
MARGIN = 48 * 2**20


@dataclass(frozen=True)
class Machine:
    """Another machine that makes the same passes, with `heads` of the heads and chunks of its own, in bytes."""

    name: str
    ram: int
    process: int
    chunks: tuple[int, ...]
    heads: int

    @classmethod
    def here(cls, ram: int, process: int, chunks: Iterable[Chunk], heads: int) -> Machine:
        """This machine, by its name."""
        return cls(socket.gethostname(), ram, process, tuple(chunk.nbytes for chunk in chunks), heads)


@dataclass(frozen=True)
class MemoryRequest:
    """What passes need: `ram` bytes in all, of which the process already holds `process`.

    The matrices of `model` are in chunks of `chunks` bytes, in the order of a pass; `disks` are the numbers of their
    disks if there are several, each of which has as large a share of them as of the rate. There is a cache for each of
    `capacities` positions, and a pass has up to `rows` rows, of which `logit_rows` give logits. `draft` is the bytes
    of a draft model with its caches. The chunks `keep` are in RAM already, and stay there if they fit. `shared`
    positions of the caches are the same memory as others, and sequences of up to `joined` positions share some. Caches
    are of `heads` heads, by default of all. Of other `machines` each must have the RAM for such passes, too.
    """

    model: Hyperparameters
    chunks: tuple[int, ...]
    ram: int
    process: int
    capacities: tuple[int, ...]
    rows: int
    logit_rows: int = 1
    draft: int = 0
    keep: frozenset[int] = frozenset()
    shared: int = 0
    joined: int = 0
    heads: int | None = None
    machines: tuple[Machine, ...] = ()

    def on(self, machine: Machine) -> MemoryRequest:
        """What such passes need on another machine, which has no draft model."""
        return replace(
            self,
            chunks=machine.chunks,
            ram=machine.ram,
            process=machine.process,
            heads=machine.heads,
            draft=0,
            keep=frozenset(),
            machines=(),
        )

    @property
    def cache_shape(self) -> CacheShape:
        heads = self.model.n_head if self.heads is None else self.heads
        return OwnHeads(self.model.n_layer, heads, self.model.head_dim)

    disks: tuple[int, ...] = ()

    @property
    def disk_count(self) -> int:
        return max(self.disks, default=0) + 1

    @property
    def batch(self) -> int:
        """Number of sequences in a pass."""
        return len(self.capacities)

    @property
    def positions(self) -> int:
        """Positions of all KV caches."""
        return sum(map(whole_lanes, self.capacities)) - self.shared

    @property
    def cache(self) -> int:
        """Bytes of all KV caches."""
        return KVCache.nbytes(self.cache_shape, self.positions, TORCH_DTYPES[self.model.dtype])

    @property
    def activations(self) -> int:
        """Bytes of the activations of one pass."""
        dtype, longest = TORCH_DTYPES[self.model.dtype], max(self.capacities)
        joined = JoinedValues.nbytes(self.cache_shape, self.joined, dtype) if self.joined else 0
        return activation_bytes(self.model, self.rows, longest, dtype.itemsize, self.logit_rows) + joined

    @property
    def buffer_nbytes(self) -> int:
        return buffer_bytes(max(self.chunks))

    @property
    def spare(self) -> int:
        """Bytes for weights and buffers; negative if the RAM is too little."""
        return self.ram - self.process - self.cache - self.activations - self.draft - MARGIN

    @property
    def least_weights(self) -> int:
        """The fewest bytes for weights and buffers."""
        return min(FEWEST_BUFFERS * self.disk_count * self.buffer_nbytes, sum(self.chunks))

    @property
    def fits(self) -> bool:
        """Whether the RAM is enough, on all machines."""
        return self.fits_here and all(self.on(machine).fits_here for machine in self.machines)

    @property
    def fits_here(self) -> bool:
        """Whether the RAM of this machine is enough."""
        return self.spare >= self.least_weights


@dataclass(frozen=True)
class MemoryPlan:
    """The answer to `request`: `buffers` for the prefetch ring of each disk, and the chunks that stay, by index."""

    request: MemoryRequest
    buffers: int
    resident: frozenset[int]

    @property
    def read_ahead(self) -> int:
        """Bytes of the buffers."""
        return self.buffers * self.request.disk_count * self.request.buffer_nbytes

    @property
    def resident_bytes(self) -> int:
        return sum(self.request.chunks[index] for index in self.resident)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that each pass reads from the disk."""
        return sum(self.request.chunks) - self.resident_bytes

    @property
    def unused(self) -> int:
        """Bytes that nothing uses."""
        return self.request.spare - self.read_ahead - self.resident_bytes


def default_total() -> int:
    """Bytes for this process by default: most of what the machine and its control group can spare."""
    return int(DEFAULT_SHARE * (memory.memory_to_spare() + memory.memory_of_its_own()))


def memory_plan(request: MemoryRequest) -> MemoryPlan:
    """The division of the RAM that keeps as many chunks resident as fit.

    They are spread evenly over the pass, so that the disk is never idle while resident chunks are computed. Raises
    `BloomdeskError` if the RAM is too little even to stream everything.
    """
    if not request.fits:
        raise _too_little(request) if not request.fits_here else _too_little_elsewhere(request)
    buffers, for_each = 0, request.disk_count * request.buffer_nbytes
    if request.spare < sum(request.chunks):
        buffers = min(MOST_BUFFERS, max(FEWEST_BUFFERS, request.spare // 8 // for_each))
    return MemoryPlan(request, buffers, _resident(request, request.spare - buffers * for_each))


def _resident(request: MemoryRequest, room: int) -> frozenset[int]:
    """The chunks that stay in `room` bytes: of each disk the same share, so that all of them need the same time."""
    chosen, left = set[int](), sum(request.chunks)
    for disk in range(request.disk_count):
        own = [index for index, of in enumerate(request.disks or (0,) * len(request.chunks)) if of == disk]
        sizes = [request.chunks[index] for index in own]
        keep = frozenset(place for place, index in enumerate(own) if index in request.keep)
        found = spread(sizes, room * sum(sizes) // max(1, left), keep)
        chosen |= {own[place] for place in found}
        room -= sum(sizes[place] for place in found)
        left -= sum(sizes)
    return frozenset(chosen)


def _too_little_elsewhere(request: MemoryRequest) -> BloomdeskError:
    """The error for the first other machine whose RAM is too little."""
    lacking = next(each for each in request.machines if not request.on(each).fits_here)
    found = _too_little(request.on(lacking))
    return BloomdeskError(f"on {lacking.name}, {found.message}", found.hint)


def _too_little(request: MemoryRequest) -> BloomdeskError:
    needed = request.ram - request.spare + request.least_weights
    drafting, without = "", ""
    if request.draft:
        drafting, without = f", the draft {units.size(request.draft)}", ", or without the draft"
    return BloomdeskError(
        f"{units.size(request.ram)} of RAM are too little: {units.size(needed)} are needed, of which the program "
        f"{units.size(request.process + MARGIN)}, the KV cache {units.size(request.cache)}, a pass "
        f"{units.size(request.activations)}{drafting}, reading ahead {units.size(request.least_weights)}",
        f"run it with --ram {-(-needed // 10**8) / 10:.1f}GB or more, or with a shorter prompt or fewer new "
        f"tokens{without}",
    )


def spread(sizes: Sequence[int], room: int, keep: frozenset[int] = frozenset()) -> frozenset[int]:
    """Indices of chunks that together fit into `room` bytes, by error diffusion: as evenly spread as sizes allow.

    Those of `keep` are among them if all of these fit, and the others are spread beside them; else some of `keep`.
    """
    keeps_all = sum(sizes[index] for index in keep) <= room
    chosen = set(keep) if keeps_all else set()
    room -= sum(sizes[index] for index in chosen)
    others = {
        index: size for index, size in enumerate(sizes) if (index not in keep if keeps_all else index in keep)
    }
    share = min(1.0, max(0, room) / max(1, sum(others.values())))
    error = 0.0
    for index, size in others.items():
        error += size * share
        if error >= size / 2 and size <= room:
            chosen.add(index)
            error -= size
            room -= size
    # What rounding left over.
    for index, size in others.items():
        if index not in chosen and size <= room:
            chosen.add(index)
            room -= size
    return frozenset(chosen)

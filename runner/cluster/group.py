"""The ranks and the connections between them: tensors and orders that go from one to another, and who is gone.

Every two ranks are connected, and what goes from one to another arrives in its order. So a wait is for one rank, and
one that fails names it. A rank that ends says why in torch's store first, so that nobody blames those who ended because
of another.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from runner.errors import LastingFailure, refused

# Seconds that a rank may take between two signs of life, and after which the lead gives one.
PATIENCE, SECONDS_BETWEEN_SIGNS = 18.0, 5.0
# Seconds for a look into the store, which may be on the machine that is gone; and those in which a silent rank may
# still say that it waits for another, or the others read what this one leaves there.
_LOOK, GRACE = 3.0, 5.0
# The reason of a rank that Ctrl-C has ended.
INTERRUPTED = "interrupted"
# In the store, the number of ranks that have left.
_LEFT = "bloomdesk/left"
# Bytes of a message with an order; what does not fit follows in another.
ORDER_BYTES = 4096


@dataclass
class Wire:
    """Bytes that this rank has sent and received, without those of the protocols below, and its waits for others."""

    sent: int = 0
    received: int = 0
    messages: int = 0
    waiting_seconds: float = 0.0


@dataclass
class Waiting:
    """Something on its way from or to rank `other`."""

    group: Group
    other: int
    work: Any

    def wait(self) -> None:
        """Return when it is there. Raises `LastingFailure`, which names who failed."""
        began = time.perf_counter()
        try:
            self.work.wait(timedelta(seconds=self.group.patience))
        except RuntimeError as error:
            raise self.group.failure(self.other, error) from error
        finally:
            self.group.wire.waiting_seconds += time.perf_counter() - began


@dataclass
class Group:
    """All ranks, of which this is number `rank`; `names` are those of their machines.

    The store lives as long as this process, or torchrun beside it, if it `keeps_store`.
    """

    rank: int
    names: Sequence[str]
    store: dist.Store
    keeps_store: bool
    patience: float = PATIENCE
    wire: Wire = field(default_factory=Wire)
    # Held by whoever uses the connections.
    lock: threading.RLock = field(default_factory=threading.RLock)
    # Whether the store has not answered once: it is not asked again, for each time would take as long.
    _is_deaf: bool = False

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(len(self.names)) if rank != self.rank]

    def title(self, rank: int) -> str:
        return f"rank {rank} ({self.names[rank]})"

    def receive(self, tensor: torch.Tensor, source: int) -> Waiting:
        """Have `tensor`, dense, filled by what rank `source` sends next."""
        self.wire.received += tensor.nbytes
        return self._started(source, dist.irecv, tensor)

    def send(self, tensor: torch.Tensor, target: int) -> Waiting:
        """Send `tensor`, dense, which must not change until it has gone."""
        self.wire.sent += tensor.nbytes
        self.wire.messages += 1
        return self._started(target, dist.isend, tensor)

    def _started(self, other: int, start: Any, tensor: torch.Tensor) -> Waiting:
        try:
            return Waiting(self, other, start(tensor, other))
        except RuntimeError as error:
            raise self.failure(other, error) from error

    def tell(self, message: object, targets: Sequence[int]) -> None:
        """Send a JSON value to the ranks `targets`."""
        data = json.dumps(message).encode()
        head, rest = torch.zeros(ORDER_BYTES, dtype=torch.uint8), data[ORDER_BYTES - 8 :]
        first = len(data).to_bytes(8, "little") + data[: ORDER_BYTES - 8]
        head[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        parts = [head, torch.frombuffer(bytearray(rest), dtype=torch.uint8)] if rest else [head]
        for each in [self.send(part, target) for part in parts for target in targets]:
            each.wait()

    def told(self, source: int) -> Any:
        """The next JSON value from rank `source`."""
        head = torch.empty(ORDER_BYTES, dtype=torch.uint8)
        self.receive(head, source).wait()
        first = head.numpy().tobytes()
        nbytes = int.from_bytes(first[:8], "little")
        data = first[8 : 8 + nbytes]
        if nbytes > len(data):
            rest = torch.empty(nbytes - len(data), dtype=torch.uint8)
            self.receive(rest, source).wait()
            data += rest.numpy().tobytes()
        return json.loads(data)

    def failure(self, other: int, error: RuntimeError) -> BaseException:
        """The error to raise for one of a connection with rank `other`: what that one said last, if anything."""
        is_silent = "imed out" in str(error)
        if is_silent:
            other = self._who_is_silent(other)
        said = self._farewell_of(other)
        if said == INTERRUPTED:
            return KeyboardInterrupt()
        if said:
            return LastingFailure(said, "")
        why = "it has ended, or its machine or the network has"
        if is_silent:
            why = f"nothing came from it for {self.patience:.0f} s"
            if self._is_deaf:
                why += ", and the store where all meet does not answer"
        return LastingFailure(
            f"the connection with {self.title(other)} is broken: {why}",
            "see what that machine says; with --session, the same command on all of them resumes the text",
        )

    def leave(self, reason: BaseException) -> None:
        """Leave the others word of why this rank ends, and close its connections, by which they notice."""
        text = reason_of(reason)
        if not isinstance(reason, LastingFailure | KeyboardInterrupt):
            text = f"{self.title(self.rank)} has ended: {text}"
        _forget_transfers(reason)
        self._within(_LOOK, lambda: self._say_farewell(text))

    def _say_farewell(self, text: str) -> None:
        self.store.set(_farewell(self.rank), text)
        left = self.store.add(_LEFT, 1)
        dist.destroy_process_group()
        deadline = time.monotonic() + GRACE / 2
        while self.keeps_store and left < len(self.names) and time.monotonic() < deadline:
            time.sleep(GRACE / 100)
            left = self.store.add(_LEFT, 0)

    def _farewell_of(self, other: int) -> str | None:
        return self._within(_LOOK, lambda: self._looked_up(_farewell(other)))

    def _looked_up(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _who_is_silent(self, other: int) -> int:
        """The rank for which others wait, that waits for nobody itself; `other` is the one that this rank waits for."""

        def look() -> int:
            self.store.set(_waits_for(self.rank), str(other))
            time.sleep(GRACE)
            found, seen = other, set[int]()
            while found not in seen and (next_one := self._looked_up(_waits_for(found))) is not None:
                seen.add(found)
                found = int(next_one)
            return found

        found = self._within(_LOOK + GRACE, look)
        return other if found in (None, self.rank) else found

    def _within(self, seconds: float, look: Callable[[], Any]) -> Any:
        """What a `look` into the store gives, or None if it fails or takes longer."""
        found: list[Any] = []

        def run() -> None:
            with suppress(RuntimeError, OSError):
                found.append(look())

        if self._is_deaf:
            return None
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        self._is_deaf = thread.is_alive()
        return found[0] if found else None


def reason_of(error: BaseException) -> str:
    """Why a process ends, for others to read."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    known = refused(error) if isinstance(error, OSError | MemoryError) else error
    return str(getattr(known, "message", known))


def _farewell(rank: int) -> str:
    return f"bloomdesk/farewell/{rank}"


def _waits_for(rank: int) -> str:
    return f"bloomdesk/waits/{rank}"


def _forget_transfers(reason: BaseException | None) -> None:
    """Let go of what is under way in the frames that an error has come through: gloo keeps a connection for it."""
    while reason is not None:
        traceback.clear_frames(reason.__traceback__)
        reason = reason.__context__

"""Batches: what was asked for, and how far each has come."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.server.jobs.data import JOURNAL, RECORD, new_id, records, write_record

VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING = "validating", "in_progress", "finalizing", "cancelling"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
RUNNING = frozenset({VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING})
SEED_BYTES = 8


@dataclass(frozen=True)
class Order:
    """What a client asked for. The `model` is known by its `fingerprint`, and its chat template by `template`."""

    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: float
    metadata: Mapping[str, str] | None
    model: str
    fingerprint: str
    template: str | None


@dataclass(frozen=True)
class Batch:
    """A batch; all times are in seconds.

    `seed` is what the seeds of lines without one are made of, and the ids of files are those that it will have.
    `total`, `completed` and `failed` are numbers of lines, known when it is done.
    """

    id: str
    order: Order
    created_at: float
    seed: int = field(default_factory=lambda: int.from_bytes(secrets.token_bytes(SEED_BYTES)))
    output_file_id: str = field(default_factory=lambda: new_id("file-"))
    error_file_id: str = field(default_factory=lambda: new_id("file-"))
    status: str = VALIDATING
    # When it came to each of its statuses.
    times: Mapping[str, float] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    has_output: bool = False
    has_errors: bool = False
    errors: Sequence[Mapping[str, Any]] = ()

    @property
    def is_running(self) -> bool:
        return self.status in RUNNING

    @classmethod
    def of_record(cls, body: dict[str, Any]) -> Batch:
        return cls(**{**body, "order": Order(**body["order"])})


@dataclass(frozen=True)
class Progress:
    """How far a batch that runs has come, and, if it does not go on, why."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    paused: str | None = None


class Batches:
    """The batches in a directory. Any thread may call; what fails on the disk raises `OSError` and changes nothing."""

    def __init__(self, directory: Path, now: Callable[[], float]) -> None:
        """Raises `BloomdeskError` if a record is damaged."""
        self._directory, self._now = directory, now
        self._lock = threading.Lock()
        self._batches = {batch_id: Batch.of_record(body) for batch_id, body in records(directory)}
        # Of those that run; each is replaced as a whole.
        self._progress: dict[str, Progress] = {}
        for batch in self._batches.values():
            if not batch.is_running:
                self.journal(batch).unlink(missing_ok=True)

    def all(self) -> list[Batch]:
        """The oldest first."""
        # Replaced as a whole, so nobody waits for the disk.
        return sorted(self._batches.values(), key=lambda batch: (batch.created_at, batch.id))

    def get(self, batch_id: str) -> Batch | None:
        return self._batches.get(batch_id)

    def journal(self, batch: Batch) -> Path:
        return self._directory / f"{batch.id}{JOURNAL}"

    def create(self, order: Order) -> Batch:
        batch = Batch(new_id("batch_"), order, self._now())
        with self._lock:
            self._store(batch)
        return batch

    def to(self, batch: Batch, status: str, only: Collection[str] = RUNNING, **changes: Any) -> Batch:
        """The batch with another status, if it has one of `only`; else as it is."""
        with self._lock:
            found = self._batches[batch.id]
            if found.status in only:
                times = {**found.times, status: self._now()}
                found = replace(found, status=status, times=times, **changes)
                self._store(found)
        if not found.is_running:
            self._progress.pop(found.id, None)
        return found

    def tell(self, batch: Batch, progress: Progress) -> None:
        """Have clients see how far a batch has come."""
        if batch.is_running:
            self._progress[batch.id] = progress

    def reads(self, file_id: str) -> Batch | None:
        """A batch that still needs a file."""
        needs = (each for each in self.all() if each.is_running and each.order.input_file_id == file_id)
        return next(needs, None)

    def document(self, batch: Batch) -> dict[str, Any]:
        """A batch as OpenAI has it; `paused` is ours, and says why it does not go on."""
        order = batch.order
        found = self._progress.get(batch.id, Progress()) if batch.is_running else batch
        times = {
            f"{status}_at": int(batch.times[status]) if status in batch.times else None
            for status in (IN_PROGRESS, FINALIZING, COMPLETED, FAILED, CANCELLING, CANCELLED, "expired")
        }
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": order.endpoint,
            "model": order.model,
            "errors": {"object": "list", "data": list(batch.errors)} if batch.errors else None,
            "input_file_id": order.input_file_id,
            "completion_window": order.completion_window,
            "status": batch.status,
            "output_file_id": batch.output_file_id if batch.has_output else None,
            "error_file_id": batch.error_file_id if batch.has_errors else None,
            "created_at": int(batch.created_at),
            "expires_at": int(order.expires_at),
            **times,
            "request_counts": {"total": batch.total, "completed": found.completed, "failed": found.failed},
            "usage": _usage(found.input_tokens, found.output_tokens),
            "metadata": order.metadata,
            "paused": found.paused if isinstance(found, Progress) else None,
        }

    def _store(self, batch: Batch) -> None:
        write_record(self._directory / f"{batch.id}{RECORD}", asdict(batch))
        self._batches = {**self._batches, batch.id: batch}


def _usage(input_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + output_tokens,
    }

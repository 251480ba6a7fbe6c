"""A job: a batch that runs, from its validation to its files. The worker's thread alone calls it.

todo ──feed──> open (in the engine) ──growths, results──> pending ──journal──> on the disk
 ^                └── a pass failed
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.server.engine import Engine, Growth, PassFailed, Stopped
from runner.server.errors import ApiError, failed
from runner.server.jobs import batches as status
from runner.server.jobs.batches import Batch, Batches, Progress
from runner.server.jobs.files import OUTPUT, Files
from runner.server.jobs.journal import Journal, Place
from runner.server.jobs.lines import FORMS, Line, lines_of, order_of, read_line
from runner.server.jobs.outputs import blocks, output_line
from runner.server.jobs.validation import Validation
from runner.server.jobs.work import LineWork, Record, Text, prompt_digest
from runner.server.settings import Settings

# Lines that are checked at a time.
LINES_A_STEP = 100


@dataclass(frozen=True)
class Result:
    """Where a line's result is, and what it took."""

    place: Place
    is_ok: bool
    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, place: Place, record: Record) -> Result:
        usage = record["body"].get("usage") or {}
        tokens = (usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens"))
        return cls(place, record["status"] == 200, *tokens)


@dataclass
class Earlier:
    """What the journal has of a line that is not done, for a prompt of this digest."""

    digest: str
    texts: dict[int, Text]


class Job:
    """A batch that runs; `tell` gets what the engine's thread says of a line."""

    def __init__(
        self,
        batch: Batch,
        files: Files,
        batches: Batches,
        settings: Settings,
        tell: Callable[[Job, LineWork, Sequence[Growth], BloomdeskError | None], None],
    ) -> None:
        self.batch = batch
        self.paused: str | None = None
        self._files, self._batches, self._settings, self._tell = files, batches, settings, tell
        self._validation: Validation | None = None
        self._journal: Journal | None = None
        self._lines: dict[int, Line] = {}
        self._results: dict[int, Result] = {}
        self._earlier: dict[int, Earlier] = {}
        self._open: dict[int, LineWork] = {}
        self._todo: deque[int] = deque()
        self._pending: list[Record] = []

    @property
    def requests(self) -> int:
        """Number of requests that the engine has."""
        return sum(len(work.order.requests) for work in self._open.values())

    @property
    def is_impatient(self) -> bool:
        """Whether it goes on without hearing from the engine."""
        return self.batch.status == status.VALIDATING

    def go_on(self, engine: Engine, room: int) -> None:
        """Take the next step; open lines with up to `room` requests, but one at least if there is any room.

        Raises `OSError` if the disk fails, `BloomdeskError` if it cannot go on for now; nothing is lost by either.
        """
        self.batch = self._batches.get(self.batch.id)
        if self.batch.status == status.CANCELLING:
            self._close_lines(engine)
            self._finish(status.CANCELLED)
            return
        if self.batch.status in (status.IN_PROGRESS, status.FINALIZING):
            # So how far it has come is known, whichever model the server has.
            self._load()
        if self.batch.status == status.FINALIZING and self._has_all():
            self._finish(status.COMPLETED)
            return
        model = engine.opened()
        self._check_model(model)
        if self.batch.status == status.VALIDATING:
            self._validate(engine, model)
        if self.batch.status not in (status.IN_PROGRESS, status.FINALIZING):
            return
        self._load()
        self.write()
        self._feed(engine, model, room)
        if self._has_all():
            self.batch = self._batches.to(self.batch, status.FINALIZING, {status.IN_PROGRESS})
            if self.batch.status == status.FINALIZING:
                self._finish(status.COMPLETED)

    def take(self, work: LineWork, growths: Sequence[Growth], failure: BloomdeskError | None) -> None:
        """Take what the engine said. Raises `PassFailed` if its line is to be done again."""
        if self._open.get(work.number) is not work:
            return
        self._pending += filter(None, map(work.add, growths))
        if not (failure or work.is_done):
            return
        del self._open[work.number]
        try:
            self._pending.append(self._result(work, failure))
        except Exception:
            self._earlier[work.number] = Earlier(prompt_digest(work.order), dict(enumerate(work.texts)))
            self._todo.appendleft(work.number)
            raise

    def _result(self, work: LineWork, failure: BloomdeskError | None) -> Record:
        if isinstance(failure, Stopped | PassFailed):
            raise failure
        if failure:
            error = failed(failure)
            return {"line": work.number, "status": int(error.status), "body": error.document}
        document = FORMS[self.batch.order.endpoint].document
        body = document(work.order, self._model, work.growths)
        return {"line": work.number, "status": 200, "body": body}

    def write(self) -> None:
        """Have what the engine gave on the disk. Raises `OSError` if that fails; then it is for the next time."""
        if self._pending:
            places = self._journal.append(self._pending)
            for place, record in zip(places, self._pending, strict=True):
                if "status" in record:
                    self._results[record["line"]] = Result.of(place, record)
            self._pending = []

    def tell_progress(self) -> None:
        self._batches.tell(self.batch, self._progress())

    def _progress(self) -> Progress:
        results = self._results.values()
        ok = sum(result.is_ok for result in results)
        tokens = sum(work.tokens for work in self._open.values())
        tokens += sum(len(text.ids) for each in self._earlier.values() for text in each.texts.values())
        return Progress(
            ok,
            len(results) - ok,
            sum(result.input_tokens for result in results),
            sum(result.output_tokens for result in results) + tokens,
            self.paused,
        )

    def close(self) -> None:
        if self._journal:
            self._journal.close()
            self._journal = None

    def _check_model(self, model: Model) -> None:
        self._model, order = model, self.batch.order
        if order.fingerprint != model.weights.fingerprint:
            raise OtherModel(
                f"this batch is for another model, {order.model}: start the server with that one"
            )
        if order.template != template_digest(order.endpoint, self._settings):
            raise OtherModel("this batch is for another chat template: start the server with that one")

    def _validate(self, engine: Engine, model: Model) -> None:
        if self._validation is None:
            path = self._input()
            self._validation = Validation(self.batch, path, self._settings, engine.check)
        validation, self._validation = self._validation, None
        is_done = validation.go_on(model, LINES_A_STEP)
        if not is_done:
            # One that was interrupted has lost its place.
            self._validation = validation
            return
        total, errors = validation.total, validation.errors
        if errors:
            self.batch = self._batches.to(
                self.batch, status.FAILED, {status.VALIDATING}, total=total, errors=errors
            )
        else:
            self.batch = self._batches.to(self.batch, status.IN_PROGRESS, {status.VALIDATING}, total=total)

    def _input(self) -> Path:
        """The path of the input. Raises `BloomdeskError` if it is not what was sent."""
        file = self._files.get(self.batch.order.input_file_id)
        if file is None or not self._files.is_sound(file):
            raise BloomdeskError("the input file of this batch is missing or damaged: restore it from a copy")
        return self._files.path(file)

    def _load(self) -> None:
        """Find the lines, and what the journal has of them."""
        if not self._journal:
            self._load_journal()
        if not self._lines:
            path = self._input()
            lines = (line for line, _ in lines_of(path, self._settings.most_body_bytes))
            self._lines, self._path = {line.number: line for line in lines}, path
            self._todo = deque(number for number in self._lines if number not in self._results)

    def _load_journal(self) -> None:
        self._results, self._earlier = {}, {}
        journal = Journal(self._batches.journal(self.batch))
        try:
            for place, record in journal.records():
                self._remember(place, record)
        except BaseException:
            journal.close()
            raise
        self._journal = journal

    def _remember(self, place: Place, record: Record) -> None:
        number = record["line"]
        if "status" in record:
            self._results[number] = Result.of(place, record)
            self._earlier.pop(number, None)
            return
        earlier = self._earlier.get(number)
        if earlier is None or earlier.digest != record["prompt"]:
            earlier = self._earlier[number] = Earlier(record["prompt"], {})
        earlier.texts.setdefault(record["place"], Text()).add(record)

    def _has_all(self) -> bool:
        """Whether all results are on the disk."""
        self._load()
        return len(self._results) == len(self._lines)

    def _feed(self, engine: Engine, model: Model, room: int) -> None:
        while self._todo and room > 0:
            work = self._work(self._todo[0], engine, model)
            engine.submit(work.work)
            self._todo.popleft()
            self._earlier.pop(work.number, None)
            self._open[work.number] = work
            room -= len(work.order.requests)

    def _work(self, number: int, engine: Engine, model: Model) -> LineWork:
        endpoint, most = self.batch.order.endpoint, self._settings.most_body_bytes
        try:
            line = read_line(self._lines[number].read(self._path), endpoint, most)
            order = order_of(line, number, self.batch, model, self._settings)
        except ApiError as error:
            raise BloomdeskError(f"line {number} cannot be done any more: {error.message}") from None
        # The RAM may be less than when it was validated.
        engine.check(max(order.requests, key=lambda request: request.capacity))
        earlier = self._earlier.get(number)
        found = earlier.texts if earlier and earlier.digest == prompt_digest(order) else {}
        texts = [found.get(place) or Text() for place in range(len(order.requests))]
        return LineWork(number, order, texts, lambda *told: self._tell(self, *told))

    def _close_lines(self, engine: Engine) -> None:
        for work in self._open.values():
            engine.cancel(work.work)
            self._earlier[work.number] = Earlier(prompt_digest(work.order), dict(enumerate(work.texts)))
        self._open = {}

    def _finish(self, last: str) -> None:
        """Write the files, and then the last status."""
        if last == status.CANCELLED and status.IN_PROGRESS not in self.batch.times:
            self.batch = self._batches.to(self.batch, last)
            return
        self._load()
        self.write()
        results, progress = self._results, self._progress()
        bad = [number for number in self._lines if number not in results or not results[number].is_ok]
        good = [number for number in self._lines if number in results and results[number].is_ok]
        created = self.batch.times[status.FINALIZING if last == status.COMPLETED else status.CANCELLING]
        for numbers, name, file_id in (
            (good, "output", self.batch.output_file_id),
            (bad, "error", self.batch.error_file_id),
        ):
            if numbers:
                filename = f"{self.batch.id}_{name}.jsonl"
                lines = blocks(self._output(numbers))
                self._files.add(filename, OUTPUT, lines, file_id=file_id, created_at=created)
        self.batch = self._batches.to(
            self.batch,
            last,
            completed=len(good),
            failed=sum(number in results for number in bad),
            input_tokens=progress.input_tokens,
            output_tokens=progress.output_tokens,
            has_output=bool(good),
            has_errors=bool(bad),
        )
        self.close()
        with suppress(OSError):
            self._batches.journal(self.batch).unlink()

    def _output(self, numbers: Sequence[int]) -> Iterator[bytes]:
        endpoint, most = self.batch.order.endpoint, self._settings.most_body_bytes
        for number in numbers:
            line, result = self._lines[number], self._results.get(number)
            record: dict[str, Any] | None = None
            if result:
                record = self._journal.read(result.place)
                if record is None:
                    del self._results[number]
                    self._todo.append(number)
                    raise BloomdeskError(
                        f"the result of line {number} is damaged on the disk; it is done again"
                    )
            custom_id = read_line(line.read(self._path), endpoint, most).custom_id
            yield output_line(self.batch, line, custom_id, record)


class OtherModel(BloomdeskError):
    """This server cannot go on with a batch; a later one may."""


def template_digest(endpoint: str, settings: Settings) -> str | None:
    """What is equal for equal chat templates; None if the endpoint uses none."""
    if "chat" not in endpoint or settings.chat_template is None:
        return None
    return hashlib.sha256(settings.chat_template.text.encode()).hexdigest()

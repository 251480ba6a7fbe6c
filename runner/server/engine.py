"""The engine: one thread that owns the model and makes passes. Other threads hand it work, and are told what came.

submit, cancel ──> inbox ──between passes──> LiveBatch ──pass──> growths ──> the work's listener
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from runner.errors import BloomdeskError, LastingFailure, refused
from runner.generation import sequence
from runner.generation.live_batch import LiveBatch
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.generation.scoring import TokenScore
from runner.generation.sequence import Request, Restored
from runner.generation.stops import ScannedText
from runner.model.tokenizer import TextStream
from runner.server.progress import PassWatch, Progress

THREAD_NAME = "engine"
# Bytes of RAM for connections, bodies, and answers that are kept.
CLIENTS_NBYTES = 64 * 2**20
# Weight of the newest pass in the mean of their seconds.
NEWEST = 0.3


class Stopped(BloomdeskError):
    """The server ends before the work is done."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", "send the request again when it is back")


class PassFailed(BloomdeskError):
    """A pass could not be made, as when the disk fails; a later one may be."""


class Unavailable(BloomdeskError):
    """The model isn't there: it is still loading, or it couldn't be opened."""


@dataclass(frozen=True)
class End:
    """Why a text ended, as `Sequence.stop_reason` says it, and whether it is one of its grammar."""

    reason: str
    is_valid: bool | None = None


@dataclass(frozen=True)
class Growth:
    """What a pass gave request number `place` of a work: token `ids`, and the `text` that is certain by them.

    `scores` may come later than the ids that they are of; `prompt_scores` are those of the prompt's tokens from the
    second on. The last growth has the `end`.
    """

    place: int
    ids: tuple[int, ...] = ()
    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    end: End | None = None


class Listener(Protocol):
    """Hears of a work, in the engine's thread: it must return at once. After a failure nothing more comes."""

    def grown(self, growths: Sequence[Growth]) -> None: ...

    def failed(self, failure: BloomdeskError) -> None: ...


@dataclass(frozen=True, eq=False)
class Work:
    """Requests that are answered together, who hears of them, and what an `earlier` run has given each, if any has.

    The first growths have what is restored.
    """

    requests: tuple[Request, ...]
    listener: Listener
    earlier: tuple[Restored, ...] = ()


@dataclass(frozen=True)
class Queued:
    """A request that is not done: whether it is in the pass, its `tokens` so far, and the most it may get."""

    work: Work
    is_active: bool
    tokens: int
    most_tokens: int


@dataclass(eq=False)
class _Task:
    """One request of a work in the batch, and how much of it was told."""

    work: Work
    place: int
    sequence: sequence.Sequence
    text: TextStream | ScannedText
    ids: int = 0
    scores: int = 0
    prompt_scores: int = 0
    # How many of its tokens were made here, or counted as such.
    counted: int = 0

    def growth(self) -> Growth | None:
        """What is new since the last call, or None."""
        found, end = self.sequence, None
        new_ids = tuple(found.ids[self.ids :])
        scores = tuple(found.scores[self.scores :])
        prompt_scores = tuple(found.prompt_scores[self.prompt_scores :])
        text = "".join(map(self.text.push, new_ids))
        if found.is_done:
            end = End(found.stop_reason or "", found.is_valid)
            text += self.text.finish()
        elif not (new_ids or scores or prompt_scores):
            return None
        self.ids += len(new_ids)
        self.scores += len(scores)
        self.prompt_scores += len(prompt_scores)
        return Growth(self.place, new_ids, text, scores, prompt_scores, end)


@dataclass
class Totals:
    """What the engine has done since it started."""

    passes: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    pass_seconds: float = 0.0


class Engine:
    """Makes passes as long as there is work. `submit`, `cancel` and `stop` may be called from any thread."""

    def __init__(
        self,
        open_model: Callable[[], Model],
        options: GenerationOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`options` has the draft, the speculation and the largest batch; `open_model` runs in the engine's thread."""
        self._open_model, self._options, self._clock = open_model, options, clock
        self._changed = threading.Condition()
        self._joining: list[Work] = []
        self._leaving: set[Work] = set()
        self._is_stopping = False
        self._batch: LiveBatch | None = None
        self._tasks: dict[Work, list[_Task]] = {}
        # The most positions of a text that was found to fit.
        self._fitting = 0
        self._watch = PassWatch(lambda: self.bytes_read, clock)
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        # These are replaced as a whole, so other threads may read them at any time.
        self.model: Model | None = None
        self.failure: BloomdeskError | None = None
        self.progress = Progress()
        self.totals = Totals()
        # Mean seconds of the last passes, and until the first active sequence is done.
        self.seconds_a_pass = 0.0
        self.seconds_to_room = 0.0

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self.model is not None and self.failure is None and not self._is_stopping

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that passes needed from the files."""
        return self.model.weights.stream.traffic.bytes_read if self.model else 0

    @property
    def waiting(self) -> int:
        """Number of requests that are in no pass yet, without those that give way."""
        with self._changed:
            joining = sum(not request.gives_way for work in self._joining for request in work.requests)
        return joining + (len(self._batch.waiting) if self._batch else 0)

    def queue(self) -> list[Queued]:
        """The requests that are not done, those of the pass first, then in the order in which they join."""
        with self._changed:
            joining = list(self._joining)
        tasks = [task for tasks in list(self._tasks.values()) for task in list(tasks)]
        active = set(self._batch.active) if self._batch else set()
        found = [
            Queued(
                task.work,
                task.sequence in active,
                len(task.sequence.ids),
                task.sequence.request.max_new_tokens,
            )
            for task in tasks
        ]
        known = {task.work for task in tasks}
        found += [
            Queued(work, False, 0, request.max_new_tokens)
            for work in joining
            if work not in known
            for request in work.requests
        ]
        return sorted(found, key=lambda each: not each.is_active)

    def opened(self) -> Model:
        """The model. Raises `Unavailable` if it isn't there yet, or never will be, and `Stopped` at the end."""
        if self._is_stopping:
            raise Stopped
        if self.failure:
            raise Unavailable(self.failure.message, self.failure.hint)
        if self.model is None:
            raise Unavailable("the model is still loading", "try again in a few seconds")
        return self.model

    def check(self, request: Request) -> None:
        """Raise `BloomdeskError`, with the figures, if the RAM is too little for this request alone."""
        self.opened()
        # It depends on the positions alone, and on what grammars take.
        if request.grammar is None and request.capacity <= self._fitting:
            return
        self._batch.check(request)
        self._fitting = max(self._fitting, request.capacity)

    def submit(self, work: Work) -> None:
        """Have the requests join the next pass with room for them. Raises what `opened` raises."""
        self.opened()
        with self._changed:
            if self._is_stopping:
                raise Stopped
            self._joining.append(work)
            self._changed.notify()

    def cancel(self, work: Work, on_forgotten: Callable[[], None] = lambda: None) -> None:
        """Forget the work before the next pass; its listener hears nothing more after `on_forgotten`."""
        with self._changed:
            self._leaving.add(work)
            self._changed.notify()

    def keep(self, work: Work) -> bool:
        """Whether the work goes on, since `cancel` has not come into force yet, and does not any more."""
        with self._changed:
            is_there = work in self._leaving
            self._leaving.discard(work)
        return is_there

    def stop(self) -> None:
        """End after the pass that runs; whoever waits is told `Stopped`."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def give_up(self, failure: BloomdeskError) -> None:
        """End, since no pass can be made any more."""
        self.failure = failure
        self.stop()

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended, after waiting up to `timeout` seconds for it."""
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            model = self._open_model()
            # Later, passes would take RAM at the same time, so that it couldn't be measured.
            model.grammars.prepare()
            self._batch = model.live_batch(self._options, self._on_part, self._on_begin, CLIENTS_NBYTES)
            self.model = model
        except Exception as error:
            self.failure = _worded(error)
            return
        try:
            while self._take():
                self._make_pass()
        except Exception as error:
            self.failure = _worded(error)
        self._fail_all(self.failure or Stopped())

    def _make_pass(self) -> None:
        began = self._clock()
        try:
            # What needs no pass may be all there is.
            if any(self._counts()) or self._batch.giving_way:
                self._batch.step()
        except LastingFailure:
            raise
        except Exception as error:
            # As when the disk fails: the next request may find it well again.
            self._fail_all(_pass_failed(error))
        else:
            self._publish(self._clock() - began)

    def _take(self) -> bool:
        """Whether there is a pass to make, after those who join and leave were taken; waits until there is."""
        while not self._is_stopping:
            with self._changed:
                while not (self._joining or self._leaving or self._tasks or self._is_stopping):
                    self.progress = Progress(self.progress.number)
                    self._changed.wait()
                joining, self._joining = self._joining, []
                leaving, self._leaving = self._leaving, set()
            # All are known before one is begun, so that each hears of an end.
            new: dict[Work, list[_Task]] = {work: [] for work in joining if work not in leaving}
            self._tasks |= new
            for work, tasks in new.items():
                with self._alone(work):
                    tasks.extend(self._begun(work))
            for work in leaving:
                for task in self._tasks.pop(work, ()):
                    self._batch.drop(task.sequence)
            if self._tasks:
                break
        return not self._is_stopping

    def _begun(self, work: Work) -> Iterator[_Task]:
        for place, request in enumerate(work.requests):
            earlier = work.earlier[place] if work.earlier else Restored()
            found = self._batch.add(request, earlier)
            self.totals.prompt_tokens += len(found.prompt_ids)
            yield _Task(work, place, found, self.model.stream(found), counted=len(earlier.ids))

    @contextmanager
    def _alone(self, work: Work) -> Iterator[None]:
        """Whatever fails within ends this work, and no other."""
        try:
            yield
        except (OSError, MemoryError) as error:
            self._fail(work, _pass_failed(error))
        except Exception as error:
            self._fail(work, _worded(error))

    def _counts(self) -> tuple[int, int]:
        return len(self._batch.active), len(self._batch.waiting)

    def _on_begin(self) -> None:
        self.progress = self._watch.begin(*self._counts())

    def _on_part(self, part: int, parts: int) -> None:
        self.progress = self._watch.after(part, parts, *self._counts())

    def _publish(self, seconds: float) -> None:
        """Tell every work what the pass gave it."""
        self.totals.passes = self._batch.passes
        self.totals.pass_seconds += seconds
        mean = self.seconds_a_pass or seconds
        self.seconds_a_pass = (1 - NEWEST) * mean + NEWEST * seconds
        for work, tasks in list(self._tasks.items()):
            with self._alone(work):
                self._tell(work, tasks)
        remaining = min((each.remaining for each in self._batch.active), default=0)
        self.seconds_to_room = remaining * self.seconds_a_pass

    def _tell(self, work: Work, tasks: list[_Task]) -> None:
        growths = [growth for task in tasks if (growth := task.growth())]
        for task in tasks:
            self.totals.new_tokens += max(0, task.ids - task.counted)
            task.counted = max(task.ids, task.counted)
        if failure := next((task.sequence.failure for task in tasks if task.sequence.failure), None):
            self._fail(work, failure)
            return
        tasks[:] = [task for task in tasks if not task.sequence.is_done]
        if not tasks:
            del self._tasks[work]
        if growths:
            work.listener.grown(growths)

    def _fail(self, work: Work, failure: BloomdeskError) -> None:
        for task in self._tasks.pop(work, ()):
            self._batch.drop(task.sequence)
        # One that can't be told, as its loop has ended, holds up no other.
        with suppress(Exception):
            work.listener.failed(failure)

    def _fail_all(self, failure: BloomdeskError) -> None:
        with self._changed:
            joining, self._joining = self._joining, []
        for work in [*self._tasks, *joining]:
            self._fail(work, failure)


def _pass_failed(error: Exception) -> PassFailed:
    why = _worded(error)
    return PassFailed(why.message, why.hint)


def _worded(error: Exception) -> BloomdeskError:
    if isinstance(error, BloomdeskError):
        return error
    if isinstance(error, OSError | MemoryError):
        return refused(error)
    return BloomdeskError(f"unexpected {type(error).__name__}: {error}", "report it")

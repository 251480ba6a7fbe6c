"""Answers: the growths of a work so far, which any number of clients read at their own pace, and who shares one.

    engine's thread ──grown, failed──> event loop: Answer ──> readers, one for each client

A slow reader holds up nothing: what it has not read yet is in the answer anyway.

    running ──the last reader leaves──> paused: no rows in any pass ──a reader comes──> running, from where it was
       └──> finished <──its last pass was under way──┘
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from runner.errors import BloomdeskError
from runner.generation.scoring import TokenScore
from runner.generation.sequence import Restored
from runner.server.engine import Engine, Growth, Work
from runner.server.kept import Kept, KeptAnswers
from runner.server.orders import Order

# Answers that have ended or paused and are kept for a client that asks again: how many, and with how many tokens.
MOST_KEPT = 512
MOST_KEPT_TOKENS = 200_000


class Answer:
    """All growths so far of an order's work. Everything happens in the event loop that it was made in.

    It is finished if all choices have ended, or with a `failure`. When the last reader leaves an unfinished one, it
    pauses before the next pass; when one comes, it goes on, and only its prompt and its tokens are read again.
    `on_end`, `on_pause` and `on_resume` are called when it does, `on_growths` with what a pass gave.
    """

    def __init__(self, order: Order, engine: Engine, earlier: tuple[Restored, ...] = ()) -> None:
        """`earlier` is what another run of the server has given each request, if any has."""
        self.order = order
        self.growths: list[Growth] = []
        self.failure: BloomdeskError | None = None
        self.readers = 0
        self.on_growths: Callable[[Sequence[Growth]], None] = lambda _: None
        self.on_end: Callable[[], None] = _nothing
        self.on_pause: Callable[[], None] = _nothing
        self.on_resume: Callable[[], None] = _nothing
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._open = len(order.requests)
        self._changed = asyncio.Event()
        # None while it is paused and the engine has forgotten it.
        self._work: Work | None = Work(order.requests, self, earlier)
        self._earlier = earlier or (Restored(),) * len(order.requests)
        self._is_paused = False
        # What the first growths after a pause bring again.
        self._repeated: dict[int, _Seen] = {}

    def begin(self) -> None:
        """Hand the work to the engine. Raises what `Engine.submit` raises."""
        self._engine.submit(self._work)

    @property
    def is_finished(self) -> bool:
        return not self._open or self.failure is not None

    @property
    def new_tokens(self) -> int:
        """Number of tokens that came so far."""
        return sum(len(growth.ids) for growth in self.growths)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count as a reader."""
        self.readers += 1
        if self._is_paused and not self.is_finished:
            self._resume()
        try:
            yield
        finally:
            self.readers -= 1
            if not self.readers and not self.is_finished:
                self._pause()

    async def wait(self, seen: int, timeout: float) -> None:
        """Return when there are more than `seen` growths, when it is finished, or after `timeout` seconds."""
        if len(self.growths) <= seen and not self.is_finished:
            # `wait_for` of Python 3.11 can lose the cancellation of a client that leaves.
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._changed.wait()

    def _pause(self) -> None:
        self._is_paused = True
        if self._work:
            self._engine.cancel(self._work)
        self.on_pause()

    def _resume(self) -> None:
        self._is_paused = False
        self.on_resume()
        if self._work and self._engine.keep(self._work):
            return
        self._work = None
        # After the growths of its last pass, which may be on their way.
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._work or self._is_paused or self.is_finished:
            return
        seen = [_Seen() for _ in self.order.requests]
        for growth in self.growths:
            seen[growth.place].add(growth)
        self._repeated = dict(enumerate(seen))
        # What was restored comes with the first growth.
        pairs = zip(seen, self._earlier, strict=True)
        earlier = tuple(each.restored if each.has_any else before for each, before in pairs)
        self._work = Work(self.order.requests, self, earlier)
        try:
            self.begin()
        except BloomdeskError as error:
            self._fail(error)

    # The engine's thread calls these.

    def grown(self, growths: Sequence[Growth]) -> None:
        self._soon(self._add, growths)

    def failed(self, failure: BloomdeskError) -> None:
        self._soon(self._fail, failure)

    def _soon(self, action: Callable[..., None], *arguments: object) -> None:
        # The loop is closed if the server has ended.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(action, *arguments)

    def _add(self, growths: Sequence[Growth]) -> None:
        before = len(self.growths)
        for growth in growths:
            if seen := self._repeated.pop(growth.place, None):
                growth = seen.cut(growth)
            if growth:
                self.growths.append(growth)
                self._open -= growth.end is not None
        self.on_growths(self.growths[before:])
        self._wake()

    def _fail(self, failure: BloomdeskError) -> None:
        self.failure = failure
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self.is_finished:
            self.on_end()


def _nothing() -> None:
    """Nobody needs to be told."""


@dataclass
class _Seen:
    """What is known of one choice when it goes on."""

    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    characters: int = 0
    has_ended: bool = False

    def add(self, growth: Growth) -> None:
        self.ids += growth.ids
        self.scores += growth.scores
        self.prompt_scores += growth.prompt_scores
        self.characters += len(growth.text)
        self.has_ended |= growth.end is not None

    @property
    def has_any(self) -> bool:
        return bool(self.ids or self.prompt_scores)

    @property
    def restored(self) -> Restored:
        return Restored(self.ids, self.scores, self.prompt_scores)

    def cut(self, growth: Growth) -> Growth | None:
        """What is new in the first growth after the pause, which begins with all that is known; None for nothing."""
        if self.has_ended:
            return None
        return replace(
            growth,
            ids=growth.ids[len(self.ids) :],
            scores=growth.scores[len(self.scores) :],
            prompt_scores=growth.prompt_scores[len(self.prompt_scores) :],
            text=growth.text[self.characters :],
        )


class _Shelf:
    """Answers that are kept, the oldest first: up to so many, with so many tokens, and the last one in any case."""

    def __init__(self) -> None:
        # With the time since which it is kept, and the number of its tokens.
        self._answers: OrderedDict[bytes, tuple[float, int, Answer]] = OrderedDict()
        self._tokens = 0

    def get(self, key: bytes) -> Answer | None:
        return self._answers[key][2] if key in self._answers else None

    def put(self, key: bytes, answer: Answer, now: float) -> None:
        self._answers[key] = now, _tokens(answer), answer
        self._tokens += _tokens(answer)
        while len(self._answers) > 1 and (len(self._answers) > MOST_KEPT or self._tokens > MOST_KEPT_TOKENS):
            self.drop(next(iter(self._answers)))

    def drop(self, key: bytes) -> None:
        if key in self._answers:
            self._tokens -= self._answers.pop(key)[1]

    def forget(self, before: float) -> None:
        """Drop those that are kept since an earlier time."""
        for key in [key for key, (since, _, _) in self._answers.items() if since < before]:
            self.drop(key)


class SharedAnswers:
    """Answers by the key of their requests: while they come, and for `keep` seconds after their end or their pause.

    The disk may have what earlier runs of the server have `kept`, too.
    """

    def __init__(
        self,
        engine: Engine,
        keep: float,
        clock: Callable[[], float] = time.monotonic,
        kept: KeptAnswers | None = None,
    ) -> None:
        self._engine, self._keep, self._clock, self._disk = engine, keep, clock, kept
        self._open: dict[bytes, Answer] = {}
        # Paused ones have cost passes that nobody has had anything of, so no others take their place.
        self._ended, self._paused = _Shelf(), _Shelf()

    def known(self, key: bytes) -> Answer | None:
        """The answer to the same request, if there is one."""
        for shelf in (self._ended, self._paused):
            shelf.forget(self._clock() - self._keep)
        return self._open.get(key) or self._kept(key)

    async def kept(self, key: bytes | None) -> Kept | None:
        """What an earlier run of the server has made for the same request."""
        return await self._disk.find(key) if self._disk and key is not None else None

    def begin(self, order: Order, key: bytes | None, kept: Kept | None = None) -> Answer:
        """A new answer, which others with this `key` share; None shares it with nobody."""
        answer = Answer(order, self._engine, kept.restored(order) if kept else ())
        answer.begin()
        if key is not None:
            self._open[key] = answer
            if self._disk:
                answer.on_growths = self._disk.begin(key, order, kept)
            answer.on_end = answer.on_pause = lambda: self._store(key, answer)
            answer.on_resume = lambda: self._reopen(key, answer)
        return answer

    def _store(self, key: bytes, answer: Answer) -> None:
        if self._open.get(key) is answer:
            del self._open[key]
        elif self._kept(key) is not answer:
            return
        self._drop(key)
        if self._disk:
            self._disk.rest(key, has_ended=answer.is_finished and answer.failure is None)
        if answer.failure is None:
            shelf = self._ended if answer.is_finished else self._paused
            shelf.put(key, answer, self._clock())

    def _reopen(self, key: bytes, answer: Answer) -> None:
        if self._kept(key) is answer:
            self._drop(key)
            self._open[key] = answer
            if self._disk:
                self._disk.wake(key)

    def _kept(self, key: bytes) -> Answer | None:
        return self._ended.get(key) or self._paused.get(key)

    def _drop(self, key: bytes) -> None:
        for shelf in (self._ended, self._paused):
            shelf.drop(key)


def _tokens(answer: Answer) -> int:
    """Tokens that an answer holds, those that it names beside others too."""
    beside = 1 + (answer.order.logprobs or 0)
    scored = sum(len(growth.prompt_scores) for growth in answer.growths)
    return answer.order.prompt_tokens + beside * (answer.new_tokens + scored)

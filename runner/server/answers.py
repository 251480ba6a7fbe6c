"""Answers: the growths of a work so far, which any number of clients read at their own pace, and who shares one.

    engine's thread ──grown, failed──> event loop: Answer ──> readers, one for each client

A slow reader holds up nothing: what it has not read yet is in the answer anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from runner.errors import BloomdeskError
from runner.server.engine import Engine, Growth, Work
from runner.server.orders import Order

# Answers that are kept for a client that asks again, and the tokens of all of them together.
MOST_KEPT = 512
MOST_KEPT_TOKENS = 200_000


class Answer:
    """All growths so far of an order's work. Everything happens in the event loop that it was made in.

    It is finished if all choices have ended, or with a `failure`. When the last reader leaves an unfinished one, it is
    cancelled; who comes before the pass that runs has ended can still have it, as after a broken connection.
    """

    def __init__(self, order: Order, engine: Engine) -> None:
        self.order = order
        self.growths: list[Growth] = []
        self.failure: BloomdeskError | None = None
        self.readers = 0
        self.is_cancelled = False
        self.on_end: Callable[[], None] = lambda: None
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._open = len(order.requests)
        self._changed = asyncio.Event()
        self._work = Work(order.requests, self)

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
        try:
            yield
        finally:
            self.readers -= 1
            if not self.readers and not self.is_finished:
                self.is_cancelled = True
                self._engine.cancel(self._work, lambda: self._soon(self._forget))

    def is_wanted(self) -> bool:
        """Whether it comes; if it was cancelled, and can still be had, it does."""
        if self.is_cancelled and not self.is_finished and self._engine.recall(self._work):
            self.is_cancelled = False
        return not self.is_cancelled

    async def wait(self, seen: int, timeout: float) -> None:
        """Return when there are more than `seen` growths, when it is finished, or after `timeout` seconds."""
        if len(self.growths) <= seen and not self.is_finished:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)

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
        self.growths += growths
        self._open -= sum(growth.end is not None for growth in growths)
        self._wake()

    def _fail(self, failure: BloomdeskError) -> None:
        self.failure = failure
        self._wake()

    def _forget(self) -> None:
        if self.is_cancelled and not self.is_finished:
            self.on_end()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self.is_finished:
            self.on_end()


class SharedAnswers:
    """Answers by the key of their requests: while they come, and for `keep` seconds after their end."""

    def __init__(self, engine: Engine, keep: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._keep, self._clock = engine, keep, clock
        self._open: dict[bytes, Answer] = {}
        # With the time of their end, the oldest first.
        self._kept: OrderedDict[bytes, tuple[float, Answer]] = OrderedDict()
        self._kept_tokens = 0

    def known(self, key: bytes) -> Answer | None:
        """The answer to the same request, if there is one."""
        self._forget_old()
        answer = self._open.get(key)
        if answer and answer.is_wanted():
            return answer
        return self._kept[key][1] if key in self._kept else None

    def begin(self, order: Order, key: bytes | None) -> Answer:
        """A new answer, which others with this `key` share; None shares it with nobody."""
        answer = Answer(order, self._engine)
        answer.begin()
        if key is not None:
            self._open[key] = answer
            answer.on_end = lambda: self._end(key, answer)
        return answer

    def _end(self, key: bytes, answer: Answer) -> None:
        if self._open.get(key) is answer:
            del self._open[key]
        if answer.failure or not answer.is_finished:
            return
        self._kept[key] = self._clock(), answer
        self._kept_tokens += _tokens(answer)
        self._forget_old()

    def _forget_old(self) -> None:
        while self._kept:
            ended, answer = next(iter(self._kept.values()))
            is_old = self._clock() - ended > self._keep
            if not is_old and len(self._kept) <= MOST_KEPT and self._kept_tokens <= MOST_KEPT_TOKENS:
                return
            self._kept.popitem(last=False)
            self._kept_tokens -= _tokens(answer)


def _tokens(answer: Answer) -> int:
    """Tokens that an answer holds, those that it names beside others too."""
    beside = 1 + (answer.order.logprobs or 0)
    scored = sum(len(growth.prompt_scores) for growth in answer.growths)
    return answer.order.prompt_tokens + beside * (answer.new_tokens + scored)

"""A line at work: what its texts have so far, and what of that is on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.errors import BloomdeskError
from runner.generation.scoring import TokenScore
from runner.generation.sequence import Restored
from runner.server.engine import End, Growth, Work
from runner.server.orders import Order

Record = dict[str, Any]


@dataclass
class Text:
    """Tokens of one of a line's texts, and what was told of it by the engine."""

    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        return [len(self.ids), len(self.scores), len(self.prompt_scores)]

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record that follows what is here; any other was written beside a damaged one."""
        if record["at"] == self.counts:
            self.ids += record["ids"]
            self.scores += _scores(record.get("scores", ()))
            self.prompt_scores += _scores(record.get("prompt_scores", ()))

    def take(
        self, ids: Sequence[int], scores: Sequence[TokenScore], prompt_scores: Sequence[TokenScore]
    ) -> None:
        self.ids += ids
        self.scores += scores
        self.prompt_scores += prompt_scores

    @property
    def restored(self) -> Restored:
        return Restored(tuple(self.ids), tuple(self.scores), tuple(self.prompt_scores))


def _scores(stored: Sequence[Any]) -> list[TokenScore]:
    return [TokenScore(token, logprob, tuple(map(tuple, top))) for token, logprob, top in stored]


def _stored(scores: Sequence[TokenScore]) -> list[Any]:
    return [(each.token, each.logprob, each.top) for each in scores]


def new_in(growth: Growth, told: Text, text: Text) -> Record | None:
    """Take a growth; the record of what is new in it, or None.

    `told` is all that the engine has told, which begins with what was restored; `text` is what has a record.
    """
    told.take(growth.ids, growth.scores, growth.prompt_scores)
    at = text.counts
    new = (told.ids[at[0] :], told.scores[at[1] :], told.prompt_scores[at[2] :])
    if not any(new):
        return None
    text.take(*new)
    record = {"place": growth.place, "at": at, "ids": new[0]}
    for name, scores in (("scores", new[1]), ("prompt_scores", new[2])):
        if scores:
            record[name] = _stored(scores)
    return record


def prompt_digest(order: Order) -> str:
    """What is equal for equal prompts."""
    ids = [list(prompt.ids) for prompt in order.prompts]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


@dataclass(eq=False)
class LineWork:
    """Line number `number`, with its `order`, at work; `texts` are what the journal has of it.

    It is the listener of its work: the engine's thread calls `grown` and `failed`, which hand over to `tell`.
    """

    number: int
    order: Order
    texts: list[Text]
    tell: Callable[[LineWork, Sequence[Growth], BloomdeskError | None], None]
    failure: BloomdeskError | None = None
    ends: dict[int, End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        earlier = tuple(text.restored for text in self.texts)
        self.work = Work(self.order.requests, self, earlier)
        # What the engine has told so far, which begins with what was restored.
        self._told = [Text() for _ in self.texts]
        self._words = [""] * len(self.texts)
        self._digest = prompt_digest(self.order)

    def grown(self, growths: Sequence[Growth]) -> None:
        self.tell(self, growths, None)

    def failed(self, failure: BloomdeskError) -> None:
        self.tell(self, (), failure)

    @property
    def is_done(self) -> bool:
        return len(self.ends) == len(self.texts)

    @property
    def tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)

    def add(self, growth: Growth) -> Record | None:
        """Take a growth; the record of what is new in it, for the journal, or None."""
        self._words[growth.place] += growth.text
        if growth.end:
            self.ends[growth.place] = growth.end
        record = new_in(growth, self._told[growth.place], self.texts[growth.place])
        return record and {"line": self.number, "prompt": self._digest, **record}

    @property
    def growths(self) -> list[Growth]:
        """All that each text has, in one piece, so that sums over it don't depend on how it came."""
        return [
            Growth(
                place,
                tuple(told.ids),
                self._words[place],
                tuple(told.scores),
                tuple(told.prompt_scores),
                self.ends[place],
            )
            for place, told in enumerate(self._told)
        ]

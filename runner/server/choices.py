"""A choice of an answer: its text, and its tokens with their log-probabilities and their places in the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from runner.generation.model import Model
from runner.generation.scoring import TokenScore
from runner.model.tokenizer import Tokenizer
from runner.server.engine import End, Growth
from runner.server.orders import Order

# What OpenAI calls the ends of a text.
FINISH_REASONS = {"eos": "stop", "stop": "stop", "grammar": "stop", "length": "length"}


@dataclass(frozen=True)
class Name:
    """How a token is shown: as its text or, if it is no whole text, as OpenAI does it: "bytes:\\xe4\\xb8"."""

    text: str
    bytes: bytes

    @classmethod
    def of(cls, tokenizer: Tokenizer, token: int) -> Name:
        data = tokenizer.token_bytes(token) or (tokenizer.token_name(token) or f"<{token}>").encode()
        try:
            return cls(data.decode(), data)
        except UnicodeDecodeError:
            return cls("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)


@dataclass(frozen=True)
class ShownToken:
    """A token of a text, whose character number `offset` is its first one.

    `logprob` is None for the first token of a prompt, which nothing predicts; `top` are the likeliest ones at its
    place, and the token itself.
    """

    name: Name
    offset: int
    logprob: float | None = None
    top: tuple[tuple[Name, float], ...] = ()


class Choice:
    """Text and tokens of one choice as they grow. With `echo`, the text begins with the prompt.

    `new_tokens` is the number of new tokens, `logprob` the sum of their log-probabilities.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        shows_tokens: bool = False,
        echo: str = "",
        echo_ids: Sequence[int] = (),
    ) -> None:
        self.end: End | None = None
        self.new_tokens, self.logprob = 0, 0.0
        self._tokenizer, self._shows_tokens = tokenizer, shows_tokens
        self._echo = echo
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Characters of the text so far, and those before the next token.
        self._length = self._offset = 0
        self._in_prompt = bool(echo_ids)
        # Tokens that may turn out to be part of a stop text.
        self._held = [self._shown(echo_ids[0], None, is_prompt=True)] if shows_tokens and echo_ids else []

    @property
    def finish_reason(self) -> str | None:
        return FINISH_REASONS.get(self.end.reason) if self.end else None

    def grow(self, growth: Growth) -> tuple[str, list[ShownToken]]:
        """The new text, and the tokens that have come to be certain: not those of a stop text."""
        text, self._echo = self._echo + growth.text, ""
        self._length += len(text)
        self.end = growth.end
        self.new_tokens += len(growth.ids)
        # One by one: the sum of several depends on how they came.
        for score in growth.scores:
            self.logprob += score.logprob
        if not self._shows_tokens:
            return text, []
        self._held += [self._shown(each.token, each, is_prompt=True) for each in growth.prompt_scores]
        self._held += [self._shown(each.token, each) for each in growth.scores]
        count = len(self._held)
        if self.end is None or self.end.reason == "stop":
            beyond = (place for place, each in enumerate(self._held) if each.offset >= self._length)
            count = next(beyond, count)
        certain, self._held = self._held[:count], self._held[count:]
        return text, certain

    def _shown(self, token: int, score: TokenScore | None, *, is_prompt: bool = False) -> ShownToken:
        if self._in_prompt and not is_prompt:
            # No character begins in the prompt and ends in the new text.
            self._offset += len(self._decoder.decode(b"", final=True))
            self._in_prompt = False
        name = Name.of(self._tokenizer, token)
        # A special token is part of the text of a prompt, and of no new text.
        offset = self._decode(name.bytes if is_prompt else self._tokenizer.token_bytes(token))
        if score is None:
            return ShownToken(name, offset)
        top = [(Name.of(self._tokenizer, other), logprob) for other, logprob in score.top]
        if token not in dict(score.top):
            top.append((name, score.logprob))
        return ShownToken(name, offset, score.logprob, tuple(top))

    def _decode(self, data: bytes) -> int:
        """The place of the character that has the first of the next bytes."""
        was_unfinished = bool(self._decoder.getstate()[0])
        head = self._decoder.decode(data[:1])
        is_unfinished = bool(self._decoder.getstate()[0])
        # If the byte does not go on with the character before, that is none, and is shown as such before this one.
        offset = self._offset + (was_unfinished and len(head) + is_unfinished > 1)
        self._offset += len(head) + len(self._decoder.decode(data[1:]))
        return offset


class Grown:
    """The choices of an order as they grow."""

    def __init__(self, order: Order, model: Model) -> None:
        self._order = order
        self.choices = [
            Choice(
                model.tokenizer,
                shows_tokens=order.logprobs is not None,
                **({"echo": prompt.text, "echo_ids": prompt.ids} if order.echo else {}),
            )
            for prompt in order.prompts
            for _ in range(order.best_of)
        ]

    def add(self, growth: Growth) -> tuple[int, str, list[ShownToken]]:
        """The choice that has grown, its new text, and its tokens that have come to be certain."""
        return growth.place, *self.choices[growth.place].grow(growth)

    def add_all(self, growths: Sequence[Growth]) -> list[tuple[str, list[ShownToken]]]:
        """The text of each choice, and its tokens, after all `growths`."""
        found: list[tuple[list[str], list[ShownToken]]] = [([], []) for _ in self.choices]
        for place, text, tokens in map(self.add, growths):
            found[place][0].append(text)
            found[place][1].extend(tokens)
        return [("".join(texts), tokens) for texts, tokens in found]

    @property
    def chosen(self) -> list[int]:
        """The places of those that are given back: of each prompt the likeliest, by the mean of its tokens."""
        order, found = self._order, []
        for first in range(0, len(self.choices), order.best_of):
            places = range(first, first + order.best_of)
            found += places if order.best_of == order.n else sorted(places, key=self._unlikely)[: order.n]
        return found

    def _unlikely(self, place: int) -> float:
        return -self.choices[place].logprob / max(1, self.choices[place].new_tokens)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and made."""
        prompt, new = self._order.prompt_tokens, sum(choice.new_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a prompt that came as token ids, with its special tokens."""
    return b"".join(Name.of(tokenizer, token).bytes for token in ids).decode(errors="replace")

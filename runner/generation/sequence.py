"""A sequence: a prompt, what was asked for it, and the tokens that it has so far."""

from __future__ import annotations

import collections.abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from runner.errors import BloomdeskError
from runner.generation.grammar import Grammar
from runner.generation.options import GREEDY, Sampling
from runner.generation.sampling import Sampler
from runner.generation.scoring import TokenScore, score
from runner.generation.stops import StopScanner
from runner.model.kv_cache import KVCache, Segment

Ids = collections.abc.Sequence[int]


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token id, the largest number of new tokens, and how these are chosen.

    It is choice number `choice` for the prompt number `number`. `token_bytes` gives what a token stands for, if
    `sampling` has stop texts; `grammar` is that of its constraint. With `scores_prompt` the prompt's tokens have
    log-probabilities too, as many beside each as `sampling` says; then there may be no new token at all. One that
    `gives_way` leaves its place in a batch that stays to those that don't, and goes on later.
    """

    prompt_ids: Ids
    max_new_tokens: int
    sampling: Sampling = GREEDY
    number: int = 0
    choice: int = 0
    token_bytes: Callable[[int], bytes] | None = None
    grammar: Grammar | None = None
    scores_prompt: bool = False
    gives_way: bool = False

    @property
    def capacity(self) -> int:
        """Positions of the cache; the last token is never fed back, so it needs none."""
        return max(1, len(self.prompt_ids) + self.max_new_tokens - 1)


@dataclass(frozen=True)
class Restored:
    """What an earlier run came to: new tokens, and the log-probabilities of the first of these and of the prompt's."""

    ids: Ids = ()
    scores: collections.abc.Sequence[TokenScore] = ()
    prompt_scores: collections.abc.Sequence[TokenScore] = ()


@dataclass(eq=False)
class Sequence:
    """A prompt's new tokens, and what they took.

    `stop_reason` is "eos" if the last of `ids` is one of `eos`, "stop" if it completes a stop text, "grammar" if
    nothing may follow by the grammar, "length" if `max_new_tokens` was reached, and None while more may come; it is
    "failed" if the model's numbers give no token, and `failure` says where they end to be numbers.
    `is_valid` is whether a text that ended is one of its grammar. `passes` counts those that carried rows of it;
    `bytes_read`, `seconds` and `drafting_seconds` are its even share of them. `token_seconds` are how long each of this
    run's tokens came after the one before; those of one pass come together. `proposed` counts the draft tokens that
    passes carried, `accepted` those that were right.
    """

    index: int
    request: Request
    eos: frozenset[int] = frozenset()
    ids: list[int] = field(default_factory=list)
    # Of `ids`, if the request asks for log-probabilities; those of forced tokens come with a later pass.
    scores: list[TokenScore] = field(default_factory=list)
    # Of the prompt's tokens but the first, if the request asks for them.
    prompt_scores: list[TokenScore] = field(default_factory=list)
    stop_reason: str | None = None
    is_valid: bool | None = None
    passes: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    proposed: int = 0
    accepted: int = 0
    drafting_seconds: float = 0.0
    token_seconds: list[float] = field(default_factory=list)
    # Whether draft tokens made numbers overflow; then it gets no more of them.
    is_unsound: bool = False
    failure: BloomdeskError | None = None
    cache: KVCache | None = None
    # Of the last pass: its first position, its draft tokens, and their place among the new tokens.
    _pass_begin: int = 0
    # Number of tokens of an earlier run, and seconds of passes since the last token.
    _restored: int = 0
    _waited: float = 0.0
    _draft_tokens: Ids = ()
    _draft_place: int = 0

    def __post_init__(self) -> None:
        request = self.request
        sampling = request.sampling
        self.sampler = Sampler(
            sampling, request.prompt_ids, self.eos, request.number, request.choice, request.grammar
        )
        self.scanner = StopScanner([stop.encode() for stop in sampling.stop])
        if not request.max_new_tokens:
            self.stop_reason = "length"

    @property
    def prompt_ids(self) -> Ids:
        return self.request.prompt_ids

    @property
    def text(self) -> list[int]:
        """The ids of the prompt and of all tokens that follow."""
        return [*self.prompt_ids, *self.ids]

    @property
    def remaining(self) -> int:
        """Number of tokens that may still come."""
        return self.request.max_new_tokens - len(self.ids)

    @property
    def is_done(self) -> bool:
        """Whether it needs no pass any more."""
        is_whole = self._known == len(self.ids) and not self._unscored
        return self.failure is not None or (self.stop_reason is not None and is_whole)

    @property
    def committed(self) -> int:
        """Number of positions of the cache that no later token changes, and whose logits are not needed any more."""
        return len(self.prompt_ids) - self._unscored + self._known - 1

    @property
    def is_begun(self) -> bool:
        """Whether the prompt is in the cache."""
        return self.cache.length >= len(self.prompt_ids)

    @property
    def unread(self) -> int:
        """Number of rows that the next token needs: the rest of the prompt, forced tokens, the last token.

        Without those of the cache's prefixes.
        """
        return len(self.prompt_ids) + len(self.ids) - (self.stop_reason is not None) - self.cache.length

    @property
    def unread_prefixes(self) -> list[KVCache]:
        """The prefixes of its cache that are not full yet, the first positions first."""
        return [cache for cache in self.cache.chain[:-1] if not cache.is_full]

    def prefix_segment(self, prefix: KVCache, rows: int) -> Segment:
        """The next unread rows of a prefix of its cache, up to `rows`."""
        done = prefix.length
        return Segment(self.prompt_ids[done : min(done + rows, prefix.capacity)], prefix, 0)

    @property
    def _known(self) -> int:
        """Number of new tokens for which no logits are needed."""
        return len(self.ids if self.request.sampling.logprobs is None else self.scores)

    @property
    def _unscored(self) -> int:
        """Number of the prompt's tokens whose log-probability is still to come."""
        return len(self.prompt_ids) - 1 - len(self.prompt_scores) if self.request.scores_prompt else 0

    def count_pass(self, seconds: float, nbytes: int, shared_by: int) -> None:
        """Count a pass: `shared_by` sequences share its `seconds`, and the `nbytes` that it read."""
        self.passes += 1
        self.seconds += seconds / shared_by
        self.bytes_read += nbytes // shared_by
        self._waited += seconds
        if new := len(self.ids) - self._restored - len(self.token_seconds):
            self.token_seconds += [self._waited, *[0.0] * (new - 1)]
            self._waited = 0.0

    def resume(self) -> None:
        """Append what must follow; an interruption may have come before that, or right after a pass."""
        self._force()
        if self.cache is not None:
            self.rewind()

    def logit_rows(self, rows: int) -> int:
        """Number of rows of logits that the next `rows` unread rows give."""
        return max(0, self.cache.length + rows - self.committed)

    def segment(self, rows: int, draft_tokens: Ids) -> Segment:
        """The next `rows` unread rows, and after all of them one row for each draft token."""
        self._draft_tokens, self._draft_place = draft_tokens, len(self.ids)
        self._pass_begin = done = self.cache.length
        ids = [*self.text[done : done + rows], *draft_tokens]
        return Segment(ids, self.cache, self.logit_rows(rows) + len(draft_tokens))

    def rewind(self) -> None:
        """Remove from the cache all positions that are not committed, or hold a wrong draft token."""
        draft, begin = self._draft_tokens, self._draft_place
        right = common_length(draft, self.ids[begin:]) if draft else 0
        sound = len(self.prompt_ids) + begin + right if draft else self.cache.length
        self.cache.rewind(min(self.cache.length, sound, self.committed))

    def verify(self, logits: torch.Tensor) -> int:
        """The number of draft tokens that were right, once the tokens that `logits` [n, V] give are appended.

        The token after a row counts if all draft tokens before it were right; so the one after the unread rows is
        certain. Rows before forced tokens only give these their log-probabilities.
        """
        if not len(logits):
            return 0
        draft, begin = self._draft_tokens, self._draft_place
        self.proposed += len(draft)
        if draft and not math.isfinite(float(logits[0].float().max())):
            # 0 times infinity is not a number, so a draft token's row that overflows spoils the rows before it. This
            # pass gives nothing then, and the next ones of this sequence carry no draft tokens.
            self.is_unsound = True
            self.cache.rewind(self._pass_begin)
            return 0
        count = min(self._unscored, len(logits))
        if not self._score_prompt(logits[:count]):
            return 0
        logits, right = logits[count:], 0
        # The place, among the new tokens, of the token that each row gives.
        for place, row in enumerate(logits, self._known):
            if place == len(self.ids):
                if not math.isfinite(float(row.max())):
                    self._fail(is_alone=not draft)
                    break
                self._append(self.sampler.choose(row, self.ids))
                self._force()
            if self.request.sampling.logprobs is not None:
                self.scores.append(score(row, self.ids[place], self.request.sampling.logprobs))
            if self.stop_reason and place + 1 == len(self.ids):
                break
            if place >= begin:
                if right == len(draft) or draft[right] != self.ids[place]:
                    break
                right += 1
        self.accepted += right
        self.rewind()
        return right

    def _score_prompt(self, logits: torch.Tensor) -> bool:
        """Whether `logits` [n, V], of the prompt's next rows, give the tokens after them their log-probabilities."""
        for row in logits:
            if not math.isfinite(float(row.max())):
                self.fail(no_numbers(self.cache))
                return False
            token = self.prompt_ids[len(self.prompt_scores) + 1]
            self.prompt_scores.append(score(row, token, self.request.sampling.logprobs or 0))
        return True

    def fail(self, failure: BloomdeskError) -> None:
        """End the text for want of a token that could follow."""
        self.stop_reason, self.failure = "failed", failure
        self.sampler.release()

    def _fail(self, *, is_alone: bool) -> None:
        """End the text for want of numbers, unless the pass had draft tokens, whose overflow may be why."""
        self.is_unsound = True
        if is_alone:
            self.fail(no_numbers(self.cache))

    def restore(self, earlier: Restored) -> None:
        """Append the tokens of an earlier run, as far as this request goes."""
        self.prompt_scores = list(earlier.prompt_scores)
        self._force()
        while len(self.ids) < len(earlier.ids) and not self.stop_reason:
            self._append(earlier.ids[len(self.ids)])
            self._force()
        self.scores = list(earlier.scores[: len(self.ids)])
        self._restored = len(self.ids)

    def _force(self) -> None:
        """Append the tokens that must follow, and end the text if nothing may follow."""
        grammar = self.request.grammar
        if grammar is None or self.is_valid is not None:
            return
        for token in self.sampler.forced(self.ids) if self.stop_reason is None else ():
            self._append(token)
            if self.stop_reason:
                break
        if self.stop_reason in (None, "length") and self.sampler.is_over(self.ids):
            self.stop_reason = "grammar"
        if self.stop_reason == "stop":
            self.is_valid = grammar.accepts(bytes(self.scanner.text[: self.scanner.end]))
        elif self.stop_reason:
            text = self.ids[:-1] if self.stop_reason == "eos" else self.ids
            self.is_valid = self.sampler.is_complete(text)
        if self.stop_reason:
            self.sampler.release()

    def _append(self, token: int) -> None:
        self.ids.append(token)
        sampling, token_bytes = self.request.sampling, self.request.token_bytes
        if sampling.stop and token_bytes:
            self.scanner.push(token_bytes(token))
        if token in self.eos and not sampling.ignore_eos:
            self.stop_reason = "eos"
        elif self.scanner.end is not None:
            self.stop_reason = "stop"
        elif not self.remaining:
            self.stop_reason = "length"


def no_numbers(cache: KVCache) -> BloomdeskError:
    """The error for logits that are not finite, after the pass that filled `cache`."""
    count, first = len(cache.blocks), cache.first_unsound_block()
    where = "after the last block"
    if first is not None:
        where = (
            f"from block {first - 1} or {first} of {count} on"
            if first
            else "from the embedding or block 0 on"
        )
    return BloomdeskError(
        f"the model's numbers are not finite (NaN or infinity) {where}, so they give no token",
        "see whether a file is damaged: bloomdesk verify; if all are sound, the checkpoint itself has such weights",
    )


def common_length(one: Ids, other: Ids) -> int:
    """Number of equal ids at the beginning of both."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )

"""A sequence: a prompt, what was asked for it, and the tokens that it has so far."""

from __future__ import annotations

import collections.abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

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
    `sampling` has stop texts.
    """

    prompt_ids: Ids
    max_new_tokens: int
    sampling: Sampling = GREEDY
    number: int = 0
    choice: int = 0
    token_bytes: Callable[[int], bytes] | None = None

    @property
    def capacity(self) -> int:
        """Positions of the cache; the last token is never fed back, so it needs none."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


@dataclass(eq=False)
class Sequence:
    """A prompt's new tokens, and what they took.

    `stop_reason` is "eos" if the last of `ids` is one of `eos`, "stop" if it completes a stop text, "length" if
    `max_new_tokens` was reached, and None while more may come. `passes` counts those that carried rows of it;
    `bytes_read`, `seconds` and `drafting_seconds` are its even share of them. `proposed` counts the draft tokens that
    passes carried, `accepted` those that were right.
    """

    index: int
    request: Request
    eos: frozenset[int] = frozenset()
    ids: list[int] = field(default_factory=list)
    # Of `ids`, if the request asks for log-probabilities.
    scores: list[TokenScore] = field(default_factory=list)
    stop_reason: str | None = None
    passes: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    proposed: int = 0
    accepted: int = 0
    drafting_seconds: float = 0.0
    # Whether draft tokens made numbers overflow; then it gets no more of them.
    is_unsound: bool = False
    cache: KVCache | None = None

    def __post_init__(self) -> None:
        request = self.request
        sampling = request.sampling
        self.sampler = Sampler(sampling, request.prompt_ids, self.eos, request.number, request.choice)
        self.scanner = StopScanner([stop.encode() for stop in sampling.stop])

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
    def committed(self) -> int:
        """Number of positions of the cache that no later token changes, once the prompt is through."""
        return len(self.prompt_ids) + len(self.ids) - 1

    def prompt_segment(self, most: int) -> Segment:
        """The next rows of the prompt, up to `most`."""
        done = self.cache.length
        ids = self.prompt_ids[done : done + most]
        return Segment(ids, self.cache, 1 if done + len(ids) == len(self.prompt_ids) else 0)

    def segment(self, draft_tokens: Ids) -> Segment:
        """The row of the last token, and one row for each draft token."""
        return Segment([self.ids[-1], *draft_tokens], self.cache, 1 + len(draft_tokens))

    def rewind(self) -> None:
        """Remove from the cache all positions that are not committed."""
        self.cache.rewind(min(self.cache.length, self.committed))

    def verify(self, logits: torch.Tensor, draft_tokens: Ids) -> int:
        """The number of draft tokens that were right, once the tokens that `logits` [n, V] give are appended.

        The token after row n counts if all draft tokens before it were right; so the first is certain.
        """
        if not len(logits):
            return 0
        self.proposed += len(draft_tokens)
        accepted = 0
        if draft_tokens and not math.isfinite(float(logits[0].float().max())):
            # 0 times infinity is not a number, so a draft token's row that overflows spoils the rows before it. This
            # pass gives nothing then, and the next ones of this sequence carry no draft tokens.
            self.is_unsound = True
            logits = logits[:0]
        for accepted, row in enumerate(logits):
            token = self.sampler.choose(row, self.ids)
            if self.request.sampling.logprobs is not None:
                self.scores.append(score(row, token, self.request.sampling.logprobs))
            self._append(token)
            if self.stop_reason or accepted == len(draft_tokens) or draft_tokens[accepted] != token:
                break
        self.accepted += accepted
        self.rewind()
        return accepted

    def restore(self, ids: Ids, scores: collections.abc.Sequence[TokenScore]) -> None:
        """Append the tokens of an earlier run, as far as this request goes."""
        for place, token in enumerate(ids):
            if self.stop_reason:
                return
            self._append(token)
            self.scores += scores[place : place + 1]

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

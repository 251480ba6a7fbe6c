"""Sampling: which token follows, from a row of logits, the tokens before it and noise that depends on its place alone.

    logits ──> bias ──> repetition, presence, frequency ──> no end yet ──> grammar
           ──> temperature ──> top k ──> top p ──> min p
           ──> + Gumbel noise of (seed, sequence, choice, position, token) ──> the largest

The processors have the meaning and the order of transformers' LogitsProcessors; presence and frequency, which those
lack, are OpenAI's. Nothing depends on the batch, on draft tokens or on the processor, so the text does not either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from copy import copy

import torch

from runner.generation.grammar import Grammar
from runner.generation.noise import exp, gumbel
from runner.generation.options import Sampling
from runner.kernel.threads import one_thread


class Sampler:
    """Chooses the tokens of one sequence: choice number `choice` for the prompt number `number`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        eos: Collection[int],
        number: int = 0,
        choice: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        """`sampling` must have a seed if it draws; `eos` are the ids that end a text."""
        self._sampling, self._eos = sampling, list(eos)
        self._number, self._choice = number, choice
        self._prompt_ids = set(prompt_ids)
        self._matcher = grammar.matcher() if grammar else None

    def fork(self) -> Sampler:
        """A sampler that chooses as this one does, for texts of its own."""
        found = copy(self)
        found._matcher = self._matcher and self._matcher.fork()
        return found

    @one_thread()
    def choose(self, row: torch.Tensor, ids: Sequence[int]) -> int:
        """The token id that follows the new tokens `ids`, by a row of logits [V]."""
        options = self._sampling
        # In float32, as the reference does it: the lowest id wins a tie.
        if options.is_plain and not self._matcher:
            return int(row.float().argmax())
        scores = self.processed(row, ids)
        allowed = self._matcher.allowed(ids) if self._matcher else None
        if allowed is not None:
            scores = scores[allowed]
        if not options.draws:
            best = scores.argmax()
            return int(best if allowed is None else allowed[best])
        scores, candidates = warped(_divided(scores, options.temperature), options, allowed)
        noise = gumbel(options.seed or 0, self._number, self._choice, len(ids), candidates)
        return int(candidates[(scores.double() + noise).argmax()])

    def release(self) -> None:
        """Free what is kept for the grammar; nothing is chosen any more."""
        self._matcher = None

    def forced(self, ids: Sequence[int]) -> list[int]:
        """The tokens that must follow the new tokens `ids`, whatever the logits are."""
        return self._matcher.forced(ids) if self._matcher else []

    def is_over(self, ids: Sequence[int]) -> bool:
        """Whether no token may follow."""
        return self._matcher is not None and self._matcher.is_over(ids)

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether the text may end here."""
        return self._matcher is None or self._matcher.is_accepting(ids)

    def possible(self, ids: Sequence[int], tokens: Sequence[int]) -> int:
        """The number of the first of `tokens` that may follow one after the other."""
        return self._matcher.possible(ids, tokens) if self._matcher else len(tokens)

    def processed(self, row: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
        """The logits, float32 [V], with biases and penalties."""
        options = self._sampling
        scores = row.to(torch.float32, copy=True)
        if options.logit_bias:
            scores[list(options.logit_bias)] += torch.tensor(list(options.logit_bias.values()))
        if options.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt_ids.union(ids)))
            found = scores[seen]
            penalty = options.repetition_penalty
            scores[seen] = torch.where(found < 0, found * penalty, found / penalty)
        if ids and (options.presence_penalty or options.frequency_penalty):
            counts = Counter(ids)
            times = torch.tensor(list(counts.values()), dtype=torch.float32)
            scores[list(counts)] -= options.frequency_penalty * times + options.presence_penalty
        if len(ids) < options.min_new_tokens:
            scores[self._eos] = -math.inf
        return scores


def _divided(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """The scores / temperature; if that is more than float32 holds, their distances from the best are divided."""
    best, numbers = float(scores.max()), torch.finfo(torch.float32)
    if temperature < numbers.tiny or abs(best) > temperature * numbers.max:
        return ((scores.double() - best) / temperature).float()
    return scores / temperature


def warped(
    scores: torch.Tensor, options: Sampling, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores [n] that top k, top p and min p leave of those of `ids`, by default all tokens, and their ids [n]."""
    ids = torch.arange(len(scores)) if ids is None else ids
    if 0 < options.top_k < len(scores):
        kept = scores >= torch.topk(scores, options.top_k).values[-1]
        ids, scores = ids[kept], scores[kept]
    if options.top_p < 1:
        order = torch.sort(scores, stable=True).indices
        probabilities = exp((scores[order] - scores.max()).double())
        cumulative = probabilities.cumsum(0)
        kept = cumulative > (1 - options.top_p) * cumulative[-1]
        kept[-1] = True
        kept = order[kept].sort().values
        ids, scores = ids[kept], scores[kept]
    if options.min_p:
        kept = exp((scores - scores.max()).double()) >= options.min_p
        ids, scores = ids[kept], scores[kept]
    return scores, ids

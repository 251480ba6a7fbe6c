"""Sampling: which token follows, from a row of logits, the tokens before it and noise that depends on its place alone.

    logits ──> bias ──> repetition, presence, frequency ──> no end yet ──> temperature ──> top k ──> top p ──> min p
           ──> + Gumbel noise of (seed, sequence, choice, position, token) ──> the largest

The processors have the meaning and the order of transformers' LogitsProcessors; presence and frequency, which those
lack, are OpenAI's. Nothing depends on the batch, on draft tokens or on the processor, so the text does not either.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from runner.generation.noise import exp, gumbel
from runner.generation.options import Sampling


class Sampler:
    """Chooses the tokens of one sequence: choice number `choice` for the prompt number `number`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        eos: Collection[int],
        number: int = 0,
        choice: int = 0,
    ) -> None:
        """`sampling` must have a seed if it draws; `eos` are the ids that end a text."""
        self._sampling, self._eos = sampling, list(eos)
        self._number, self._choice = number, choice
        self._prompt_ids = set(prompt_ids)

    def choose(self, row: torch.Tensor, ids: Sequence[int]) -> int:
        """The token id that follows the new tokens `ids`, by a row of logits [V]."""
        options = self._sampling
        # In float32, as the reference does it: the lowest id wins a tie.
        if options.is_plain:
            return int(row.float().argmax())
        scores = self.processed(row, ids)
        if not options.draws:
            return int(scores.argmax())
        scores, candidates = warped(scores / options.temperature, options)
        noise = gumbel(options.seed or 0, self._number, self._choice, len(ids), candidates)
        return int(candidates[(scores.double() + noise).argmax()])

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


def warped(scores: torch.Tensor, options: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores [n] that top k, top p and min p leave of `scores` [V], and their token ids [n]."""
    ids = torch.arange(len(scores))
    if 0 < options.top_k < len(scores):
        least = torch.topk(scores, options.top_k).values[-1]
        ids = ids[scores >= least]
        scores = scores[ids]
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

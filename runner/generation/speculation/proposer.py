"""The proposer: the draft tokens of each sequence of a batch, from its n-grams or from the draft model."""

from __future__ import annotations

import collections.abc
import time
from dataclasses import dataclass

from runner.generation.options import LOOKUP, OFF
from runner.generation.sequence import Ids, Sequence
from runner.generation.speculation.cost import CostModel
from runner.generation.speculation.draft_model import DraftModel
from runner.generation.speculation.ngram import NgramIndex
from runner.generation.speculation.policy import MOST_DRAFT_TOKENS, Offer, SpeculationPolicy


@dataclass(frozen=True)
class DraftTokens:
    """Draft tokens for one sequence, and the offer that they were chosen from; none if `offer` is None."""

    tokens: Ids = ()
    offer: Offer | None = None


class Proposer:
    """Proposes draft tokens, and learns from what was accepted. `cost` is that of the batch's passes."""

    def __init__(self, *, uses_ngrams: bool, draft: DraftModel | None) -> None:
        self.draft = draft
        self.cost = CostModel()
        self._uses_ngrams = uses_ngrams
        self._policy = SpeculationPolicy(self.cost, draft.cost if draft else None)
        self._ngrams: dict[Sequence, NgramIndex] = {}
        # Of computing, for the draft tokens of the next pass; they count against the loss limit.
        self._drafting_seconds = 0.0

    @property
    def words(self) -> str:
        """What proposes now: "lookup", "draft", "lookup and draft" or "off"."""
        names = [LOOKUP] * self._uses_ngrams + ["draft"] * (self.draft is not None)
        return " and ".join(names) or OFF

    def most_tokens(self, max_new_tokens: int) -> int:
        """The largest number of draft tokens for one sequence in a pass."""
        return min(MOST_DRAFT_TOKENS, max_new_tokens - 1) if self._uses_ngrams or self.draft else 0

    def release(self, sequence: Sequence) -> None:
        """Free what is kept for a sequence that is done."""
        self._ngrams.pop(sequence, None)
        if self.draft:
            self.draft.release(sequence)

    def propose(
        self, sequences: collections.abc.Sequence[Sequence], other_rows: int, most: int
    ) -> dict[Sequence, DraftTokens]:
        """Up to `most` draft tokens together, for a pass with a row of each sequence and `other_rows` besides."""
        self._drafting_seconds = 0.0
        found = {sequence: DraftTokens() for sequence in sequences}
        offers = [self._offer(sequence) for sequence in sequences]
        if not any(offers):
            return found
        drafted = []
        counts = self._policy.choose(offers, other_rows, most)
        for sequence, offer, count in zip(sequences, offers, counts, strict=True):
            if count and offer.drafted:
                drafted.append((sequence, offer, count))
            elif count:
                found[sequence] = DraftTokens(self._ngrams[sequence].propose(count), offer)
        if drafted:
            began, counted = time.perf_counter(), self.draft.seconds
            proposed = self.draft.propose([(sequence, count) for sequence, _, count in drafted])
            self._drafting_seconds = self.draft.seconds - counted
            seconds = time.perf_counter() - began
            for (sequence, offer, _), tokens in zip(drafted, proposed, strict=True):
                sequence.drafting_seconds += seconds / len(drafted)
                found[sequence] = DraftTokens(tokens, offer)
        return found

    def _offer(self, sequence: Sequence) -> Offer | None:
        """The offer of n-grams or of the draft model, whichever has the higher acceptance rate."""
        most = min(MOST_DRAFT_TOKENS, sequence.remaining - 1)
        if sequence.is_unsound or most < 1:
            return None
        offers = []
        if self._uses_ngrams:
            ngrams = self._ngrams.setdefault(sequence, NgramIndex())
            ngrams.extend(sequence.text[len(ngrams.ids) :])
            if ngrams.place is not None:
                offers.append(Offer(self._policy.ngram(ngrams.match_length), most))
        if self.draft:
            offers.append(Offer(self._policy.draft, most, drafted=True))
        return max(offers, key=lambda offer: offer.acceptance.rate, default=None)

    def learn(self, drafts: collections.abc.Sequence[tuple[DraftTokens, int]], other_rows: int) -> None:
        """Account for a pass; each draft comes with the number of its tokens that were right."""
        for draft, accepted in drafts:
            if draft.tokens:
                draft.offer.acceptance.learn(len(draft.tokens), accepted)
        proposed = sum(len(draft.tokens) for draft, _ in drafts)
        accepted = sum(accepted for _, accepted in drafts)
        self._policy.settle(len(drafts), other_rows, proposed, accepted, self._drafting_seconds)

    def retire_draft(self, sequences: int, streamed_bytes: int) -> bool:
        """Whether the draft model was given up now, because it is useless for a batch of `sequences`."""
        if not self.draft or not sequences:
            return False
        freed = min(1.0, self.draft.weight_bytes / streamed_bytes) if streamed_bytes else 0.0
        if not self._policy.draft_is_useless(sequences, freed):
            return False
        self.draft.close()
        self.draft = None
        return True

"""The proposer: the draft tokens of each sequence of a batch, from its n-grams or from the draft model."""

from __future__ import annotations

import time
from collections.abc import Mapping

from runner.generation.options import LOOKUP, OFF
from runner.generation.sequence import Sequence
from runner.generation.speculation.cost import CostModel
from runner.generation.speculation.draft_model import DraftModel
from runner.generation.speculation.ngram import NgramIndex
from runner.generation.speculation.policy import MOST_DRAFT_TOKENS, Offer, SpeculationPolicy


class Proposer:
    """Proposes draft tokens, and learns from what was accepted. `cost` is that of the batch's passes."""

    def __init__(self, *, uses_ngrams: bool, draft: DraftModel | None) -> None:
        self.draft = draft
        self.cost = CostModel()
        self._uses_ngrams = uses_ngrams
        self._draft_cost = draft.cost if draft else CostModel()
        self._policy = SpeculationPolicy(self.cost, self._draft_cost)
        self._ngrams: dict[Sequence, NgramIndex] = {}
        # The offer and the number of draft tokens of each sequence, and the computing that they took.
        self._carried: dict[Sequence, tuple[Offer | None, int]] = {}
        self._drafting_seconds = 0.0

    @property
    def words(self) -> str:
        """What proposes now: "lookup", "draft", "lookup and draft" or "off"."""
        names = [LOOKUP] * self._uses_ngrams + ["draft"] * (self.draft is not None)
        return " and ".join(names) or OFF

    def most_tokens(self, max_new_tokens: int) -> int:
        """The largest number of draft tokens for one sequence in a pass."""
        is_proposing = self._uses_ngrams or self.draft
        return min(MOST_DRAFT_TOKENS, max(0, max_new_tokens - 1)) if is_proposing else 0

    def release(self, sequence: Sequence) -> None:
        """Free what is kept for a sequence that is done."""
        self._ngrams.pop(sequence, None)
        if self.draft:
            self.draft.release(sequence)

    def propose(self, sequences: list[Sequence], other_rows: int, most: int) -> dict[Sequence, list[int]]:
        """Up to `most` draft tokens together, for a pass with a row of each sequence and `other_rows` besides."""
        offers = [self._offer(sequence) for sequence in sequences]
        counts = self._policy.choose(offers, other_rows, most) if any(offers) else [0] * len(offers)
        chosen = list(zip(sequences, offers, counts, strict=True))
        drafted = [(sequence, count) for sequence, offer, count in chosen if count and offer.drafted]
        found = {
            sequence: self._ngrams[sequence].propose(count) if count and not offer.drafted else []
            for sequence, offer, count in chosen
        }
        began, spent = time.perf_counter(), self._draft_cost.spent_seconds
        if drafted:
            for (sequence, _), tokens in zip(drafted, self.draft.propose(drafted), strict=True):
                found[sequence] = tokens
                sequence.drafting_seconds += (time.perf_counter() - began) / len(drafted)
        self._drafting_seconds = self._draft_cost.spent_seconds - spent
        for sequence, tokens in found.items():
            del tokens[sequence.sampler.possible(sequence.ids, tokens) :]
        self._carried = {sequence: (offer, len(found[sequence])) for sequence, offer, _ in chosen}
        return found

    def _offer(self, sequence: Sequence) -> Offer | None:
        """The offer of n-grams or of the draft model, whichever has the higher acceptance rate."""
        most = min(MOST_DRAFT_TOKENS, sequence.remaining - 1)
        if sequence.is_unsound or sequence.stop_reason or most < 1:
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

    def learn(self, accepted: Mapping[Sequence, int], other_rows: int) -> None:
        """Account for the pass that carried the last draft tokens, by how many of each sequence were right."""
        for sequence, (offer, proposed) in self._carried.items():
            if proposed:
                offer.acceptance.learn(proposed, accepted[sequence])
        total = sum(proposed for _, proposed in self._carried.values())
        right = sum(accepted[sequence] for sequence in self._carried)
        self._policy.settle(len(self._carried), other_rows, total, right, self._drafting_seconds)

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

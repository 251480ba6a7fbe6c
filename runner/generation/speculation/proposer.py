"""What goes on trial for each sequence of a batch: whether lookup or the draft proposes it, and how much of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.generation.sequence import Continuation
from runner.generation.speculation.cost import Pace
from runner.generation.speculation.draft_model import Draft
from runner.generation.speculation.ngram import Lookup
from runner.generation.speculation.policy import MOST_PROPOSED, Offer, Speculation


@dataclass(frozen=True)
class Trial:
    """Tokens proposed for one sequence, and of which kind they are; none where `offer` is None."""

    tokens: Sequence[int] = ()
    offer: Offer | None = None


class Proposals:
    """Proposes for the sequences of a batch, and learns from what became of it."""

    def __init__(self, pace: Pace, *, looks_up: bool, draft: Draft | None) -> None:
        self.looks_up = looks_up
        self.draft = draft
        self.proposed = self.accepted = 0
        self.drafting_seconds = 0.0
        self._pace = pace
        self._speculation = Speculation(draft.pace if draft else None)
        self._drafting = 0.0  # seconds for the pass at hand, which count against its proposals

    def join(self, sequence: Continuation) -> None:
        """Read the prompt of a sequence that has come into the batch."""
        if self.looks_up:
            sequence.lookup = Lookup(sequence.prompt_ids)

    def leave(self, sequence: Continuation) -> None:
        """Forget one that is done."""
        sequence.lookup = None
        if self.draft:
            self.draft.release(sequence)

    def make(
        self, sequences: Sequence[Continuation], other_rows: int, most: int
    ) -> dict[Continuation, Trial]:
        """Trials of up to `most` tokens together, for a pass with a row of each sequence and `other_rows` besides."""
        self._drafting = 0.0
        trials = {sequence: Trial() for sequence in sequences}
        offers = [self._offer(sequence) for sequence in sequences]
        if not any(offers):
            return trials
        counts = self._speculation.choose(offers, other_rows, most, self._pace)
        drafted = []
        for sequence, offer, count in zip(sequences, offers, counts, strict=True):
            if count and offer.drafted:
                drafted.append((sequence, offer, count))
            elif count:
                trials[sequence] = Trial(sequence.lookup.propose(count), offer)
        if drafted:
            began, counted = time.perf_counter(), self.draft.seconds
            found = self.draft.propose([(sequence, count) for sequence, _, count in drafted])
            self._drafting = self.draft.seconds - counted
            seconds = time.perf_counter() - began
            self.drafting_seconds += seconds
            for (sequence, offer, _), tokens in zip(drafted, found, strict=True):
                sequence.drafting_seconds += seconds / len(drafted)
                trials[sequence] = Trial(tokens, offer)
        return trials

    def _offer(self, sequence: Continuation) -> Offer | None:
        """The proposer for a sequence: of lookup and draft the one that was right more often, where both could be."""
        most = min(MOST_PROPOSED, sequence.remaining - 1)
        if sequence.is_unsound or most < 1:
            return None
        drafted = Offer(self._speculation.draft, most, drafted=True) if self.draft else None
        if not sequence.lookup or sequence.lookup.place is None:
            return drafted
        looked_up = Offer(self._speculation.lookup(sequence.lookup.match_length), most)
        if drafted and drafted.acceptance.chance > looked_up.acceptance.chance:
            return drafted
        return looked_up

    def learn(self, trials: Iterable[tuple[Trial, int]], other_rows: int) -> None:
        """Of each trial that `make` gave, so many tokens were right."""
        trials = list(trials)
        for trial, accepted in trials:
            if trial.tokens:
                trial.offer.acceptance.learn(len(trial.tokens), accepted)
        proposed = sum(len(trial.tokens) for trial, _ in trials)
        accepted = sum(accepted for _, accepted in trials)
        self.proposed += proposed
        self.accepted += accepted
        self._speculation.settle(len(trials), other_rows, proposed, accepted, self._drafting, self._pace)

    def retire_draft(self, sequences: int, streamed_bytes: int) -> bool:
        """Give up a draft that has proven useless for a batch of so many sequences; whether that was done now."""
        if not self.draft or not sequences:
            return False
        freed = min(1.0, self.draft.weight_bytes / streamed_bytes) if streamed_bytes else 0.0
        if not self._speculation.draft_is_useless(sequences, self._pace, freed):
            return False
        self.draft.close()
        self.draft = None
        return True

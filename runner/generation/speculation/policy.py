"""How many tokens a pass carries on trial: as many as are expected to give the most tokens a second.

What a pass gives is right whatever is proposed, so nothing here can change a token, only the time that it takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from runner.generation.speculation.acceptance import Acceptance
from runner.generation.speculation.cost import Pace

MOST_PROPOSED = 16  # for one sequence in one pass
# First guesses by the length of the match that lookup found, at least so many tokens, and for a draft.
LOOKUP_GUESSES = {9: 0.8, 5: 0.6, 3: 0.45, 2: 0.3, 1: 0.15, 0: 0.15}
DRAFT_GUESS = 0.6
# What proposals may lose against passes without: in the beginning this part of a pass, later this part of the time
# and what they have gained before, up to so many passes.
FIRST_CREDIT, CREDIT_SHARE, MOST_CREDIT = 0.5, 0.02, 32.0
TRIALS_OF_A_DRAFT = 16  # before it may be given up


@dataclass(frozen=True)
class Offer:
    """Up to `most` tokens that could be proposed for a sequence, and how often such were right."""

    acceptance: Acceptance
    most: int
    drafted: bool = False  # by a model, which takes time


class Speculation:
    """What the passes so far say of proposals, and how many to make.

    A proposal is made where it is expected to pay, and where its loss, should all of it be wrong, is covered by a
    credit of seconds. So passes with proposals never take much longer than passes without would have.
    """

    def __init__(self, draft_pace: Pace | None = None) -> None:
        """`draft_pace` is that of the draft's passes, None where there is no draft."""
        self._lookup = {length: Acceptance(guess) for length, guess in LOOKUP_GUESSES.items()}
        self.draft = Acceptance(DRAFT_GUESS)
        self._draft_pace = draft_pace or Pace()
        self._credit = 0.0  # seconds
        self._has_begun = False

    def lookup(self, match_length: int) -> Acceptance:
        """That of proposals after a match of so many tokens."""
        return next(found for length, found in self._lookup.items() if match_length >= length)

    def choose(self, offers: Sequence[Offer | None], other_rows: int, most: int, pace: Pace) -> list[int]:
        """How many tokens of each sequence's offer go into a pass, together up to `most`.

        The pass has a row for each sequence, and `other_rows` besides.
        """
        choice = _Choice(offers, other_rows, pace, self._draft_pace)
        if not self._has_begun:  # and of a pass nothing is known for certain but what the disk takes
            self._credit = FIRST_CREDIT * pace.disk_seconds
        best, best_rate = list(choice.counts), choice.rate
        open_offers = [
            (-offer.acceptance.chance, index) for index, offer in enumerate(offers) if offer and offer.most
        ]
        heapq.heapify(open_offers)
        while open_offers and choice.proposed < most:
            _, index = heapq.heappop(open_offers)
            if not self._covers(choice.cost_with(index)):
                continue
            choice.add(index)
            if choice.rate > best_rate:
                best, best_rate = list(choice.counts), choice.rate
            if choice.counts[index] < offers[index].most:
                chance = offers[index].acceptance.chance ** (choice.counts[index] + 1)
                heapq.heappush(open_offers, (-chance, index))
        return self._with_trials(best, offers, other_rows, most, pace)

    def _covers(self, cost: float) -> bool:
        return cost <= max(0.0, self._credit)

    def _with_trials(
        self, counts: list[int], offers: Sequence[Offer | None], other_rows: int, most: int, pace: Pace
    ) -> list[int]:
        """One token of each kind that was not tried for long, beside those that are expected to pay."""
        choice = _Choice(offers, other_rows, pace, self._draft_pace, counts)
        tried = {offer.acceptance for offer, count in zip(offers, counts, strict=True) if offer and count}
        passed_over = set()
        for index, offer in enumerate(offers):
            if not offer or not offer.most or offer.acceptance in tried:
                continue
            due = offer.acceptance.is_due and choice.proposed < most
            if due and self._covers(choice.cost_with(index)):
                choice.add(index)
                tried.add(offer.acceptance)
            else:
                passed_over.add(offer.acceptance)
        for acceptance in passed_over - tried:
            acceptance.pass_over()
        return choice.counts

    def settle(
        self, sequences: int, other_rows: int, proposed: int, accepted: int, drafting: float, pace: Pace
    ) -> None:
        """Account for a pass. An accepted token saves its part of a pass without proposals."""
        if not sequences:
            return
        plain, rows = pace.seconds(sequences), sequences + other_rows
        if not self._has_begun:
            self._has_begun, self._credit = True, FIRST_CREDIT * plain
        cost = pace.seconds(rows + proposed) - pace.seconds(rows) + drafting
        gain = accepted * plain / sequences
        self._credit = min(MOST_CREDIT * plain, self._credit + CREDIT_SHARE * plain + gain - cost)

    def draft_is_useless(self, sequences: int, pace: Pace, freed: float) -> bool:
        """Whether a draft is sure to be worth less than its RAM, which would spare the part `freed` of the reading."""
        if self.draft.trials < TRIALS_OF_A_DRAFT:
            return False
        offers = [Offer(self.draft, MOST_PROPOSED, drafted=True)] * sequences
        choice = _Choice(offers, 0, pace, self._draft_pace)
        plain_rate = best_rate = choice.rate
        for _ in range(MOST_PROPOSED):
            for index in range(sequences):
                choice.add(index)
            best_rate = max(best_rate, choice.rate)
        without = max(pace.disk_seconds * (1 - freed), pace.computing(sequences))
        return best_rate / plain_rate <= pace.seconds(sequences) / without


class _Choice:
    """Counts of proposals, the seconds that they take, and the tokens that they are expected to give."""

    def __init__(
        self,
        offers: Sequence[Offer | None],
        other_rows: int,
        pace: Pace,
        draft_pace: Pace,
        counts: Sequence[int] = (),
    ) -> None:
        self._offers, self._pace, self._draft_pace = offers, pace, draft_pace
        self._rows = len(offers) + other_rows
        self.counts = [0] * len(offers)
        self.proposed = 0
        self._tokens = float(len(offers))
        self._drafting = 0.0
        self._drafted = [0] * MOST_PROPOSED  # sequences of each pass of the draft
        for index, count in enumerate(counts):
            for _ in range(count):
                self.add(index)

    @property
    def rate(self) -> float:
        """Tokens a second; prompts that join the pass take their time in any case."""
        return self._tokens / (self._pace.seconds(len(self._offers)) + self._cost(self.proposed))

    def _cost(self, proposed: int) -> float:
        more = self._pace.seconds(self._rows + proposed) - self._pace.seconds(self._rows)
        return more + self._drafting

    def cost_with(self, index: int) -> float:
        """Seconds beyond those of a pass without proposals, with one more token for sequence `index`."""
        return self._cost(self.proposed + 1) + self._drafting_more(index)

    def add(self, index: int) -> None:
        """One more token for sequence `index`."""
        offer = self._offers[index]
        self._drafting += self._drafting_more(index)
        if offer.drafted:
            self._drafted[self.counts[index]] += 1
        self.counts[index] += 1
        self.proposed += 1
        self._tokens += offer.acceptance.chance ** self.counts[index]

    def _drafting_more(self, index: int) -> float:
        if not self._offers[index].drafted:
            return 0.0
        together = self._drafted[self.counts[index]]
        before = self._draft_pace.seconds(together) if together else 0.0
        return self._draft_pace.seconds(together + 1) - before

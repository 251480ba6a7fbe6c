"""The speculation policy: a pass carries the draft tokens that are expected to give the most tokens a second.

The output does not depend on draft tokens, so nothing here can change a token, only the time that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.generation.speculation.cost import CostModel

# Draft tokens of one sequence in one pass.
MOST_DRAFT_TOKENS = 16
# Prior acceptance rates: of n-grams by the least length of their match, and of a draft model.
NGRAM_PRIORS = {9: 0.8, 5: 0.6, 3: 0.45, 2: 0.3, 1: 0.15, 0: 0.15}
DRAFT_PRIOR = 0.6
# A prior weighs as much as this number of tokens, and all earlier ones lose 5% of their weight with each new trial.
PRIOR_WEIGHT = 2.0
MEMORY = 0.95
# Passes without a trial, after which one is made; doubled by each trial that fails.
SHORTEST_COOLDOWN, LONGEST_COOLDOWN = 8, 256
# Loss limit in passes: at the start, its refill by each pass, and its cap.
FIRST_LIMIT, LIMIT_REFILL, LARGEST_LIMIT = 0.5, 0.02, 32.0
LEAST_SECONDS = 1e-9
# Trials of a draft model before it may be given up.
DRAFT_TRIALS = 16


class AcceptanceRate:
    """The probability that a draft token is right if all before it were, from a prior and from trials."""

    def __init__(self, prior: float) -> None:
        self._right, self._wrong = PRIOR_WEIGHT * prior, PRIOR_WEIGHT * (1 - prior)
        self._waited, self._cooldown = 0, SHORTEST_COOLDOWN
        self.trials = 0

    @property
    def rate(self) -> float:
        return self._right / (self._right + self._wrong)

    @property
    def is_due(self) -> bool:
        """Whether the cooldown is over."""
        return self._waited >= self._cooldown

    def learn(self, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens in a row the first `accepted` were right; those after a wrong one say nothing."""
        self._right = MEMORY * self._right + accepted
        self._wrong = MEMORY * self._wrong + (accepted < proposed)
        self._cooldown = SHORTEST_COOLDOWN if accepted else min(LONGEST_COOLDOWN, 2 * self._cooldown)
        self._waited = 0
        self.trials += 1

    def wait(self) -> None:
        """Count a pass that could have carried such a token and did not."""
        self._waited += 1


@dataclass(frozen=True)
class Offer:
    """Up to `most` draft tokens for a sequence, and the acceptance rate of their kind.

    Those that are `drafted` by a model take time.
    """

    acceptance: AcceptanceRate
    most: int
    drafted: bool = False


class SpeculationPolicy:
    """Decides the number of draft tokens, by acceptance rates, the cost model and a loss limit.

    Loss limit: what wrong draft tokens may still cost. It starts at half a pass, refills by 2% of a pass with each pass
    and by what accepted tokens save, and is capped at 32 passes. So useless draft tokens cost less than 5%.
    """

    def __init__(self, cost: CostModel, draft_cost: CostModel) -> None:
        """`cost` is that of the large model's passes, `draft_cost` that of the draft model's."""
        self.draft = AcceptanceRate(DRAFT_PRIOR)
        self._ngrams = {length: AcceptanceRate(prior) for length, prior in NGRAM_PRIORS.items()}
        self._cost, self._draft_cost = cost, draft_cost
        self._limit = FIRST_LIMIT
        self._has_begun = False

    def ngram(self, match_length: int) -> AcceptanceRate:
        """The acceptance rate after a match of `match_length` tokens."""
        return next(found for length, found in self._ngrams.items() if match_length >= length)

    def choose(self, offers: Sequence[Offer | None], other_rows: int, most: int) -> list[int]:
        """The number of draft tokens for each sequence, together up to `most`.

        The pass has a row for each sequence, and `other_rows` besides.
        """
        # Noise in few measurements of tiny passes can make it 0.
        plain = max(self._cost.seconds(len(offers)), LEAST_SECONDS)
        # The first pass measures one row for each sequence, unless the disk makes further rows free.
        limit = max(0.0, self._limit) * (plain if self._has_begun else self._cost.disk_seconds)
        choice = _Choice(offers, other_rows, self._cost, self._draft_cost)
        kinds = {offer.acceptance: index for index, offer in enumerate(offers) if offer and offer.most}
        for kind, index in kinds.items():
            if kind.is_due and choice.proposed < most:
                choice.add(index, limit)
        best, best_rate = list(choice.counts), choice.tokens / (plain + choice.seconds)
        likeliest_first = sorted(
            (-(offer.acceptance.rate**count), index, count)
            for index, offer in enumerate(offers)
            if offer
            for count in range(1 + choice.counts[index], offer.most + 1)
        )
        for _, index, count in likeliest_first:
            is_next = choice.counts[index] + 1 == count and choice.proposed < most
            if is_next and choice.add(index, limit):
                rate = choice.tokens / (plain + choice.seconds)
                if rate > best_rate:
                    best, best_rate = list(choice.counts), rate
        carried = {offer.acceptance for offer, count in zip(offers, best, strict=True) if count}
        for kind in kinds.keys() - carried:
            kind.wait()
        return best

    def settle(
        self, sequences: int, other_rows: int, proposed: int, accepted: int, drafting_seconds: float
    ) -> None:
        """Update the loss limit after a pass. An accepted token saves its part of a pass without draft tokens."""
        plain, rows = self._cost.seconds(sequences), sequences + other_rows
        if not sequences or not plain:
            return
        self._has_begun = True
        lost = self._cost.seconds(rows + proposed) - self._cost.seconds(rows) + drafting_seconds
        change = LIMIT_REFILL + accepted / sequences - lost / plain
        self._limit = min(LARGEST_LIMIT, self._limit + change)

    def draft_is_useless(self, sequences: int, freed: float) -> bool:
        """Whether the draft model is worth less than its RAM, which would save the fraction `freed` of the reading."""
        if self.draft.trials < DRAFT_TRIALS:
            return False
        without = max(self._cost.disk_seconds * (1 - freed), self._cost.computing(sequences))
        tokens = 0.0
        for count in range(MOST_DRAFT_TOKENS + 1):
            tokens += self.draft.rate**count
            drafting = count * self._draft_cost.seconds(sequences)
            if tokens * without > self._cost.seconds(sequences * (1 + count)) + drafting:
                return False
        return True


class _Choice:
    """Numbers of draft tokens, the seconds that they add to a pass, and the tokens that it is expected to give."""

    def __init__(
        self, offers: Sequence[Offer | None], other_rows: int, cost: CostModel, draft_cost: CostModel
    ) -> None:
        self._offers, self._cost, self._draft_cost = offers, cost, draft_cost
        self._rows = len(offers) + other_rows
        self.counts = [0] * len(offers)
        self.proposed = 0
        self.tokens = float(len(offers))
        self.seconds = self._drafting = 0.0
        # Number of sequences in each pass of the draft model.
        self._drafted = [0] * MOST_DRAFT_TOKENS

    def add(self, index: int, limit: float) -> bool:
        """Whether one more token for sequence `index` keeps the seconds below `limit`; then it is added."""
        offer, depth = self._offers[index], self.counts[index]
        drafting, together = self._drafting, self._drafted[depth]
        if offer.drafted:
            drafting += self._draft_cost.seconds(together + 1)
            drafting -= self._draft_cost.seconds(together) if together else 0.0
        more = self._cost.seconds(self._rows + self.proposed + 1) - self._cost.seconds(self._rows)
        if more + drafting > limit:
            return False
        self.seconds, self._drafting = more + drafting, drafting
        self._drafted[depth] += offer.drafted
        self.counts[index] += 1
        self.proposed += 1
        self.tokens += offer.acceptance.rate ** self.counts[index]
        return True

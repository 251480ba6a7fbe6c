"""How often the tokens of one kind of proposal are right."""

from __future__ import annotations

GUESS_WEIGHT = 2.0  # tokens that the first guess counts for
MEMORY = 0.95  # of what earlier trials say, how much counts beside the latest
# Passes without a trial, until one is made to see whether things have changed.
SHORTEST_REST, LONGEST_REST = 8, 256


class Acceptance:
    """The chance that a proposed token is right where all before it were, from a first guess and from trials."""

    def __init__(self, guess: float) -> None:
        self._right, self._wrong = GUESS_WEIGHT * guess, GUESS_WEIGHT * (1 - guess)
        self._rested, self._rest = 0, SHORTEST_REST
        self.trials = 0

    @property
    def chance(self) -> float:
        return self._right / (self._right + self._wrong)

    @property
    def is_due(self) -> bool:
        """Whether it was long enough without a trial; longer from one vain trial to the next."""
        return self._rested >= self._rest

    def learn(self, proposed: int, accepted: int) -> None:
        """Of `proposed` tokens in a row the first `accepted` were right; what comes after a wrong one says nothing."""
        self._right = MEMORY * self._right + accepted
        self._wrong = MEMORY * self._wrong + (accepted < proposed)
        self._rest = SHORTEST_REST if accepted else min(LONGEST_REST, 2 * self._rest)
        self._rested = 0
        self.trials += 1

    def pass_over(self) -> None:
        """A pass could have tried it and did not."""
        self._rested += 1

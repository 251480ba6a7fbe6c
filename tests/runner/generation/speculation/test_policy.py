"""Many draft tokens if they are right or free, none if they are wrong, and never a loss above 5%."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.generation.speculation.cost import SLOPE, CostModel
from runner.generation.speculation.policy import (
    LONGEST_COOLDOWN,
    MOST_DRAFT_TOKENS,
    AcceptanceRate,
    Offer,
    SpeculationPolicy,
)

# The acceptance rate.


def test_trials_outweigh_the_prior() -> None:
    acceptance = AcceptanceRate(0.6)
    assert acceptance.rate == pytest.approx(0.6)
    for _ in range(20):
        acceptance.learn(4, 0)
    assert acceptance.rate < 0.1
    for _ in range(20):
        acceptance.learn(4, 4)
    assert acceptance.rate > 0.85


def test_the_acceptance_rate_converges() -> None:
    chance, acceptance = 0.7, AcceptanceRate(0.3)
    source = random.Random(5)
    seen = []
    for _ in range(400):
        right = next((n for n in range(4) if source.random() > chance), 4)
        acceptance.learn(4, right)
        seen.append(acceptance.rate)
    assert sum(seen[100:]) / 300 == pytest.approx(chance, abs=0.03)


def test_the_cooldown_doubles_with_failed_trials_up_to_a_limit() -> None:
    acceptance, rests = AcceptanceRate(0.1), []
    for _ in range(8):
        rest = 0
        while not acceptance.is_due:
            acceptance.wait()
            rest += 1
        rests.append(rest)
        acceptance.learn(1, 0)
    assert rests == sorted(rests) and rests[0] < rests[-1] == LONGEST_COOLDOWN
    acceptance.learn(1, 1)
    for _ in range(rests[0]):
        acceptance.wait()
    assert acceptance.is_due


# The cost model.


def test_one_pass_predicts_others_by_the_prior_slope() -> None:
    cost = CostModel()
    cost.learn(1, 2.0, 0.0)
    assert [cost.seconds(rows) for rows in (1, 2, 11)] == pytest.approx([2, 2 + 2 * SLOPE, 2 + 20 * SLOPE])


@given(
    st.floats(1e-3, 100), st.floats(0, 3), st.lists(st.integers(1, 64), min_size=30, max_size=60, unique=True)
)
def test_the_slope_is_learned_from_passes(one_row: float, slope: float, counts: list[int]) -> None:
    cost = CostModel()
    for rows in counts:
        cost.learn(rows, one_row * (1 + slope * (rows - 1)), 0.0)
    for rows in (1, 8, 32):
        assert cost.computing(rows) == pytest.approx(one_row * (1 + slope * (rows - 1)), rel=0.25)


def test_a_rough_measurement_counts_until_there_is_a_better_one() -> None:
    cost = CostModel()
    cost.learn(16, 80.0, 0.0, is_rough=True)
    assert cost.seconds(16) == pytest.approx(80)
    cost.learn(1, 2.0, 0.0)
    cost.learn(16, 80.0, 0.0, is_rough=True)
    assert cost.seconds(1) == pytest.approx(2)


def test_the_disk_makes_rows_free() -> None:
    cost = CostModel()
    cost.learn(1, 0.5, 10.0)
    assert cost.seconds(1) == cost.seconds(20) == 10.0
    assert cost.seconds(200) > 10.0


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(0, 1e3), st.floats(0, 1e3)), max_size=30))
def test_a_cost_is_never_negative(passes: list[tuple[int, float, float]]) -> None:
    cost = CostModel()
    for given_pass in passes:
        cost.learn(*given_pass)
    assert 0 <= cost.seconds(1) <= cost.seconds(2) <= cost.seconds(600)


# Decisions, on a machine whose clock is arithmetic.


@dataclass
class Machine:
    """Passes that take what they say, and proposals that are right with a chance."""

    computing: float = 1.0  # seconds of a row
    slope: float = SLOPE
    disk: float = 0.0
    drafting: float = 0.0  # seconds of the draft for a token; lookup where it is 0
    right: float = 0.0
    sequences: int = 1
    seconds: float = 0.0
    tokens: int = 0
    counts: list[int] = field(default_factory=list)
    retired_after: int | None = None

    def __post_init__(self) -> None:
        self.cost, self.draft_cost = CostModel(), CostModel()
        self.draft_cost.learn(1, self.drafting or 1e-9, 0.0)
        self.policy = SpeculationPolicy(self.cost, self.draft_cost)
        self.source = random.Random(3)
        self.cost.learn(16, 3 * self._computing(16), self.disk, is_rough=True)  # the prompt, everything cold

    def _computing(self, rows: int) -> float:
        return self.computing * (1 + self.slope * (rows - 1))

    def pass_seconds(self, rows: int) -> float:
        return max(self.disk, self._computing(rows))

    @property
    def plain_rate(self) -> float:
        return self.sequences / self.pass_seconds(self.sequences)

    def run(self, passes: int, freed: float = 0.0) -> Machine:
        for number in range(passes):
            acceptance = self.policy.draft if self.drafting else self.policy.ngram(4)
            offer = Offer(acceptance, MOST_DRAFT_TOKENS, drafted=bool(self.drafting))
            offers = [offer if self.retired_after is None else None] * self.sequences
            counts = self.policy.choose(offers, 0, 1000)
            right = [self._right(count) for count in counts]
            rows = self.sequences + sum(counts)
            drafting = sum(
                self.draft_cost.seconds(sum(count > depth for count in counts))
                for depth in range(max(counts))
            )
            self.seconds += self.pass_seconds(rows) + (drafting if self.drafting else 0)
            self.cost.learn(rows, self._computing(rows), self.disk)
            for count, accepted in zip(counts, right, strict=True):
                if count:
                    acceptance.learn(count, accepted)
            drafted = drafting if self.drafting else 0.0
            self.policy.settle(self.sequences, 0, sum(counts), sum(right), drafted)
            self.tokens += self.sequences + sum(right)
            self.counts.append(sum(counts))
            given_up = self.policy.draft_is_useless(self.sequences, freed)
            if self.drafting and self.retired_after is None and given_up:
                self.retired_after = number
        return self

    def _right(self, count: int) -> int:
        return next((n for n in range(count) if self.source.random() >= self.right), count)

    @property
    def gain(self) -> float:
        """Tokens a second against those without proposals."""
        return self.tokens / self.seconds / self.plain_rate


def test_free_rows_are_filled_at_once() -> None:
    machine = Machine(computing=0.1, disk=10.0, right=0.9).run(20)
    assert machine.counts[0] == MOST_DRAFT_TOKENS
    assert machine.gain > 5


def test_rows_that_cost_more_than_they_gain_are_left_out() -> None:
    machine = Machine(computing=3.0, disk=10.0, right=0.5).run(50)
    assert 5 < max(machine.counts[5:]) < MOST_DRAFT_TOKENS


def test_right_draft_tokens_pay_if_computing_is_the_bottleneck() -> None:
    machine = Machine(right=1.0).run(60)
    assert machine.gain > 2
    assert max(machine.counts) == MOST_DRAFT_TOKENS
    assert Machine(right=0.8, drafting=0.05).run(60).gain > 1.2


@pytest.mark.slow
@pytest.mark.parametrize("passes", [30, 64, 300, 2000])
@pytest.mark.parametrize("disk", [0.0, 0.9, 10.0])
@pytest.mark.parametrize(("slope", "drafting"), [(0.3, 0.0), (1.0, 0.0), (0.3, 0.1), (0.3, 0.9), (1.0, 3.0)])
@pytest.mark.parametrize("sequences", [1, 6])
def test_useless_draft_tokens_cost_less_than_5_percent(
    passes: int, disk: float, slope: float, drafting: float, sequences: int
) -> None:
    machine = Machine(slope=slope, disk=disk, drafting=drafting, sequences=sequences).run(passes)
    assert machine.gain > 0.95


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    right=st.floats(0, 1), slope=st.floats(0, 1.5), disk=st.floats(0, 5), drafting=st.floats(0, 2),
    sequences=st.integers(1, 8),
)  # fmt: skip
def test_draft_tokens_never_cost_more_than_5_percent(
    right: float, slope: float, disk: float, drafting: float, sequences: int
) -> None:
    machine = Machine(slope=slope, disk=disk, drafting=drafting, right=right, sequences=sequences).run(120)
    assert machine.gain > 0.95


def test_a_draft_model_that_is_never_right_is_given_up() -> None:
    machine = Machine(disk=10.0, drafting=0.05).run(64, freed=0.01)
    assert machine.retired_after is not None
    assert not any(machine.counts[machine.retired_after + 1 :])


def test_a_draft_model_that_is_right_stays() -> None:
    assert Machine(disk=10.0, drafting=0.05, right=0.7).run(200, freed=0.1).retired_after is None


def test_a_draft_model_worth_less_than_its_ram_is_given_up() -> None:
    assert Machine(disk=10.0, drafting=0.3, right=0.3).run(200, freed=0.7).retired_after is not None
    assert Machine(disk=10.0, drafting=0.3, right=0.3).run(200, freed=0.0).retired_after is None


def test_draft_tokens_that_become_right_are_proposed_again() -> None:
    machine = Machine(disk=0.0, slope=0.3).run(100)
    assert sum(machine.counts[-20:]) <= 2
    machine.right = 1.0
    machine.run(400)
    assert machine.counts[-1] == MOST_DRAFT_TOKENS


def test_no_more_draft_tokens_than_there_is_room_for() -> None:
    cost = CostModel()
    cost.learn(1, 0.1, 10.0)
    policy = SpeculationPolicy(cost, CostModel())
    offers = [
        Offer(policy.ngram(9), 3),
        None,
        Offer(policy.ngram(2), 16),
        Offer(policy.ngram(9), 0),
    ]
    for most in range(30):
        counts = policy.choose(offers, 2, most)
        assert sum(counts) == min(most, 19)
        assert counts[0] <= 3 and counts[1] == counts[3] == 0


def test_passes_that_took_no_time_divide_by_nothing() -> None:
    cost = CostModel()
    cost.learn(4, 0.0, 0.0)
    policy = SpeculationPolicy(cost, CostModel())
    assert policy.choose([Offer(policy.draft, 4, drafted=True)], 0, 4) is not None

"""What stood in the text before: the longest suffix, its latest place, and what follows it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.generation.speculation.ngram import LONGEST, NgramIndex


def indexed(ids: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(ids)
    return index


def searched(ids: list[int]) -> tuple[int, int | None]:
    """(length, end) of the longest suffix that stands earlier, where it stands last; by trying everything.

    Where there is none, the place beside which the text has been running since there was one.
    """
    for length in range(min(LONGEST, len(ids) - 1), 0, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                return length, end
    before = searched(ids[:-1])[1] if ids else None
    return 0, None if before is None else before + 1


@given(st.lists(st.integers(0, 3) | st.integers(0, 50), max_size=60), st.integers(0, 20))
def test_the_latest_place_of_the_longest_suffix(ids: list[int], count: int) -> None:
    index = indexed(ids[: len(ids) // 2])
    for token in ids[len(ids) // 2 :]:
        index.extend([token])
    length, place = searched(ids)
    assert (index.match_length, index.place) == (length, place)
    proposed = index.propose(count)
    if place is None:
        assert proposed == []
        return
    grown = list(ids)
    for token in proposed:  # each is what followed, in the text with those before it
        assert token == grown[place]
        grown.append(token)
        place += 1
    assert len(proposed) == count


def test_a_loop_continues() -> None:
    assert indexed([9, 1, 2, 3, 1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]
    assert indexed([5, 5, 5]).propose(3) == [5, 5, 5]


def test_a_replaced_word_does_not_end_a_repetition() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    index = indexed([*text, 1, 2, 3])
    assert (index.match_length, index.propose(3)) == (3, [4, 5, 6])
    for new in (40, 50):
        index.extend([new])
    assert (index.match_length, index.propose(3)) == (0, [6, 7, 8])
    index.extend([6])
    assert (index.match_length, index.propose(2)) == (1, [7, 8])


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_nothing_is_proposed_if_nothing_repeats(ids: list[int]) -> None:
    index = indexed(ids)
    assert index.match_length == 0
    assert index.propose(4) == []


def test_a_token_of_a_long_text_costs_no_more() -> None:
    """Loops are the worst case of a search."""

    def seconds(count: int) -> float:
        began = time.thread_time()
        index = indexed([7, 8] * (count // 2))
        assert index.match_length == LONGEST
        return time.thread_time() - began

    assert seconds(40_000) < 40 * seconds(4_000) + 0.1

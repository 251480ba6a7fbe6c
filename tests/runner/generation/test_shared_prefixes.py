"""Texts that begin with the same tokens: the beginning is computed once, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runner
import runner.generation.memory_plan
from runner.generation import shared_prefixes
from runner.generation.batch import Batch
from runner.generation.memory_plan import memory_plan
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.generation.scorer import Scorer, Text, plan_scoring
from runner.generation.scoring import score
from runner.generation.sequence import Request, Sequence, common_length
from runner.generation.shared_prefixes import SharedPrefixes
from runner.model.forward import ModelRunner
from runner.model.kv_cache import KVCache, Segment
from tests.support.prompts import DTYPES, batched, plain, tokens

SEEDS = st.integers(0, 2**32)


def tree_of_texts(count: int, source: random.Random, longest: int = 90) -> list[list[int]]:
    """Each begins as a part of another, with none of it, or is the same."""
    texts = [tokens(source.randint(1, longest), source.randrange(2**32))]
    while len(texts) < count:
        known = source.choice(texts)
        kept = known[: source.choice([0, len(known), source.randint(0, len(known))])]
        texts.append(kept + tokens(source.randint(not kept, longest - len(kept)), source.randrange(2**32)))
    source.shuffle(texts)
    return texts


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each segment, for each pass."""
    carried: list[list[int]] = []
    forward_all = ModelRunner.forward_all

    def count(self: ModelRunner, segments: list[Segment], *given: object) -> object:
        carried.append([len(segment.ids) for segment in segments])
        return forward_all(self, segments, *given)

    monkeypatch.setattr(ModelRunner, "forward_all", count)
    return carried


def total(rows: list[list[int]]) -> int:
    return sum(map(sum, rows))


@pytest.fixture
def in_little_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in small chunks, and no margin."""
    monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
    monkeypatch.setattr("runner.weights.chunks.LARGEST_CHUNK", 50_000)


def all_caches(active: list[KVCache]) -> set[KVCache]:
    return {each for cache in active for each in cache.chain}


# Which prefixes there are.


@given(SEEDS, st.integers(1, 12), st.sampled_from([0, 1]))
def test_prefixes_are_shared_by_texts_that_begin_with_them(seed: int, count: int, ahead: int) -> None:
    texts = tree_of_texts(count, random.Random(seed), 200)
    prefixes = SharedPrefixes(texts, ahead)
    for number, text in enumerate(texts):
        end = prefixes.shared(number)
        assert end <= max(0, len(text) - 1 - ahead)
        members = prefixes.members(number, end)
        assert number in members and (len(members) > 1) == (end > 0)
        assert all(texts[member][: end + ahead] == text[: end + ahead] for member in members if end)
    least = shared_prefixes.LEAST_SHARED
    for one, other in combinations(range(count), 2):
        common = min(common_length(texts[one], texts[other]), len(texts[one]) - 1, len(texts[other]) - 1)
        common = max(0, common - ahead)
        # What two texts have in common is missed only if it is hardly more than what both share already.
        assert min(prefixes.shared(one), prefixes.shared(other)) > common - least
    assert prefixes.positions <= sum(map(len, texts))


def test_one_text_shares_nothing() -> None:
    for texts in ([], [tokens(100, 1)]):
        prefixes = SharedPrefixes(texts)
        assert prefixes.positions == prefixes.shared(0) == 0


# Generation.


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(["lookup", "off"]), st.sampled_from([1, 2, 5, None]), SEEDS)
def test_prompts_have_the_tokens_of_their_own_runs(
    prepared, dtype: str, speculate: str, batch: int | None, seed: int
) -> None:
    model, source = runner.load(prepared(dtype=dtype)[1]), random.Random(seed)
    texts = tree_of_texts(source.randint(2, 8), source)
    requests = [Request(text, source.randint(1, 6)) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_SHARED", source.choice([1, 8, 32]))
        running = batched(model, requests, batch, speculate)
    found = {}
    while running.active or running.waiting:
        found |= {each.index: each.ids for each in running.step()}
        caches = all_caches([each.cache for each in running.active])
        assert sum(cache.positions for cache in caches) <= running.plan.request.positions
    assert [found[index] for index in range(len(texts))] == plain(model, requests)


def test_each_row_of_a_tree_is_computed_once_and_in_the_first_pass(prepared, rows: list[list[int]]) -> None:
    model = runner.load(prepared()[1])
    examples, documents = tokens(64, 1), [tokens(40, 2), tokens(48, 3)]
    texts = [[*examples, *document, *tokens(5, place)] for place in range(3) for document in documents]
    running = batched(model, [Request(text, 2) for text in texts], None, "off")
    assert len(list(running.run())) == 6
    # The examples, each document, the questions; then a row for the last token of each.
    assert sorted(rows[0]) == sorted([64, 40, 48, *[5] * 6])
    assert rows[1:] == [[1] * 6]
    assert [each.passes for each in running.sequences] == [2] * 6


@pytest.mark.parametrize("batch", [1, 2, None])
def test_choices_of_a_prompt_share_it(prepared, rows: list[list[int]], batch: int | None) -> None:
    model, ids = runner.load(prepared()[1]), tokens(130, 1)
    sampling = Sampling(temperature=1.0, seed=7, n=5, logprobs=2)

    def run() -> dict[int, tuple[list[int], list]]:
        rows.clear()
        asked = {"max_new_tokens": 4, "sampling": sampling, "batch": batch, "speculate": "off"}
        return {each.request.choice: (each.ids, each.scores) for each in model.generate_all([ids], **asked)}

    found = run()
    # 129 rows once, of each choice the last one, and of its new tokens all but the last.
    assert total(rows) == 129 + 5 * 1 + 5 * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_SHARED", 10**9)
        assert run() == found
    assert total(rows) == 5 * (130 + 3)
    assert len({tuple(ids) for ids, _ in found.values()}) > 1


def test_choices_follow_a_grammar(prepared, rows: list[list[int]], miniature: tuple[Path, Path]) -> None:
    model = runner.load(miniature[1])
    prompt = "SELECT name FROM employees WHERE name LIKE 'A%'; thank you for your help, John is older. " * 2
    sampling = Sampling(temperature=1.0, seed=3, n=3, regex="(yes|no), [a-z]{3,9}!")

    def run() -> list[list[int]]:
        found = model.generate_all([prompt], max_new_tokens=20, sampling=sampling)
        return [each.ids for each in sorted(found, key=lambda each: each.index)]

    found, shared = run(), total(rows)
    rows.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_SHARED", 10**9)
        assert run() == found
    assert shared < total(rows) / 2


def test_prompts_share_with_a_draft_and_in_the_lossless_form(
    prepared, coded: tuple[Path, Path], rows: list[list[int]]
) -> None:
    for directory, draft in ((coded[1], None), (prepared()[1], prepared(hidden_size=48)[1])):
        model, source = runner.load(directory), random.Random(5)
        vocabulary = model.weights.model.vocab_size
        texts = [[token % vocabulary for token in text] for text in tree_of_texts(6, source)]
        requests = [Request(text, 12) for text in texts]
        wanted = plain(model, requests)
        running = batched(model, requests, 4, "lookup", draft)
        found = {each.index: each.ids for each in running.run()}
        assert [found[index] for index in range(6)] == wanted
        assert running.plan.request.joined > 0


def test_an_interrupted_batch_goes_on(prepared) -> None:
    model, source = runner.load(prepared()[1]), random.Random(11)
    requests = [Request(text, 5) for text in tree_of_texts(7, source)]

    def interrupt(part: int, parts: int) -> None:
        if source.random() < 0.1:
            raise KeyboardInterrupt

    running, interrupted, found = batched(model, requests, 3, "off", on_part=interrupt), 0, {}
    while running.active or running.waiting:
        try:
            found |= {each.index: each.ids for each in running.step()}
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 1 and running.plan.request.joined > 0
    assert [found[index] for index in range(7)] == plain(model, requests)


def test_an_interruption_right_after_a_pass_costs_only_that_pass(prepared, rows: list[list[int]]) -> None:
    model, ids = runner.load(prepared()[1]), tokens(100, 1)
    requests = [Request([*ids, *tokens(3, place)], 4) for place in range(3)]
    running = batched(model, requests, None, "off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            running.step()
    found = {each.index: each.ids for each in running.run()}
    assert sum(100 in each for each in rows) == 1
    assert [found[index] for index in range(3)] == plain(model, requests)


# RAM.


def tight(model: Model, requests: list[Request], positions: int, rows: int) -> Model:
    """The model with RAM for passes of `rows` rows beside `positions` positions."""
    longest = max(request.capacity for request in requests)
    plan = replace(model, ram=2**50).memory_plan(longest, rows).request
    position = plan.cache // plan.positions
    activations = plan.activations + position * longest + 8 * 8 * 1200
    return replace(model, ram=plan.process + positions * position + activations + 3 * 60_000)


def test_shared_positions_are_counted_once(prepared, in_little_ram: None) -> None:
    model, ids = runner.load(prepared()[1]), tokens(400, 1)
    requests = [Request([*ids, *tokens(4, place)], 5) for place in range(8)]
    small = tight(model, requests, 400 + 8 * 16, 20)
    plan = batched(small, requests).plan
    assert plan.request.batch == 8
    assert plan.request.positions == 400 + 8 * 8 + 8 * 8 - 8 * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "LEAST_SHARED", 10**9)
        assert batched(small, requests).plan.request.batch < 4
    taken = plan.request.process + plan.request.cache + plan.request.activations
    assert taken + plan.read_ahead + plan.resident_bytes <= small.ram


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 400), st.sampled_from([2, 8, 40]), SEEDS)
def test_tokens_do_not_depend_on_the_ram(prepared, more: int, row_count: int, seed: int) -> None:
    """Prompts in several passes, and prefixes that are given up and computed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.generation.memory_plan, "MARGIN", 0)
        patch.setattr("runner.weights.chunks.LARGEST_CHUNK", 50_000)
        model, source = runner.load(prepared()[1]), random.Random(seed)
        requests = [Request(text, source.randint(1, 4)) for text in tree_of_texts(8, source)]
        wanted = plain(model, requests)
        longest = max(request.capacity for request in requests)
        running = batched(tight(model, requests, longest + 8 + more, row_count), requests, None, "off")
        found = {}
        while running.active or running.waiting:
            found |= {each.index: each.ids for each in running.step()}
        assert [found[index] for index in range(8)] == wanted


def test_where_joining_values_does_not_fit_nothing_is_shared(prepared, in_little_ram: None) -> None:
    model, ids = runner.load(prepared()[1]), tokens(400, 1)
    requests = [Request([*ids, place], 2) for place in range(5, 8)]
    wanted = plain(model, requests)
    least = replace(model, ram=2**50).memory_plan(requests[0].capacity, 1).request
    small = replace(model, ram=least.ram - least.spare + least.least_weights)
    running = batched(small, requests, None, "off")
    assert running.plan.request.joined == 0
    assert [each.ids for each in sorted(running.run(), key=lambda each: each.index)] == wanted


def test_the_last_user_frees_a_prefix(prepared) -> None:
    model, ids = runner.load(prepared()[1]), tokens(64, 1)
    requests = [Request([*ids, place], new) for place, new in ((5, 2), (6, 4), (7, 3))]
    running = batched(model, requests, 2, "off")
    held = []
    for _ in steps(running):
        caches = all_caches([each.cache for each in running.active])
        held.append(sum(cache.positions for cache in caches))
    assert max(held) == 64 + 2 * 8 and held[-1] == 0


def steps(running: Batch) -> Iterator[list[Sequence]]:
    while running.active or running.waiting:
        yield running.step()


# Scores.


def alone(model: Model, text: Text) -> list:
    rows = model.forward(text.ids[:-1], model.cache(text.rows), all_rows=True)[text.first - 1 :]
    return [score(row, token, 1) for row, token in zip(rows, text.ids[text.first :], strict=True)]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 3, 17, 60, 500]), st.integers(0, 200), SEEDS)
def test_scores_are_those_of_each_text_alone(prepared, row_count: int, more: int, seed: int) -> None:
    model, source = runner.load(prepared()[1]), random.Random(seed)
    texts = []
    for index, ids in enumerate(tree_of_texts(source.randint(2, 9), source)):
        ids = ids if len(ids) > 1 else [*ids, 7]
        texts.append(Text(10 * index, ids, source.choice([1, source.randint(1, len(ids) - 1)])))
    prefixes = SharedPrefixes([text.ids for text in texts], ahead=1)
    longest = max(text.rows for text in texts)
    plan = plan_scoring(model.memory_request([1], 1), texts, prefixes)
    for logit_rows in {1, row_count}:
        request = replace(plan.request, rows=row_count, logit_rows=logit_rows, capacities=(longest, more))
        scorer = Scorer(model, texts, memory_plan(request), None, prefixes)
        found = []
        while scorer.active or scorer.waiting:
            found += scorer.step()
            caches = all_caches([each.cache for each in scorer.active])
            assert sum(cache.positions for cache in caches) <= request.positions
        assert [each.scores for each in found] == [alone(model, each.text) for each in found]
        assert sorted(each.text.index for each in found) == [text.index for text in texts]
        prefixes = SharedPrefixes([text.ids for text in texts], ahead=1)


@pytest.mark.parametrize("first", [1, 205])
def test_a_shared_beginning_is_scored_once(prepared, rows: list[list[int]], first: int) -> None:
    model, ids = runner.load(prepared()[1]), tokens(200, 1)
    texts = [Text(place, [*ids, *tokens(10, place)], first) for place in range(6)]
    scorer = model.scorer(texts)
    found = list(scorer.run())
    assert (total(rows), scorer.passes) == (199 + 6 * 10, 1)
    assert [each.scores for each in found] == [alone(model, text) for text in texts]


def test_interleaved_documents_in_little_ram_are_still_right(prepared, rows: list[list[int]]) -> None:
    model, documents = runner.load(prepared()[1]), [tokens(64, 1), tokens(80, 2), tokens(72, 3)]
    texts = [
        Text(place, [*documents[place % 3], *tokens(3, place)], 70 if place % 3 else 60) for place in range(9)
    ]
    wanted = [alone(model, text) for text in texts]
    known = {}
    for most in (84, 120, 500):
        rows.clear()
        prefixes = SharedPrefixes([text.ids for text in texts], ahead=1)
        request = replace(model.memory_request([most], 30), logit_rows=30, joined=82)
        scorer = Scorer(model, texts, memory_plan(request), None, prefixes)
        assert [each.scores for each in scorer.run()] == wanted
        known[most] = total(rows)
    assert known[84] >= known[120] > known[500] == sum(text.rows for text in texts) - 2 * (63 + 79 + 71)


def test_an_interrupted_pass_is_made_again(prepared) -> None:
    model, ids = runner.load(prepared()[1]), tokens(100, 1)
    texts, calls = [Text(place, [*ids, *tokens(4, place)], 90) for place in range(3)], []

    def interrupt(part: int, parts: int) -> None:
        calls.append(part)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt

    scorer, found = model.scorer(texts, interrupt), []
    while scorer.active or scorer.waiting:
        try:
            found += scorer.step()
        except KeyboardInterrupt:
            continue
    assert [each.scores for each in found] == [alone(model, text) for text in texts]

"""Prompts that share their passes: each has the logits and tokens of its own run, whichever others join and end."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner
import runner.generation.memory_plan
import runner.model.activations
from runner import BloomdeskError
from runner.generation.memory_plan import MARGIN
from runner.generation.sequence import Request, Sequence
from runner.generation.speculation.cost import CostModel
from runner.model.forward import ModelRunner
from runner.model.kv_cache import KVCache, Segment
from tests.support.prompts import DTYPES, batched, plain, plain_run, tokens


def some_requests(count: int, seed: int) -> list[Request]:
    """Ragged ones; some repeat themselves, so that n-grams match."""
    source = random.Random(seed)
    found = []
    for number in range(count):
        ids = tokens(source.randint(1, 30), seed + number)
        found.append(Request(ids * source.choice([1, 1, 3]), source.randint(1, 24)))
    return found


NGRAMS = "runner.generation.speculation.proposer.NgramIndex"


def ngrams_that(propose: Callable[[list[int], int], list[int]]) -> type:
    """An index of n-grams that always has a long match, and proposes what the function says of the text."""

    class Index:
        match_length, place = 16, 0

        def __init__(self) -> None:
            self.ids: list[int] = []

        def extend(self, ids: list[int]) -> None:
            self.ids += ids

        def propose(self, count: int) -> list[int]:
            return propose(self.ids, count)

    return Index


# One pass.


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_rows_have_the_same_bits_alone_and_in_company(prepared, dtype: str, seed: int) -> None:
    """Sequences of any lengths, cut at random, beginning at random passes."""
    model, source = runner.load(prepared(dtype=dtype)[1]), random.Random(seed)
    texts = [tokens(source.randint(1, 40), seed + place) for place in range(source.randint(1, 5))]
    alone = [model.forward(text, model.cache(len(text)), all_rows=True) for text in texts]
    caches = [model.new_cache(len(text)) for text in texts]
    while unfinished := [place for place, text in enumerate(texts) if caches[place].length < len(text)]:
        segments, wanted = [], []
        for place in source.sample(unfinished, source.randint(1, len(unfinished))):
            start = caches[place].length
            count = source.choice([1, source.randint(1, len(texts[place]) - start)])
            logits = source.randint(0, count)
            segments.append(Segment(texts[place][start : start + count], caches[place], logits))
            wanted.append(alone[place][start + count - logits : start + count])
        for logits, expected in zip(model.forward_all(segments), wanted, strict=True):
            assert torch.equal(logits, expected)
    assert [cache.length for cache in caches] == [len(text) for text in texts]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_a_few_rows_at_a_time_are_the_same(
    prepared, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner.load(prepared(dtype=dtype)[1])
    ids = tokens(75, 1)
    whole = model.forward(ids, model.cache(75), all_rows=True)
    for least in (1, 4, 13):
        monkeypatch.setattr(runner.model.activations, "SCORE_BYTES", 1)
        monkeypatch.setattr(runner.model.activations, "LEAST_SCORE_ROWS", least)
        assert torch.equal(model.forward(ids, model.cache(75), all_rows=True), whole)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_rewound_cache_equals_one_that_was_never_longer(prepared, data: st.DataObject) -> None:
    model = runner.load(prepared(dtype=data.draw(st.sampled_from(DTYPES)))[1])
    text, cache = tokens(30, 3), model.cache(40)
    expected = model.forward(text, model.cache(30), all_rows=True)
    while cache.length < 30:
        start = cache.length
        right = data.draw(st.integers(1, 30 - start))
        wrong = data.draw(st.integers(0, min(9, 40 - start - right)))
        ids = text[start : start + right] + tokens(wrong, 50)
        logits = model.forward(ids, cache, all_rows=True)
        assert torch.equal(logits[:right], expected[start : start + right])
        cache.rewind(start + right)
        for block in cache.blocks:
            assert not block.keys[:, cache.length :].any()
            assert not block.values[:, :, cache.length :].any()
    with pytest.raises(ValueError, match="cannot go back to 31"):
        cache.rewind(31)


def test_an_interrupted_pass_changes_no_cache(prepared) -> None:
    model = runner.load(prepared()[1])
    caches = [model.new_cache(20) for _ in range(3)]
    model.forward_all(
        [Segment(tokens(count, count), cache) for count, cache in zip((5, 9, 1), caches, strict=True)]
    )
    before = [[(b.keys.clone(), b.values.clone()) for b in cache.blocks] for cache in caches]

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.forward_all([Segment(tokens(4, 8), cache) for cache in caches], interrupt)
    assert [cache.length for cache in caches] == [5, 9, 1]
    for cache, blocks in zip(caches, before, strict=True):
        for block, (keys, values) in zip(cache.blocks, blocks, strict=True):
            assert torch.equal(block.keys, keys) and torch.equal(block.values, values)


# Batches.


@pytest.mark.parametrize("speculate", ["lookup", "off"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_prompt_has_the_tokens_of_its_own_run(prepared, dtype: str, speculate: str) -> None:
    model = runner.load(prepared(dtype=dtype)[1])
    requests = some_requests(9, 7)
    wanted = plain(model, requests)
    for batch in (1, 3, None):
        running = batched(model, requests, batch, speculate)
        found = {each.index: each for each in running.run()}
        assert [found[index].ids for index in range(9)] == wanted
        assert all(each.stop_reason == "length" or each.ids[-1] == 2 for each in found.values())
        assert running.tokens == sum(map(len, wanted))
        assert running.passes < running.tokens or batch == 1
        assert running.accepted <= running.proposed
        assert (speculate == "off") <= (running.proposed == 0)


@pytest.mark.parametrize("seed", range(4))
def test_neither_draft_tokens_nor_the_clock_change_a_token(
    prepared, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model, source = runner.load(prepared()[1]), random.Random(seed)
    requests = [Request(tokens(4, number), 30) for number in range(5)]
    wanted = plain(model, requests)
    texts = [[*request.prompt_ids, *ids] for request, ids in zip(requests, wanted, strict=True)]
    learn = CostModel.learn

    def learn_nonsense(self: CostModel, rows: int, *_: float, is_rough: bool) -> None:
        learn(self, rows, source.expovariate(1), source.choice([0.0, 50.0, 50.0]), is_rough=is_rough)

    def propose(ids: list[int], count: int) -> list[int]:
        text = next(text for text in texts if text[:4] == ids[:4])
        following = text[len(ids) :][:count]
        return [token if source.random() < 0.8 else source.randrange(1200) for token in following]

    monkeypatch.setattr(CostModel, "learn", learn_nonsense)
    index = ngrams_that(propose)
    index.match_length = property(lambda self: source.choice([0, 2, 5, 16]))
    index.place = property(lambda self: source.choice([None, 0, 3]))
    monkeypatch.setattr(NGRAMS, index)
    running = batched(model, requests, 3)
    found = {each.index: each.ids for each in running.run()}
    assert [found[index] for index in range(5)] == wanted
    assert running.proposed >= running.accepted > 10


def test_texts_that_repeat_themselves_take_fewer_passes(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner.load(prepared()[1])
    ids = tokens(5, 1)
    said = plain_run(model, ids, 40)
    monkeypatch.setattr(CostModel, "seconds", lambda self, rows: 1.0)  # rows are free
    generation = model.generate([*ids, *said, *ids], max_new_tokens=30)
    found = list(generation)
    assert found == plain_run(model, [*ids, *said, *ids], 30)
    assert generation.proposed > 0
    assert generation.passes == 30 - generation.accepted


def test_an_end_of_text_among_accepted_draft_tokens_ends_the_sequence(
    prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft tokens are right far beyond it."""
    model = runner.load(prepared()[1])
    said = plain_run(model, [5, 6, 7], 40)
    monkeypatch.setattr(CostModel, "seconds", lambda self, rows: 1.0)
    for end in (1, 2, 5, 9, 30):
        shape = replace(model.weights.model, eos_token_id=said[end])
        wanted = said[: said.index(said[end]) + 1]
        ending = replace(model, weights=replace(model.weights, model=shape))
        propose_from(said, monkeypatch)
        generation = ending.generate([5, 6, 7], max_new_tokens=40)
        assert list(generation) == wanted
        assert generation.stop_reason == "eos"
        assert generation.passes <= 2 + len(wanted) // 9
        generation = model.generate([5, 6, 7], max_new_tokens=end + 1)
        assert (list(generation), generation.stop_reason) == (said[: end + 1], "length")


def propose_from(said: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have n-grams propose what comes."""
    known = [*said, *[9] * 20]
    monkeypatch.setattr(NGRAMS, ngrams_that(lambda ids, count: known[len(ids) - 3 :][:count]))


@pytest.mark.parametrize("wrong_at", [0, 1, 3])
def test_wrong_draft_tokens_change_nothing(prepared, monkeypatch: pytest.MonkeyPatch, wrong_at: int) -> None:
    model = runner.load(prepared(dtype="float16")[1])
    said = plain_run(model, [5, 6, 7], 30)
    monkeypatch.setattr(CostModel, "seconds", lambda self, rows: 1.0)

    def propose(ids: list[int], count: int) -> list[int]:
        following = said[len(ids) - 3 :][:count]
        return [(token + 1) % 1200 if place == wrong_at else token for place, token in enumerate(following)]

    monkeypatch.setattr(NGRAMS, ngrams_that(propose))
    generation = model.generate([5, 6, 7], max_new_tokens=30)
    assert list(generation) == said
    assert generation.proposed > generation.accepted
    assert wrong_at == 0 or generation.accepted > 10


def test_a_pass_is_made_again_if_its_draft_tokens_overflow(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 times infinity is not a number, so the row of a draft token can spoil those before it."""
    model = runner.load(prepared(dtype="float16")[1])
    said = plain_run(model, [5, 6, 7], 20)
    monkeypatch.setattr(CostModel, "seconds", lambda self, rows: 1.0)
    propose_from(said, monkeypatch)
    forward_all, spoilt = ModelRunner.forward_all, []

    def spoil(self: ModelRunner, segments: list[Segment], on_part: object) -> list[torch.Tensor]:
        logits = forward_all(self, segments, on_part)
        if segments[0].logits > 1:
            spoilt.append(len(logits[0]))
            logits[0] = logits[0] * torch.nan
        return logits

    monkeypatch.setattr(ModelRunner, "forward_all", spoil)
    assert list(model.generate([5, 6, 7], max_new_tokens=20)) == said
    assert len(spoilt) == 1  # then it is left alone


def test_sequences_join_as_others_end_and_ram_is_freed(prepared) -> None:
    model = runner.load(prepared()[1])
    requests = [Request(tokens(4, number), new) for number, new in enumerate([2, 9, 3, 5, 1, 7])]
    running = batched(model, requests, 2, "off")
    caches: dict[int, weakref.ref] = {}
    finished, most = [], 0
    while running.active or running.waiting:
        done = running.step()
        for each in running.sequences:
            if each.cache is not None:
                caches.setdefault(each.index, weakref.ref(each.cache.blocks[0].keys))
        most = max(most, len(running.active) + len(done))
        finished += done
        for each in done:
            assert each.cache is None
            assert each.index not in caches or caches[each.index]() is None
    assert most == 2
    assert [each.index for each in finished] == [0, 2, 1, 3, 4, 5]
    assert [each.passes for each in running.sequences] == [2, 9, 3, 5, 1, 7]
    assert running.passes == 17
    everything = sum(chunk.nbytes for chunk in model.weights.stream.chunks)
    assert running.bytes_read == everything
    assert 0 < sum(each.bytes_read for each in running.sequences) <= everything


@pytest.mark.parametrize("speculate", ["lookup", "off"])
def test_prompts_take_several_passes_if_ram_is_short(
    prepared, monkeypatch: pytest.MonkeyPatch, speculate: str
) -> None:
    model = runner.load(prepared()[1])
    requests = [Request(tokens(count, count), 6) for count in (70, 3, 64, 20)]
    wanted = plain(model, requests)
    monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
    monkeypatch.setattr("runner.weights.chunks.LARGEST_CHUNK", 50_000)
    model = runner.load(prepared()[1])
    nothing = replace(model, ram=2**50)
    cache = 4 * KVCache.nbytes(model.weights.model, 75, model.weights.dtype)
    buffers = 3 * 60_000
    for rows in (4, 17, 40):
        activations = nothing.memory_plan(75, rows).request.activations + 8 * 4 * 1200
        tight = replace(model, ram=model.process_nbytes + cache + activations + buffers)
        running = batched(tight, requests, 4, speculate)
        assert 4 <= running.plan.request.rows < 70
        carried = []
        forward_all = ModelRunner.forward_all

        def count(
            self: ModelRunner,
            segments: list[Segment],
            on_part: object,
            forward_all=forward_all,
            carried=carried,
        ):
            carried.append(sum(len(segment.ids) for segment in segments))
            return forward_all(self, segments, on_part)

        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "forward_all", count)
            found = {each.index: each.ids for each in running.run()}
        assert [found[index] for index in range(4)] == wanted
        assert max(carried) <= running.plan.request.rows


@pytest.mark.parametrize("speculate", ["lookup", "off"])
def test_an_interrupted_batch_can_continue(prepared, speculate: str) -> None:
    model = runner.load(prepared()[1])
    requests = some_requests(5, 20)
    wanted = plain(model, requests)
    source = random.Random(4)

    def interrupt(done: int, total: int) -> None:
        if source.random() < 0.1:
            raise KeyboardInterrupt

    running, interrupted, found = batched(model, requests, 3, speculate, on_part=interrupt), 0, {}
    while running.active or running.waiting:
        try:
            found |= {each.index: each.ids for each in running.step()}
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 3
    assert [found[index] for index in range(5)] == wanted


@pytest.mark.parametrize("passes", [0, 2])
def test_an_interruption_right_after_a_pass_costs_only_that_pass(
    prepared, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    model = runner.load(prepared()[1])
    wanted = plain_run(model, [5, 6, 7], 8)
    running = batched(model, [Request([5, 6, 7], 8)], None, "off")
    for _ in range(passes):
        running.step()
    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            running.step()
    assert [each.ids for each in running.run()] == [wanted]


# From Python, and what it makes of the RAM.


@pytest.mark.slow
def test_the_miniature_answers_many_prompts_at_a_time(miniature: tuple[Path, Path]) -> None:
    model = runner.load(miniature[1])
    prompts = [
        "The SQL command to list all the books whose year is 1999 is:",
        "The Spanish translation of thank you for your help is:",
        "The weather today is",
    ]
    found = {each.index: each for each in model.generate_all(prompts, max_new_tokens=12)}
    for index, prompt in enumerate(prompts):
        assert found[index].ids == list(model.generate(prompt, max_new_tokens=12, speculate="off"))
    assert list(model.generate_all([])) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "at least 1 prompt, found 0"),
        ({"speculate": "guess"}, "unknown --speculate 'guess'"),
        ({"max_new_tokens": 0}, "at least 1, found 0"),
        ({"draft": "nowhere"}, "nowhere"),
    ],
)
def test_unusable_options_are_refused(prepared, options: dict[str, object], message: str) -> None:
    model = runner.load(prepared()[1])
    with pytest.raises(BloomdeskError, match=message):
        model.generate_all([[5, 6]], **options)
    with pytest.raises(BloomdeskError, match="no tokens"):
        model.generate_all([[5, 6], ""])


def test_more_ram_lets_more_sequences_share_a_pass(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.generation.memory_plan, "MARGIN", 0)
    monkeypatch.setattr("runner.weights.chunks.LARGEST_CHUNK", 50_000)
    model = runner.load(prepared()[1])
    requests = [Request([5, 6, 7], 30)] * 20
    alone = replace(model, ram=2**50).memory_plan(32, 3).request
    found = []
    for caches in (1, 2, 5, 12, 30):
        ram = alone.process + alone.activations + 300_000 + caches * alone.cache
        plan = batched(replace(model, ram=ram), requests, None).plan
        request = plan.request
        assert request.cache == request.batch * alone.cache
        assert request.batch <= request.logit_rows <= request.rows
        taken = request.process + request.cache + request.activations
        taken += plan.read_ahead + plan.resident_bytes
        assert taken <= ram
        found.append(request.batch)
    assert found == sorted(found) and found[0] < 5 < 12 < found[-1]
    assert batched(replace(model, ram=2**50), requests, 7, "off").plan.request.batch == 7


def test_an_error_about_ram_names_the_longest_prompt(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(runner.load(prepared()[1]), ram=2 * 10**8, process_nbytes=10**8)
    with pytest.raises(BloomdeskError, match=r"KV cache .* for the longest of the prompts: 900,002 tokens"):
        model.generate_all([[5], [5, 6, 7], [8]], max_new_tokens=900_000)


def test_a_larger_batch_does_not_displace_all_resident_weights(prepared) -> None:
    """If everything fits, a few prompts at the memory's speed are faster than many at the disk's."""
    model = runner.load(prepared()[1])
    weights = sum(chunk.nbytes for chunk in model.weights.stream.chunks)
    requests = [Request([5, 6, 7], 700)] * 64
    alone = replace(model, ram=2**50).memory_plan(702, 3).request
    ram = alone.process + alone.activations + MARGIN + weights + 3 * alone.cache + 500_000
    plan = batched(replace(model, ram=ram), requests, None, "off").plan
    assert plan.streamed_bytes == 0
    assert 2 <= plan.request.batch <= 3

"""A cache with a prefix: its sequence has the bits that it has with a cache of its own."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner
from runner.generation.model import Model
from runner.model.kv_cache import KVCache, Segment
from tests.support.prompts import DTYPES, tokens


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_sequences_that_share_prefixes_have_their_own_bits(prepared, dtype: str, seed: int) -> None:
    """Two prefixes, one behind the other, with a sequence behind each; read in the same pass or in several."""
    model, source = runner.load(prepared(dtype=dtype)[1]), random.Random(seed)
    first, second = sorted(source.sample(range(1, 200), 2))
    text = tokens(second, seed)
    texts = [text[:first], text]
    for before in (first, first, second, second):
        texts.append(text[:before] + tokens(source.randint(1, 30), source.randrange(2**32)))
    alone = [model.forward(ids, model.cache(len(ids)), all_rows=True) for ids in texts]
    outer = model.new_cache(first, is_prefix=True)
    inner = model.new_cache(second, outer, is_prefix=source.random() < 0.8)
    prefixes = [None, outer, outer, outer, inner, inner]
    caches = [outer, inner, *(model.new_cache(len(texts[place]), prefixes[place]) for place in range(2, 6))]
    while not all(cache.is_full for cache in caches):
        segments, wanted, lengths = [], [], {}
        for place, cache in enumerate(caches):
            before = cache.prefix
            is_ready = before is None or lengths.get(before, before.length) == before.capacity
            if cache.is_full or not is_ready or source.random() < 0.3:
                continue
            left = cache.capacity - cache.length
            count = source.choice([left, source.randint(1, left)])
            segments.append(Segment(texts[place][cache.length : cache.length + count], cache, count))
            wanted.append(alone[place][cache.length : cache.length + count])
            lengths[cache] = cache.length + count
        for logits, expected in zip(model.forward_all(segments) if segments else [], wanted, strict=True):
            assert torch.equal(logits, expected)
    whole = model.new_cache(len(texts[5]))
    model.forward(texts[5], whole)
    for begin, end in ((0, len(texts[5])), (first - 1, second + 1), (second, second + 1), (0, 1)):
        assert torch.equal(caches[5].stored(begin, end), whole.stored(begin, end))


@pytest.fixture
def shared(prepared) -> tuple[Model, KVCache, KVCache]:
    model = runner.load(prepared()[1])
    prefix = model.new_cache(13, is_prefix=True)
    return model, prefix, model.new_cache(30, prefix)


def test_a_prefix_takes_no_memory_twice(shared: tuple[Model, KVCache, KVCache]) -> None:
    model, prefix, cache = shared
    whole = KVCache.nbytes(model.weights.model, 30, model.weights.dtype)
    held = [block.keys.nbytes + block.values.nbytes for each in (prefix, cache) for block in each.blocks]
    assert sum(held) == whole
    assert prefix.positions + cache.positions == 32
    assert (cache.start, cache.length, cache.chain) == (13, 13, (prefix, cache))


def test_a_prefix_must_be_full(shared: tuple[Model, KVCache, KVCache]) -> None:
    model, prefix, cache = shared
    for segments in (
        [Segment([5], cache)],
        [Segment(tokens(12, 1), prefix), Segment([5], cache)],
        [Segment([5], cache), Segment(tokens(13, 1), prefix)],
    ):
        with pytest.raises(ValueError, match="must be full"):
            model.forward_all(segments)
    model.forward_all([Segment(tokens(13, 1), prefix), Segment([5], cache)])
    assert (prefix.length, cache.length) == (13, 14)
    with pytest.raises(ValueError, match="cannot go back to 12"):
        cache.rewind(12)
    cache.rewind(13)


def test_an_interrupted_pass_leaves_prefixes_as_they_were(shared: tuple[Model, KVCache, KVCache]) -> None:
    model, prefix, cache = shared

    def interrupt(part: int, parts: int) -> None:
        raise KeyboardInterrupt

    ids = tokens(30, 1)
    segments = [Segment(ids[:13], prefix), Segment(ids[13:], cache, 17)]
    with pytest.raises(KeyboardInterrupt):
        model.forward_all(segments, interrupt)
    assert (prefix.length, cache.length) == (0, 13)
    assert not any(
        block.keys.any() or block.values.any() for each in (prefix, cache) for block in each.blocks
    )
    expected = model.forward(ids, model.cache(30), all_rows=True)
    assert torch.equal(model.forward_all(segments)[1], expected[13:])

"""One pass, and generation: cached against uncached, where it stops, what it counts and refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runner
from runner import BloomdeskError


@pytest.fixture(scope="module")
def model(prepared):
    return runner.load(prepared()[1])


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_cached_passes_give_what_one_pass_gives(prepared, data: st.DataObject) -> None:
    model = runner.load(prepared(dtype=data.draw(st.sampled_from(["bfloat16", "float16", "float32"])))[1])
    count = data.draw(st.integers(1, 48))
    ids = torch.randint(4, 1200, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    whole = model.forward(ids, model.cache(count), all_rows=True)
    cuts = sorted(data.draw(st.sets(st.integers(1, count), max_size=12)) | {0, count})
    cache = model.cache(count + data.draw(st.integers(0, 30)))
    chunks = [model.forward(ids[first:last], cache, all_rows=True) for first, last in pairwise(cuts)]
    assert torch.equal(torch.cat(chunks), whole)
    assert cache.length == count
    assert torch.equal(model.forward(ids, model.cache(count)), whole[-1:])


def test_cached_tokens_are_the_uncached_ones(prepared) -> None:
    model = runner.load(prepared(dtype="float32")[1])
    cached = list(model.generate([5, 6, 7], max_new_tokens=24))
    ids = [5, 6, 7]
    for token in cached:
        assert int(model.forward(ids, model.cache(len(ids))).argmax()) == token
        ids.append(token)
    assert len(set(cached)) > 4


def test_a_model_shows_itself_in_one_line(model) -> None:
    assert re.fullmatch(r"<BLOOM of 3 blocks of width \d+ in \S+ GB of RAM>", repr(model))


def test_a_cache_that_is_too_small_is_refused(model) -> None:
    with pytest.raises(ValueError, match="5 positions do not fit a cache of 4"):
        model.forward([5, 6, 7, 8, 9], model.cache(4))


def test_generation_counts_and_stops_at_the_limit(prepared) -> None:
    model = runner.load(prepared()[1])
    parts = []
    generation = model.generate([5, 6, 7], max_new_tokens=4, on_part=lambda *done: parts.append(done))
    assert generation.stop_reason is None
    ids = list(generation)
    assert (generation.stop_reason, generation.passes, generation.ids) == ("length", 4, ids)
    assert generation.bytes_read == sum(chunk.nbytes for chunk in model.weights.stream.chunks)  # all resident
    assert parts == [(done, 5) for done in (2, 3, 4, 5)] * 4  # the embedding, 3 blocks and the head
    assert next(generation, None) is None


def test_generation_stops_at_the_end_of_text(model) -> None:
    ids = list(model.generate([5, 6, 7], max_new_tokens=3))
    hyperparameters = replace(model.weights.model, eos_token_id=ids[2])
    ending = replace(model, weights=replace(model.weights, model=hyperparameters))
    generation = ending.generate([5, 6, 7], max_new_tokens=9)
    assert list(generation) == ids
    assert (generation.stop_reason, generation.passes) == ("eos", 3)


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 4, "the prompt has no tokens"),
        ([], 4, "the prompt has no tokens"),
        ([5, 1200], 4, "token id 1200 is outside the vocabulary of 1,200"),
        ([-1], 4, "token id -1 is outside"),
        ([5], 0, "must be at least 1, found 0"),
        ("\udcff", 4, "not valid UTF-8"),
    ],
)
def test_unusable_requests_are_refused(model, prompt, tokens: int, message: str) -> None:
    with pytest.raises(BloomdeskError, match=message):
        model.generate(prompt, max_new_tokens=tokens)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="counts anonymous memory as Linux shows it"
)
def test_the_embedding_is_never_copied(prepared) -> None:
    directory = prepared(vocab_size=200_000, blocks=1, hidden_size=192)[1]  # 77 MB
    model = runner.load(directory)
    list(model.generate([5, 6], max_new_tokens=1))
    before = _anonymous_bytes()
    list(model.generate([7, 8], max_new_tokens=3))
    assert _anonymous_bytes() - before < 20e6


def _anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

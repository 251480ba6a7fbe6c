"""A batch that stays: whoever comes and goes, each text is that of its own run, and scores are the scorer's."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

import runner
from runner import BloomdeskError
from runner.generation import memory_plan
from runner.generation.live_batch import LiveBatch
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from runner.generation.scorer import Text
from runner.generation.sequence import Request, Restored, Sequence
from tests.support.prompts import plain, tokens


@pytest.fixture(scope="module")
def model(prepared) -> Iterator[Model]:
    return runner.load(prepared()[1])


def run(batch: LiveBatch) -> list[Sequence]:
    finished = []
    while batch.active or batch.waiting or batch.giving_way:
        finished += batch.step()
    return finished


def test_sequences_join_and_leave_between_passes_and_have_the_tokens_of_their_own_run(model: Model) -> None:
    source, batch = random.Random(4), model.live_batch(GenerationOptions())
    requests = [Request(tokens(source.randint(1, 30), seed), source.randint(1, 20)) for seed in range(24)]
    waiting, found = list(requests), {}
    while waiting or batch.active or batch.waiting:
        for _ in range(source.randint(0, 3)):
            if waiting:
                request = waiting.pop(0)
                found[batch.add(request)] = request
        if batch.active or batch.waiting:
            batch.step()
    assert {tuple(each.ids) for each in found} == {tuple(ids) for ids in plain(model, requests)}
    assert [each.ids for each in found] == plain(model, requests)


def test_a_dropped_sequence_leaves_the_others_as_they_are(model: Model) -> None:
    batch = model.live_batch(GenerationOptions())
    stays, goes = (batch.add(Request(tokens(9, seed), 12)) for seed in (1, 2))
    batch.step()
    batch.drop(goes)
    late = batch.add(Request(tokens(5, 3), 6))
    run(batch)
    assert [stays.ids, late.ids] == plain(model, [stays.request, late.request])
    assert goes.stop_reason is None and goes.cache is None


def test_one_that_waits_can_be_dropped(model: Model) -> None:
    batch = model.live_batch(GenerationOptions(batch=1))
    first, second = (batch.add(Request(tokens(4, seed), 3)) for seed in (1, 2))
    batch.step()
    batch.drop(second)
    assert run(batch) == [first]


def test_no_more_than_the_limit_are_active(model: Model) -> None:
    batch, most = model.live_batch(GenerationOptions(batch=3)), 0
    for seed in range(8):
        batch.add(Request(tokens(4, seed), 5))
    while batch.active or batch.waiting:
        batch.step()
        most = max(most, len(batch.active))
    assert most == 3


def test_those_that_join_together_share_what_they_begin_with(model: Model) -> None:
    batch, common = model.live_batch(GenerationOptions()), tokens(50, 1)
    requests = [Request([*common, *tokens(3, seed)], 4) for seed in (2, 3, 4)]
    found = [batch.add(request) for request in requests]
    batch.step()
    assert {each.cache.start for each in found} == {50}
    assert batch.plan.request.positions < 2 * 64 + 50
    later = batch.add(requests[0])
    run(batch)
    assert [each.ids for each in (*found, later)] == plain(model, [*requests, requests[0]])


@pytest.mark.parametrize("size", [1, 2, 40])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_a_prompt_is_scored_as_the_scorer_does_it_in_company(model: Model, size: int, new: int) -> None:
    if size == 1 and not new:
        return
    batch, ids = model.live_batch(GenerationOptions()), tokens(size, 7)
    batch.add(Request(tokens(12, 8), 9))
    batch.step()
    scored = batch.add(Request(ids, new, Sampling(logprobs=2), scores_prompt=True))
    run(batch)
    text = [*ids, *scored.ids]
    (expected,) = model.scorer([Text(0, text, 1)]).run()
    found = [*scored.prompt_scores, *scored.scores]
    assert [(each.token, each.logprob, each.top[0]) for each in found] == [
        (each.token, each.logprob, each.top[0]) for each in expected.scores
    ]
    assert scored.stop_reason == "length" and len(scored.ids) == new


def test_scores_do_not_depend_on_how_a_prompt_is_cut(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(40, 9)
    whole = model.live_batch(GenerationOptions())
    one = whole.add(Request(ids, 2, Sampling(logprobs=1), scores_prompt=True))
    run(whole)
    # As if logits of more than three rows had no room.
    monkeypatch.setattr(memory_plan, "activation_bytes", lambda *given: 2**50 * (given[-1] > 3))
    cut = model.live_batch(GenerationOptions(speculate="off"))
    other = cut.add(Request(ids, 2, Sampling(logprobs=1), scores_prompt=True))
    run(cut)
    assert other.passes > one.passes
    assert (other.prompt_scores, other.scores) == (one.prompt_scores, one.scores)


def test_what_can_never_fit_is_refused_with_the_figures(prepared) -> None:
    directory = prepared()[1]
    need = runner.load(directory).memory_plan(64, 64).request
    model = runner.load(directory, need.ram - need.spare + need.least_weights)
    batch = model.live_batch(GenerationOptions())
    batch.check(Request(tokens(9, 1), 8))
    with pytest.raises(BloomdeskError, match=r"of RAM are too little: .* the KV cache"):
        batch.check(Request(tokens(9, 1), 200_000))


def test_in_little_ram_they_wait_for_each_other_and_all_come_through(prepared) -> None:
    """The weights are streamed, and caches take turns."""
    directory = prepared()[1]
    large = runner.load(directory)
    need = large.memory_request([64, 64], 64)
    ram = need.ram - need.spare + need.least_weights
    model = runner.load(directory, ram)
    batch = model.live_batch(GenerationOptions())
    requests = [Request(tokens(20, seed), 30) for seed in range(6)]
    found, most = [batch.add(request) for request in requests], 0
    while batch.active or batch.waiting:
        batch.step()
        most = max(most, len(batch.active))
        assert batch.plan.request.spare >= 0
    assert 1 <= most < 6
    assert [each.ids for each in found] == plain(large, requests)


def test_one_that_gives_way_makes_room_at_once_and_goes_on_later(model: Model) -> None:
    batch = model.live_batch(GenerationOptions(batch=1))
    patient = batch.add(Request(tokens(6, 1), 9, gives_way=True))
    for _ in range(3):
        batch.step()
    eager = batch.add(Request(tokens(4, 2), 2))
    assert batch.step() == [] and batch.active == [eager] and patient.cache is None
    assert run(batch) == [eager, patient]
    assert [patient.ids, eager.ids] == plain(model, [patient.request, eager.request])


def test_those_that_give_way_join_after_all_others_and_have_the_tokens_of_their_own_run(model: Model) -> None:
    source, batch = random.Random(5), model.live_batch(GenerationOptions(batch=2))
    sampling = Sampling(temperature=1.1, seed=3, logprobs=2)
    requests = [
        Request(tokens(source.randint(2, 30), seed), source.randint(1, 12), sampling, gives_way=seed % 3 > 0)
        for seed in range(15)
    ]
    waiting, found = list(requests), []
    while waiting or batch.active or batch.giving_way:
        if waiting and source.random() < 0.4:
            found.append(batch.add(waiting.pop(0)))
        if batch.active or batch.waiting or batch.giving_way:
            batch.step()
        assert not batch.waiting or not any(each.request.gives_way for each in batch.active)
    expected = [model.live_batch(GenerationOptions()) for _ in requests]
    for batch, request, each in zip(expected, requests, found, strict=True):
        alone = batch.add(request)
        run(batch)
        assert (each.ids, each.scores) == (alone.ids, alone.scores)


@pytest.mark.parametrize("passes", range(1, 7))
def test_what_an_earlier_run_came_to_is_not_done_again(model: Model, passes: int) -> None:
    sampling = Sampling(temperature=1.0, seed=9, logprobs=1)
    request = Request(tokens(12, 1), 6, sampling, scores_prompt=True)
    first = model.live_batch(GenerationOptions(speculate="off"))
    whole = first.add(request)
    for _ in range(passes):
        first.step()
    earlier = Restored(tuple(whole.ids), tuple(whole.scores), tuple(whole.prompt_scores))
    run(first)
    second = model.live_batch(GenerationOptions(speculate="off"))
    again = second.add(request, earlier)
    run(second)
    assert second.passes == 6 - len(earlier.ids)
    assert (again.ids, again.scores, again.prompt_scores) == (whole.ids, whole.scores, whole.prompt_scores)

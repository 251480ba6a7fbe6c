"""Constrained output: always valid, the same in any company, and what is forced costs no pass."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runner
from runner.generation.grammar import Grammar, Matcher
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from runner.generation.scorer import Text
from runner.generation.session_files import CACHE, SessionFiles
from scripts.torture.grammar import CASES, Case, torture

PROMPTS = ["John is 3 years", "SELECT name FROM", "le"]
IN_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    """Of random weights, with the miniature's tokenizer and rows without a token."""
    return runner.load(prepared()[1])


@pytest.fixture(scope="module")
def other(prepared) -> Path:
    """A smaller model of the same tokens."""
    return prepared(hidden_size=48, heads=3, blocks=1, seed=5)[1]


def chosen(grammar: Grammar, ids: list[int]) -> int:
    """Number of the tokens that were not forced."""
    matcher, count, place = grammar.matcher(), 0, 0
    while place < len(ids):
        forced = matcher.forced(ids[:place])
        count += not forced
        place += max(1, len(forced))
    return count


def test_drawn_outputs_are_valid_and_the_same_in_any_company(model: Model, other: Path) -> None:
    """Fewer of what `python -m scripts.torture.grammar` draws."""
    drawn, wrong = torture(model, other, 36, 1.5)
    assert wrong == [] and all(found.valid == found.outputs == 6 for found in drawn.values())


@IN_CASES
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_text_depends_on_nothing_else(
    model: Model, other: Path, tmp_path: Path, case: Case, temperature: float
) -> None:
    """Not on batch, n-grams, drafts (the model itself among them), log-probabilities, session or interruptions."""
    sampling = case.sampling(
        temperature=temperature, seed=7 if temperature else None, repetition_penalty=1.1, logit_bias={9: 1.0}
    )
    options = {"max_new_tokens": 150}
    alone = [
        list(model.generate(prompt, sampling=sampling, speculate="off", **options)) for prompt in PROMPTS[:1]
    ]
    directory = model.weights.stream.chunks[0].file.path.parent
    calls = []

    def interrupt(part: int, parts: int) -> None:
        calls.append(part)
        if len(calls) % 31 == 0:
            raise KeyboardInterrupt

    for given_options in (
        {},
        {"draft": other},
        {"draft": directory, "speculate": "off"},
        {"sampling": replace(sampling, logprobs=1)},
        {"session": tmp_path / "s", "on_part": interrupt},
    ):
        generation = None
        while generation is None or not generation.sequence.is_done:
            try:
                generation = model.generate(PROMPTS[0], **{"sampling": sampling, **options, **given_options})
                ids = list(generation)
            except KeyboardInterrupt:
                continue
        assert ids == alone[0] and case.is_valid(model.text(generation.sequence))
    requests = [
        model.requests(prompt, 150, replace(sampling, logprobs=place), number)[0]
        for number, (prompt, place) in enumerate(zip(PROMPTS, (None, 0, 2), strict=True))
    ]
    expected = [
        next(model.batch([request], GenerationOptions(speculate="off")).run()) for request in requests
    ]
    assert expected[0].ids == alone[0]
    for batch in (2, 3):
        found = model.batch(requests, GenerationOptions(batch=batch, draft=other)).run()
        found = sorted(found, key=lambda each: each.index)
        assert [(each.ids, each.scores) for each in found] == [(each.ids, each.scores) for each in expected]


@pytest.mark.parametrize("logprobs", [None, 1])
@IN_CASES
def test_an_interruption_anywhere_changes_no_token(
    model: Model, other: Path, monkeypatch: pytest.MonkeyPatch, case: Case, logprobs: int | None
) -> None:
    """Also between a token and what it forces, before and after each question to the grammar."""
    sampling = case.sampling(temperature=1.5, seed=11, logprobs=logprobs)
    options = {"max_new_tokens": 150, "sampling": sampling}
    whole = model.generate("le", speculate="off", **options)
    expected, source = list(whole), random.Random(1)

    def interrupted(function):
        def call(*given: object) -> object:
            if source.random() < 0.1:
                raise KeyboardInterrupt
            found = function(*given)
            if source.random() < 0.1:
                raise KeyboardInterrupt
            return found

        return call

    for name in ("forced", "is_over", "allowed"):
        monkeypatch.setattr(Matcher, name, interrupted(getattr(Matcher, name)))
    generation, count = model.generate("le", on_part=interrupted(lambda *_: None), draft=other, **options), 0
    while True:
        try:
            next(generation)
        except KeyboardInterrupt:
            count += 1
        except StopIteration:
            break
    found = generation.sequence
    assert generation.ids == found.ids == expected and count > 3
    assert (found.stop_reason, found.scores) == (whole.stop_reason, whole.sequence.scores)
    assert found.is_valid


@IN_CASES
def test_what_is_forced_costs_no_pass(model: Model, case: Case) -> None:
    sampling = case.sampling(temperature=1.0, seed=3)
    generation = model.generate("John is", max_new_tokens=150, sampling=sampling, speculate="off")
    ids = list(generation)
    assert generation.passes == chosen(model.grammars.of(case.sampling()), ids)
    if case.field == "json_schema":
        assert len(ids) > 3 * generation.passes


def test_a_text_that_is_forced_as_a_whole_needs_no_pass(model: Model) -> None:
    sampling = Sampling(regex="SELECT name FROM animals;")
    generation = model.generate("Q:", max_new_tokens=50, sampling=sampling)
    assert model.tokenizer.decode(list(generation)) == "SELECT name FROM animals;"
    assert generation.passes == 0 and generation.stop_reason == "grammar"
    found = list(model.generate_all(["Q:", "A:"] * 3, max_new_tokens=50, sampling=sampling, batch=2))
    assert [each.ids for each in found] == [generation.ids] * 6
    empty = model.generate("Q:", sampling=Sampling(regex=""))
    assert list(empty) == [] and empty.stop_reason == "grammar" and empty.sequence.is_valid


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_long_forced_runs_share_the_rows_of_a_pass(model: Model, rows: int) -> None:
    """With too few rows for them all, with and without log-probabilities, which are those of the scorer."""
    case = CASES[1]
    for logprobs in (None, 1):
        sampling = case.sampling(temperature=1.0, seed=3, logprobs=logprobs)
        requests = [model.requests("le", 150, sampling, number)[0] for number in range(3)]
        batch = model.batch(requests, GenerationOptions(speculate="off", batch=2))
        request = batch.plan.request
        assert request.rows > 50
        batch.plan = replace(batch.plan, request=replace(request, rows=rows, logit_rows=2))
        found = sorted(batch.run(), key=lambda each: each.index)
        assert found[0].ids == list(model.generate("le", max_new_tokens=150, sampling=sampling))
        texts = [Text(each.index, [*each.prompt_ids, *each.ids], len(each.prompt_ids)) for each in found]
        scored = {done.text.index: done.scores for done in model.scorer(texts).run()}
        for each in found:
            assert case.is_valid(model.text(each))
            expected = [score.logprob for score in scored[each.index]] if logprobs else []
            assert [score.logprob for score in each.scores] == expected


def test_a_session_cut_anywhere_goes_on_to_the_same_text(model: Model, tmp_path: Path) -> None:
    for logprobs in (None, 1):
        directory, source = tmp_path / str(logprobs), random.Random(5)
        sampling = CASES[1].sampling(temperature=1.2, seed=9, logprobs=logprobs)

        def text(new: int = 150, sampling: Sampling = sampling, directory: Path = directory):
            generation = model.generate("John is", max_new_tokens=new, sampling=sampling, session=directory)
            return list(generation), generation.sequence.scores, generation.passes

        whole = text()
        assert text() == (*whole[:2], 0)
        data = (directory / CACHE).read_bytes()
        for _ in range(8):
            (directory / CACHE).write_bytes(data[: source.randrange(len(data))])
            new = source.randrange(1, len(whole[0]))
            assert text(new)[:2] == (whole[0][:new], whole[1][:new])
            assert text()[:2] == whole[:2]
        other = CASES[0].sampling(temperature=1.2, seed=9, logprobs=logprobs)
        assert text(sampling=other)[:2] == text(sampling=other, directory=None)[:2] != whole[:2]
        options = SessionFiles.load(directory).request.options
        assert options["json_schema"] == other.json_schema and "regex" not in options


def test_sessions_without_a_constraint_are_those_of_before(model: Model, tmp_path: Path) -> None:
    list(model.generate("John", max_new_tokens=2, session=tmp_path))
    assert not {"json_schema", "regex", "grammar"} & set(SessionFiles.load(tmp_path).request.options)


# Ends.


def test_a_limit_may_cut_the_output_and_it_is_said(model: Model) -> None:
    sampling = CASES[0].sampling()
    whole = model.generate("John is", max_new_tokens=150, sampling=sampling)
    ids = list(whole)
    assert (whole.stop_reason, whole.sequence.is_valid) == ("grammar", True)
    exact = model.generate("John is", max_new_tokens=len(ids), sampling=sampling)
    assert list(exact) == ids and (exact.stop_reason, exact.sequence.is_valid) == ("grammar", True)
    for count in (1, 2, 5, len(ids) - 1):
        cut = model.generate("John is", max_new_tokens=count, sampling=sampling)
        assert list(cut) == ids[:count]
        assert (cut.stop_reason, cut.sequence.is_valid) == ("length", False)
    open_end = model.generate("1", max_new_tokens=3, sampling=Sampling(regex="[0-9]+", min_new_tokens=3))
    assert len(list(open_end)) == 3 and (open_end.stop_reason, open_end.sequence.is_valid) == ("length", True)


def test_the_text_ends_only_where_it_may(model: Model) -> None:
    likely = {"logit_bias": {2: 1000.0}}
    found = model.generate("1", max_new_tokens=20, sampling=Sampling(regex="[0-9]{4,}", **likely))
    ids = list(found)
    assert re.fullmatch("[0-9]{4,}", model.text(found.sequence)) and ids[-1] == 2
    assert found.stop_reason == "eos"
    later = Sampling(regex="[0-9]{2,}", min_new_tokens=6, **likely)
    ids = list(model.generate("1", max_new_tokens=20, sampling=later))
    assert len(ids) == 7 and ids[-1] == 2
    # A grammar's end comes first.
    short = model.generate("1", max_new_tokens=20, sampling=Sampling(regex="[0-9]{2}", min_new_tokens=6))
    assert len(list(short)) <= 2 and short.stop_reason == "grammar"


def test_an_end_in_the_middle_of_a_grammar_is_not_taken_for_its_own(model: Model) -> None:
    found = model.generate("1", sampling=Sampling(grammar='start: "a" <[2]> "b"'))
    assert list(found)[-1] == 2 and (found.stop_reason, found.sequence.is_valid) == ("eos", False)


def test_a_stop_text_cuts_as_it_does_without_a_grammar(model: Model) -> None:
    for stop, is_valid in (('"age"', False), (' "ta', False), ("]", False), ("nowhere", True)):
        sampling = CASES[0].sampling(stop=(stop,))
        texts = set()
        for speculate in ("lookup", "off"):
            found = model.generate("John is", max_new_tokens=150, sampling=sampling, speculate=speculate)
            list(found)
            assert found.sequence.is_valid == is_valid
            assert found.stop_reason == ("grammar" if is_valid else "stop")
            texts.add(model.text(found.sequence))
        (text,) = texts
        assert stop not in text
    found = model.generate("1", sampling=Sampling(regex="(yes){1,3}!", stop=("!",)))
    list(found)
    assert found.stop_reason == "stop" and not found.sequence.is_valid
    found = model.generate("1", sampling=Sampling(regex="(yes )+no", stop=(" no",)))
    list(found)
    assert found.stop_reason in ("stop", "length") and not found.sequence.is_valid


def test_top_k_is_taken_among_the_allowed_tokens(model: Model) -> None:
    sampling = CASES[2].sampling(temperature=2.0, top_k=1, seed=1)
    greedy = list(model.generate("x", sampling=CASES[2].sampling()))
    assert list(model.generate("x", sampling=sampling)) == greedy


def test_log_probabilities_are_the_models_own(model: Model) -> None:
    generation = model.generate("x", sampling=CASES[2].sampling(logprobs=2), speculate="off")
    ids, scores = list(generation), generation.sequence.scores
    logits = model.forward([*generation.prompt_ids, *ids], model.cache(40), all_rows=True).float()
    rows = torch.log_softmax(logits[len(generation.prompt_ids) - 1 :], 1)
    assert [each.token for each in scores] == ids
    for row, each in zip(rows, scores, strict=False):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-3)
        assert len(each.top) == 2 and each.top[0][1] == pytest.approx(float(row.max()), abs=1e-3)

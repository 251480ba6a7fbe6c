"""Another form of the model drafts for it: in its KV cache, with its noise, and without changing a token."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import runner
from runner import BloomdeskError
from runner.cli.generate import setup_line
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.quantised import INT4_FORM, INT8_FORM
from runner.generation.live_batch import LiveBatch
from runner.generation.model import Model
from runner.generation.options import GREEDY, GenerationOptions, Sampling
from runner.generation.sequence import Request, Sequence
from runner.generation.speculation.draft_model import DraftModel
from runner.model.forward import ModelRunner
from runner.model.kv_cache import KVCache, Segment
from scripts.torture.grammar import CASES, torture
from tests.support.lossless import flip, make
from tests.support.prompts import batched, tokens
from toolkit.commands.convert import convert

DRAWN = Sampling(temperature=1.0, seed=3, repetition_penalty=1.1, ignore_eos=True)
SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
FORMS = (PLAIN, LOSSLESS, INT8_FORM, INT4_FORM)
Forms = Callable[..., Path]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """`forms(form)` is the directory of that form of one model of random weights."""
    base = tmp_path_factory.mktemp("forms")

    def of(form: str, seed: int = 0) -> Path:
        source, out = base / f"source {seed}", base / f"{form} {seed}"
        if not source.exists():
            make(source, hidden_size=48, heads=6, vocab_size=1200, seed=seed)
        if not out.exists():
            convert(source, out, form=form)
        return out

    return of


@pytest.fixture(scope="module")
def alone(forms: Forms) -> Callable[..., list[list[int]]]:
    """The tokens of REQUESTS with each form, one row at a time."""
    made: dict[tuple, list[list[int]]] = {}

    def of(form: str, sampling: Sampling) -> list[list[int]]:
        key = form, sampling.seed
        if key not in made:
            model = runner.load(forms(form))
            made[key] = [run(batched(model, [each], 1, "off"))[0] for each in requests(sampling)]
        return made[key]

    return of


def requests(sampling: Sampling) -> list[Request]:
    lengths = ((3, 14), (20, 3), (9, 22), (1, 1), (30, 9))
    return [
        Request(tokens(count, count), new, replace(sampling), number)
        for number, (count, new) in enumerate(lengths)
    ]


def run(batch: object) -> list[list[int]]:
    return [each.ids for each in sorted(batch.run(), key=lambda each: each.index)]


def draft_passes(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[list[int]]:
    """The rows of each segment of each pass that is not the model's own, from now on."""
    passes, forward_all = [], ModelRunner.forward_all

    def noted(self: ModelRunner, segments: list[Segment], *given: object) -> object:
        if self is not model:
            passes.append([len(segment.ids) for segment in segments])
        return forward_all(self, segments, *given)

    monkeypatch.setattr(ModelRunner, "forward_all", noted)
    return passes


@pytest.mark.slow
@SAMPLINGS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("draft", [PLAIN, INT8_FORM, INT4_FORM])
def test_no_form_of_the_model_changes_a_token(
    forms: Forms, alone, free, kept, form: str, draft: str, sampling: Sampling
) -> None:
    model = runner.load(forms(form))
    for batch in (1, 3):
        running = batched(model, requests(sampling), batch, "off", forms(draft))
        assert running.proposer.draft.is_form
        assert "another form of the same model, which shares its KV cache" in setup_line(running)
        assert run(running) == alone(form, sampling)
        assert running.proposed > 20 and running.accepted > 0


@SAMPLINGS
def test_the_same_weights_are_always_right(forms: Forms, alone, free, sampling: Sampling) -> None:
    """The lossless form computes with the plain one's weights, and shares exact keys and values."""
    for form, draft in ((LOSSLESS, PLAIN), (PLAIN, LOSSLESS)):
        running = batched(runner.load(forms(form)), requests(sampling), 3, "off", forms(draft))
        assert run(running) == alone(form, sampling)
        assert running.proposed == running.accepted > 20


def test_it_reads_no_prompt_and_has_no_cache_of_its_own(
    forms: Forms, free, kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, caches, init = runner.load(forms(PLAIN)), [], KVCache.__init__

    def noted(self: KVCache, *given: object, **more: object) -> None:
        caches.append(self)
        init(self, *given, **more)

    monkeypatch.setattr(KVCache, "__init__", noted)
    passes = draft_passes(monkeypatch, model)
    prompts = [Request(tokens(40 + place, place), 12, DRAWN) for place in range(3)]
    running = batched(model, prompts, 3, "off", forms(INT4_FORM))
    run(running)
    assert len(caches) == 3 and passes
    # One pass carries the last token of each.
    assert {count for rows in passes for count in rows} == {1} and max(map(len, passes)) == 3


def test_it_takes_no_ram_but_that_of_its_matrices(forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner.load(forms(PLAIN))
    draft = DraftModel.open(forms(INT4_FORM), model.weights, model.tokenizer)
    ordinary = DraftModel.open(forms(PLAIN, seed=1), model.weights, model.tokenizer)
    assert draft.is_form and not ordinary.is_form
    monkeypatch.setattr("runner.generation.speculation.draft_model.activation_bytes", lambda *_: 0)
    assert draft.nbytes(1, 8) == draft.nbytes(16, 4000) >= draft.weight_bytes
    assert ordinary.nbytes(16, 4000) > 16 * ordinary.nbytes(1, 8) // 2
    own, shared = draft.model.weights, model.weights
    pairs = zip((own.embedding, own.final_layernorm, *own.blocks),
                (shared.embedding, shared.final_layernorm, *shared.blocks), strict=True)  # fmt: skip
    for part, others in pairs:
        assert part.vectors is others.vectors and part.matrices is not others.matrices


@SAMPLINGS
def test_the_draft_stays_in_ram_while_the_model_is_streamed(
    forms: Forms, alone, free, kept, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    monkeypatch.setattr("runner.weights.chunks.LARGEST_CHUNK", 20_000)
    model = runner.load(forms(LOSSLESS))
    whole = batched(model, requests(sampling), 3, "off", forms(INT4_FORM)).plan
    running, model = None, replace(model, ram=model.ram - whole.unused)
    while running is None or not running.plan.streamed_bytes:
        model = replace(model, ram=model.ram - 50_000)
        running = batched(model, requests(sampling), 3, "off", forms(INT4_FORM))
    assert running.plan.request.draft >= running.proposer.draft.weight_bytes
    assert run(running) == alone(LOSSLESS, sampling)
    assert running.proposer.draft.model.weights.stream.streamed_bytes == 0


def interrupting(monkeypatch: pytest.MonkeyPatch, model: Model, chance: float) -> None:
    """Interrupt passes of drafts at random, before them, in them and after them."""
    forward_all, source = ModelRunner.forward_all, random.Random(2)

    def interrupted(self: ModelRunner, segments: list[Segment], on_part: object = None) -> object:
        if self is model:
            return forward_all(self, segments, on_part)
        moment, parts = source.random() / chance, []

        def interrupt(*_: object) -> None:
            parts.append(1)
            if len(parts) == 2 and moment < 1:
                raise KeyboardInterrupt

        found = forward_all(self, segments, interrupt)
        if moment < 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(ModelRunner, "forward_all", interrupted)


@SAMPLINGS
def test_an_interruption_while_drafting_changes_nothing(
    forms: Forms, alone, free, kept, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    model = runner.load(forms(PLAIN))
    wanted = alone(PLAIN, sampling)
    interrupting(monkeypatch, model, 0.05)
    running = batched(model, requests(sampling), 3, "off", forms(INT4_FORM))
    found, count = {}, 0
    while running.active or running.waiting:
        lengths = {each: each.cache.length for each in running.active}
        try:
            found |= {each.index: each.ids for each in running.step()}
        except KeyboardInterrupt:
            count += 1
            assert {each: each.cache.length for each in lengths} == lengths
    assert [found[index] for index in range(5)] == wanted
    assert count > 2


def test_the_model_replaces_all_that_was_guessed(
    forms: Forms, free, kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each pass the cache has the bits that it has without a draft, with zeros behind them."""
    model, forward_all = runner.load(forms(PLAIN)), ModelRunner.forward_all
    interrupting(monkeypatch, model, 0.1)
    request = Request(tokens(9, 1), 20, DRAWN)
    running = batched(model, [request], 1, "off", forms(INT4_FORM))
    while running.active or running.waiting:
        try:
            running.step()
        except KeyboardInterrupt:
            continue
        if not running.active:
            break
        (each,) = running.active
        expected = model.new_cache(request.capacity)
        forward_all(model, [Segment(each.text[: each.cache.length], expected)])
        for own, other in zip(each.cache.blocks, expected.blocks, strict=True):
            assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)
    assert running.proposed > 5


def test_guesses_that_are_no_numbers_do_no_harm(forms: Forms) -> None:
    """0 times NaN is none, so an interrupted draft must leave nothing to the next pass."""
    model = runner.load(forms(PLAIN))
    whole, cache = model.new_cache(20), model.new_cache(20)
    for each in (whole, cache):
        model.forward(tokens(9, 1), each)
    draft = cache.for_guesses(5)
    for block in draft.blocks:
        block.keys[:, 9:14] = block.values[:, :, 9:14] = torch.nan
    assert cache.length == 9 and cache.first_unsound_block() == 0
    assert torch.equal(model.forward([7], cache), model.forward([7], whole))
    assert cache.first_unsound_block() is None
    # A draft that goes on after one that was interrupted meets nothing of it either.
    for block in cache.for_guesses(5).blocks:
        block.keys[:, 10:14] = block.values[:, :, 10:14] = torch.nan
    assert model.forward([8], cache.for_guesses(3)).isfinite().all()


@pytest.mark.slow
def test_a_trained_model_accepts_most_of_what_its_int4_form_drafts(
    miniature: tuple[Path, Path], free, tmp_path: Path
) -> None:
    convert(miniature[1], tmp_path / "int4", form=INT4_FORM)
    model = runner.load(miniature[1])
    prompt = "The SQL command to list all the books whose year is 1999 is:"
    for sampling in (GREEDY, replace(DRAWN, repetition_penalty=1.0)):
        options = {"max_new_tokens": 30, "sampling": sampling, "speculate": "off"}
        ids = list(model.generate(prompt, **options))
        generation = model.generate(prompt, draft=tmp_path / "int4", **options)
        assert list(generation) == ids
        assert generation.accepted > 0.6 * generation.proposed
        assert generation.passes < len(ids) / 2


def test_constrained_outputs_stay_what_they_are(forms: Forms, free, kept) -> None:
    drawn, wrong = torture(runner.load(forms(PLAIN)), forms(INT4_FORM), 12, 1.5)
    assert wrong == [] and all(found.valid == found.outputs == 2 for found in drawn.values())


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_interruption_among_forced_tokens_changes_nothing(
    forms: Forms, free, kept, monkeypatch: pytest.MonkeyPatch, logprobs: int | None
) -> None:
    """Several rows are unread then, so that guesses stand where committed tokens belong."""
    model = runner.load(forms(PLAIN))
    count = 0
    for case in CASES:
        options = {"max_new_tokens": 60, "sampling": case.sampling(temperature=1.5, seed=11)}
        options["sampling"] = replace(options["sampling"], logprobs=logprobs)
        whole = model.generate("le", speculate="off", **options)
        expected = list(whole)
        with monkeypatch.context() as patch:
            interrupting(patch, model, 0.1)
            generation = model.generate("le", speculate="off", draft=forms(INT4_FORM), **options)
            while not generation.sequence.is_done:
                try:
                    generation.step()
                except KeyboardInterrupt:
                    count += 1
        assert generation.sequence.ids == expected
        assert generation.sequence.scores == whole.sequence.scores
    assert count > 5


def test_a_session_that_is_killed_goes_on(forms: Forms, free, kept, tmp_path: Path) -> None:
    """With another form as the draft each time, and none."""
    options = {"max_new_tokens": 60, "sampling": replace(DRAWN, logprobs=1)}
    whole = runner.load(forms(LOSSLESS)).generate(tokens(9, 2), **options)
    expected, calls, kills = list(whole), [], 0

    def kill(part: int, parts: int) -> None:
        calls.append(part)
        if len(calls) % 7 == 0:
            raise KeyboardInterrupt

    for draft in [forms(INT4_FORM), forms(PLAIN), None, forms(INT8_FORM)] * 20:
        model = runner.load(forms(LOSSLESS))
        try:
            again = model.generate(
                tokens(9, 2), draft=draft, session=tmp_path / "session", on_part=kill, **options
            )
            ids = list(again)
            break
        except KeyboardInterrupt:
            kills += 1
    assert ids == expected and again.sequence.scores == whole.sequence.scores and kills > 1


def test_choices_and_shared_beginnings_stay_what_they_are(forms: Forms, free, kept) -> None:
    model, common = runner.load(forms(PLAIN)), tokens(50, 1)
    prompts = [[*common, *tokens(3 + seed, seed)] for seed in range(3)]
    options = {"max_new_tokens": 12, "speculate": "off"}
    sampling = replace(DRAWN, n=2)
    wanted = list(model.generate_all(prompts, sampling=sampling, batch=1, **options))
    found = list(model.generate_all(prompts, sampling=sampling, batch=4, draft=forms(INT4_FORM), **options))
    assert texts(found) == texts(wanted) and len(found) == 6
    assert sum(each.proposed for each in found) > 20


def texts(found: list[Sequence]) -> dict[tuple[int, int], list[int]]:
    return {(each.request.number, each.request.choice): each.ids for each in found}


def test_a_batch_that_stays_gives_the_same(forms: Forms, alone, free, kept) -> None:
    """Who joins late, leaves, or gives way and comes back finds nothing of others' guesses."""
    model = runner.load(forms(LOSSLESS))
    batch = model.live_batch(GenerationOptions(speculate="off", draft=forms(INT4_FORM), batch=2))
    wanted = [replace(each, gives_way=place % 2 == 0) for place, each in enumerate(requests(DRAWN))]
    added = []
    for request in wanted:
        added.append(batch.add(request))
        dropped = batch.add(Request(tokens(5, 5), 20))
        batch.step()
        batch.drop(dropped)
    for _ in drained(batch):
        pass
    assert [each.ids for each in added] == alone(LOSSLESS, DRAWN)
    assert batch.proposer.draft.readings == {}


def drained(batch: LiveBatch) -> Iterator[None]:
    while batch.active or batch.waiting or batch.giving_way:
        batch.step()
        yield


def test_other_weights_are_an_ordinary_draft(forms: Forms, alone, free, kept) -> None:
    """As large, with the same tokenizer, and in each form."""
    model = runner.load(forms(PLAIN))
    for form in (PLAIN, INT4_FORM):
        running = batched(model, requests(GREEDY), 3, "off", forms(form, seed=1))
        assert not running.proposer.draft.is_form
        assert "another form of the same model" not in setup_line(running)
        assert run(running) == alone(PLAIN, GREEDY) and running.proposed > 20


def test_forms_that_are_spread_over_disks_draft_too(forms: Forms, alone, free, kept, tmp_path: Path) -> None:
    source = forms(PLAIN)
    for form in (LOSSLESS, INT4_FORM):
        convert(source, tmp_path / form, form=form, also=[tmp_path / f"{form} 2"])
    for form, draft in ((tmp_path / LOSSLESS, forms(INT4_FORM)), (source, tmp_path / INT4_FORM)):
        running = batched(runner.load(form), requests(DRAWN), 3, "off", draft)
        assert running.proposer.draft.is_form and run(running) == alone(PLAIN, DRAWN)


def test_weights_of_unknown_source_are_no_form(forms: Forms) -> None:
    unknown = replace(runner.load(forms(PLAIN)).weights, model_identity="")
    assert not unknown.is_form_of(unknown)


def test_one_that_was_edited_is_none(forms: Forms, tmp_path: Path) -> None:
    """Its manifest says what it was made from, and itself whether anybody changed that."""
    model = runner.load(forms(PLAIN))
    draft = Path(shutil.copytree(forms(INT4_FORM, seed=1), tmp_path / "draft"))
    body = json.loads((draft / "manifest.json").read_text())
    body["source_fingerprint"] = model.weights.model_identity
    (draft / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(BloomdeskError, match="its own checksum does not match"):
        model.generate([5], draft=draft)


@SAMPLINGS
def test_one_that_is_damaged_is_wrong_and_changes_nothing(
    forms: Forms, alone, free, kept, tmp_path: Path, sampling: Sampling
) -> None:
    model = runner.load(forms(PLAIN))
    draft = Path(shutil.copytree(forms(INT8_FORM), tmp_path / "draft"))
    path, source = draft / "block_01.safetensors", random.Random(1)
    size = path.stat().st_size
    for _ in range(200):
        flip(path, source.randrange(size // 2, size), 1 << source.randrange(8))
    running = batched(model, requests(sampling), 3, "off", draft)
    assert running.proposer.draft.is_form
    assert run(running) == alone(PLAIN, sampling) and running.accepted < running.proposed

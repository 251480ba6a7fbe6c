"""Draft models change no token, stay within their RAM, and are refused if they are unsuitable."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import runner
import runner.generation.speculation.draft_model
from runner import BloomdeskError
from runner.generation.memory_plan import MARGIN
from runner.generation.sequence import Request, Sequence
from runner.generation.speculation.draft_model import DraftModel
from runner.model.forward import ModelRunner
from scripts.fakehub import checkpoint as make_checkpoint
from tests.support.prompts import DTYPES, batched, plain, tokens
from toolkit.commands.convert import convert


@pytest.fixture
def other(prepared) -> Path:
    """A smaller model of the same tokens that says other things."""
    return prepared(hidden_size=48, heads=3, blocks=1, seed=5)[1]


REQUESTS = [Request(tokens(count, count), new) for count, new in ((3, 14), (20, 3), (9, 22), (1, 1), (30, 9))]


@pytest.mark.slow
@pytest.mark.parametrize("speculate", ["lookup", "off"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draft_changes_no_token(prepared, other: Path, free, kept, dtype: str, speculate: str) -> None:
    model = runner.load(prepared(dtype=dtype)[1])
    wanted = plain(model, REQUESTS)
    for batch in (1, 3, None):
        running = batched(model, REQUESTS, batch, speculate, other)
        found = {each.index: each.ids for each in running.run()}
        assert [found[index] for index in range(5)] == wanted
        assert running.proposed > 20 and running.drafting_seconds > 0
        shares = [each.drafting_seconds for each in running.sequences]
        assert sum(shares) == pytest.approx(running.drafting_seconds)


def test_a_model_is_always_right_about_itself(prepared, free) -> None:
    model = runner.load(prepared()[1])
    generation = model.generate([5, 6, 7], max_new_tokens=30, speculate="off", draft=prepared()[1])
    assert list(generation) == plain(model, [Request([5, 6, 7], 30)])[0]
    assert generation.proposed == generation.accepted > 20
    assert generation.passes == 30 - generation.accepted < 8


@pytest.mark.parametrize("most_rows", [1, 2, 5, 1000])
def test_it_proposes_what_its_model_generates_however_it_reads(
    prepared, other: Path, monkeypatch: pytest.MonkeyPatch, most_rows: int
) -> None:
    """With other sequences, in several passes, after a rewind, and after some steps without it."""
    monkeypatch.setattr(runner.generation.speculation.draft_model, "MOST_ROWS", most_rows)
    large, small = runner.load(prepared()[1]), runner.load(other)
    draft = DraftModel.open(other, large.weights, large.tokenizer)
    sequences = [Sequence(place, Request(tokens(4 + 3 * place, place), 40)) for place in range(3)]
    steps = [  # tokens that the large model then says, and who is asked for how many
        ((), (), (), (3, 0, 2)),
        ((7, 8), (9,), (), (1, 4, 0)),
        ((5,), (), (3, 3, 3), (6, 6, 6)),
        ((1100, 4), (9, 9, 9), (), (2, 5, 3)),
    ]
    for *said, counts in steps:
        for sequence, ids in zip(sequences, said, strict=True):
            sequence.ids.extend(ids)
        asked = [(sequence, count) for sequence, count in zip(sequences, counts, strict=True) if count]
        for (sequence, count), found in zip(asked, draft.propose(asked), strict=True):
            text = [*sequence.prompt_ids, *sequence.ids]
            wanted = list(small.generate(text, max_new_tokens=count, speculate="off"))
            assert found == wanted


def test_an_interruption_while_drafting_changes_nothing(
    prepared, other: Path, free, kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner.load(prepared()[1])
    wanted = plain(model, REQUESTS)
    running = batched(model, REQUESTS, 3, "off", other)
    forward_all, source = ModelRunner.forward_all, random.Random(2)

    def interrupted(self: ModelRunner, *given: object) -> object:
        chance = source.random() if self is not model else 1.0
        if chance < 0.04:
            raise KeyboardInterrupt
        found = forward_all(self, *given)
        if chance < 0.08:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(ModelRunner, "forward_all", interrupted)
    found, count = {}, 0
    while running.active or running.waiting:
        try:
            found |= {each.index: each.ids for each in running.step()}
        except KeyboardInterrupt:
            count += 1
    assert [found[index] for index in range(5)] == wanted
    assert count > 2


def test_a_useless_draft_model_is_given_up_for_resident_weights(
    prepared, other: Path, free, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.generation.memory_plan.MARGIN", 0)
    monkeypatch.setattr("runner.weights.chunks.LARGEST_CHUNK", 50_000)
    model = runner.load(prepared()[1])
    model = replace(model, ram=model.process_nbytes + 1_700_000)
    wanted = plain(model, [Request([5, 6, 7], 60)])[0]
    monkeypatch.setattr(DraftModel, "nbytes", lambda self, *_: 1_000_000)
    generation = model.generate([5, 6, 7], max_new_tokens=60, speculate="off", draft=other)
    before, stayed = generation.streamed_bytes_per_pass, generation.plan.resident
    assert before > 0 and generation.proposer.words == "draft"
    assert list(generation) == wanted
    assert generation.proposer.words == "off"
    assert generation.streamed_bytes_per_pass < before - 300_000
    assert generation.plan.request.draft == 0
    assert stayed and stayed < generation.plan.resident  # none is read anew
    assert generation.passes >= 16


def test_its_ram_is_in_the_memory_plan(prepared, other: Path) -> None:
    model = runner.load(prepared()[1])
    draft = DraftModel.open(other, model.weights, model.tokenizer)
    needs = draft.nbytes(2, 40)
    assert needs >= draft.weight_bytes + 2 * (draft.nbytes(2, 80) - draft.nbytes(2, 40)) // 5
    requests = [Request([5, 6, 7], 30)] * 2
    running = batched(replace(model, ram=2**40), requests, 2, "off", other)
    assert running.plan.request.draft >= draft.weight_bytes
    without = batched(replace(model, ram=2**40), requests, 2, "off")
    assert without.plan.request.draft == 0
    needs = without.plan.request
    tight = needs.process + needs.cache + needs.activations + MARGIN + without.plan.resident_bytes
    with pytest.raises(BloomdeskError, match=r"the draft [\d.]+ [kMG]B") as refused:
        batched(replace(model, ram=tight // 2), requests, 1, "off", other)
    assert "or without the draft" in refused.value.hint


def test_a_draft_model_with_other_tokens_is_refused(prepared, other: Path, tmp_path: Path) -> None:
    model = runner.load(prepared()[1])
    with pytest.raises(BloomdeskError, match=r"cannot draft: its tokenizer.json has other tokens"):
        model.generate([5], draft=prepared(vocab_size=300, hidden_size=64, heads=8)[1])
    draft = Path(shutil.copytree(other, tmp_path / "draft"))
    text = json.loads((draft / "tokenizer.json").read_text())
    (draft / "tokenizer.json").write_text(json.dumps(text, indent=3))  # other bytes, the same tokens
    assert list(model.generate([5, 6], max_new_tokens=4, draft=draft))
    (draft / "tokenizer.json").unlink()
    with pytest.raises(BloomdeskError, match="cannot be compared"):
        model.generate([5], draft=draft)


def test_a_draft_model_may_have_more_rows_than_tokens_but_not_fewer(prepared, tmp_path: Path, free) -> None:
    """An embedding has rows beyond the tokenizer's tokens; tokens that the large model lacks end the draft."""
    sizes = {"hidden_size": 48, "heads": 3, "blocks": 1}
    directories = {}
    for rows in (1100, 1200, 2400):
        source = tmp_path / f"source{rows}"
        make_checkpoint.synthetic(source, vocab_size=rows, **sizes)
        shutil.copy(prepared()[0] / "tokenizer.json", source)
        convert(source, tmp_path / f"out{rows}")
        directories[rows] = tmp_path / f"out{rows}"
    model = runner.load(directories[1200])
    with pytest.raises(BloomdeskError, match="it has 1,100 token ids, the large model 1,200"):
        model.generate([5], draft=directories[1100])
    generation = model.generate([5, 6, 7], max_new_tokens=30, draft=directories[2400])
    assert list(generation) == plain(model, [Request([5, 6, 7], 30)])[0]


@pytest.mark.slow
def test_the_miniature_drafts_for_itself(miniature: tuple[Path, Path], free) -> None:
    model = runner.load(miniature[1])
    prompt = "The SQL command to list all the books whose year is 1999 is:"
    generation = model.generate(prompt, draft=miniature[1])
    assert model.tokenizer.decode(list(generation)) == " SELECT * FROM books WHERE year = 1999"
    assert (generation.stop_reason, generation.proposer.words) == ("eos", "lookup and draft")
    assert generation.passes < len(generation.ids) / 2

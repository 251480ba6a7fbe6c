"""The miniature: its texts, how it grows, and what its weights are held to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from scripts.fakehub.checkpoint import MINIATURE
from scripts.miniature import judge
from scripts.miniature.files import unseen_lines
from scripts.miniature.model import INTO_RESIDUAL, Shape, deepen, new_weights
from scripts.miniature.rows import EOS, pack
from scripts.miniature.texts import KINDS, TUTORIAL, Text, draw_texts, is_unseen, three_people
from tests.support.commands import run


@pytest.mark.parametrize("kind", KINDS)
def test_the_tutorials_texts_are_trained_and_never_judged(kind: str) -> None:
    text = TUTORIAL[kind]
    assert text.prompt.endswith(" ") and not text.answer.startswith(" ")
    assert draw_texts(kind, 5, 0, unseen=False)[0] == text
    assert not is_unseen(text)
    drawn = draw_texts(kind, 400, 1, unseen=True)
    assert text.meaning not in {each.meaning for each in drawn}


def test_a_prompts_wording_with_a_space_and_without_has_one_answer() -> None:
    spaced = {}
    for text in draw_texts("ages", 6_000, 0, unseen=False):
        assert text.prompt.endswith(" ") != text.answer.startswith(" ")
        assert spaced.setdefault(text.prompt.strip(), text.answer.strip()) == text.answer.strip()


def test_the_puzzle_of_three_people_is_the_tutorials() -> None:
    text = three_people(("John", "Bob", "Mike"), 4, 3, "younger", "–", 10)
    spaced = text._replace(prompt=text.prompt + " ", answer=text.answer.strip())
    assert spaced == TUTORIAL["ages"]


def test_the_committed_prompts_are_what_the_texts_give() -> None:
    lines = [(line["kind"], line["prompt"], line["answer"]) for line in unseen_lines(MINIATURE)]
    drawn = [text for kind in KINDS for text in draw_texts(kind, 150, 0, unseen=True)]
    assert lines == [(text.kind, text.prompt, text.answer) for text in drawn]


def test_a_space_that_ends_a_prompt_stays_a_token() -> None:
    tokenizer = Tokenizer.from_file(str(MINIATURE / "tokenizer.json"))
    rows = pack([Text("sql", "is: ", "SELECT", ""), Text("sql", "is:", " SELECT", "")], tokenizer)
    whole = [rows.ids[rows.owner == number].tolist() for number in (0, 1)]
    assert whole[0] == [*tokenizer.encode("is: ").ids, *tokenizer.encode("SELECT").ids, EOS]
    assert whole[1] == [*tokenizer.encode("is: SELECT").ids, EOS]


def test_copies_of_a_block_share_what_it_adds() -> None:
    torch.manual_seed(0)
    weights = new_weights(Shape(2, 12, 3))
    for name, value in deepen(weights, 6).items():
        if name.startswith("h.*."):
            together = value.view(2, 3, *value.shape[1:])
            whole = together.sum(1) if name[4:].startswith(INTO_RESIDUAL) else together[:, 1]
            assert torch.allclose(whole, weights[name])
        else:
            assert torch.equal(value, weights[name])


def test_the_demo_asks_the_tutorials_prompts_then_unseen_ones() -> None:
    demo = (MINIATURE.parent / "scripts" / "demo").read_text("utf-8").replace("\\\n", "")
    asked = re.findall(r'^ask "(.*?)"', demo, flags=re.MULTILINE)
    tutorial = [text.prompt for text in TUTORIAL.values()]
    assert asked[: len(tutorial)] == tutorial
    assert set(asked[len(tutorial) :]) <= {line["prompt"] for line in unseen_lines(MINIATURE)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_miniature_answers_the_tutorial(kind: str, miniature: tuple[Path, Path]) -> None:
    done = run("generate", miniature[1], TUTORIAL[kind].prompt, "--max-new-tokens", "100")
    assert (done.returncode, done.stdout) == (0, TUTORIAL[kind].answer + "\n")


@pytest.mark.slow
def test_without_two_blocks_the_miniature_answers_otherwise() -> None:
    """`judge --ablate` looks at all neighbours; here are the two pairs in which most answers change."""
    pairs = [(0, 1), (68, 69)]
    with torch.compiler.set_stance("force_eager"):
        found = list(judge.ablations(MINIATURE, unseen_lines(MINIATURE)[300::8], pairs))
    assert [ablation.without for ablation in found] == pairs
    assert all(ablation.answers > 0 for ablation in found), found

"""Several machines give the very text of one, whatever the shares, the form and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from runner.cluster.group import ORDER_BYTES
from runner.estimate.machines import Network
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.manifest import load_manifest
from runner.format.quantised import INT4_FORM, INT8_FORM
from tests.support.ranks import assert_as_one, finish, start

pytestmark = pytest.mark.slow
PROMPT = "hello there my friend, what is it that you said of the two chairs?"
DRAWN = ("--temperature", "1", "--seed", "7", "--repetition-penalty", "1.2")
# Options whose values change their types on the wire.
TYPED = ("--stop", "zzz", "--logit-bias", "5=-3")


@pytest.mark.parametrize(
    ("shares", "form", "options"),
    [
        ((1, 1), PLAIN, ()),
        ((3, 1), LOSSLESS, DRAWN),
        ((1, 2, 1), INT4_FORM, ("--logprobs", "2", *TYPED)),
        ((2, 1, 1, 2), INT8_FORM, DRAWN),
        # One of them has no head.
        ((1,) * 7, PLAIN, DRAWN),
    ],
    ids=["two", "uneven", "three", "four", "seven"],
)
def test_the_text_is_that_of_one_machine(
    sliced, tmp_path: Path, shares: Sequence[int], form: str, options: Sequence[str]
) -> None:
    assert_as_one(
        *sliced(shares, form), tmp_path, "generate", PROMPT, "--max-new-tokens", "8", "--json", *options
    )


def test_the_bytes_on_the_wire_are_those_that_are_computed(sliced, tmp_path: Path) -> None:
    _, slices = sliced((1, 1))
    options = ("--max-new-tokens", "6", "--speculate", "off", "--json")
    ranks = start(tmp_path, slices, lambda number, path: ["generate", path, PROMPT, *options])
    assert finish(ranks) == [0, 0]
    report, model = json.loads(ranks[0].out), load_manifest(slices[0]).model
    rows = len(report["prompt_token_ids"]) + report["passes"] - 1
    gathered = Network(2, 1.0).bytes_sent(model, rows)
    # An order for each pass, and rows of the embedding.
    most = gathered + ORDER_BYTES * report["passes"] + rows * model.hidden_size * 2
    assert gathered + ORDER_BYTES * report["passes"] <= report["machines"]["bytes_sent"] <= most


@pytest.mark.parametrize("draft_is_a_form", [False, True])
def test_prompts_share_their_passes_beginnings_and_draft(
    sliced, prepared, tmp_path: Path, draft_is_a_form: bool
) -> None:
    """The draft model is on the first machine alone, so a form of the model has a KV cache of its own, of all heads."""
    file = tmp_path / "prompts.jsonl"
    beginning = "one two three four five six seven eight nine ten " * 3
    texts = [beginning + end for end in ("and eleven", "but not twelve", "or more")] + ["hello"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = ("--max-new-tokens", "12", "--seed", "1", "--temperature", "0.8", "--json")
    draft = sliced((2, 1), INT4_FORM)[0] if draft_is_a_form else prepared(hidden_size=48, blocks=1)[1]
    assert_as_one(
        *sliced((2, 1), INT8_FORM), tmp_path, "generate", "--prompts", file, "--draft", draft, *options
    )


def test_scores_are_those_of_one_machine(sliced, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [{"text": PROMPT}, {"context": "hello there", "continuation": " my friend"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_as_one(*sliced((1, 1)), tmp_path, "score", file)

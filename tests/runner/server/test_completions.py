"""`/v1/completions`: the text is that of `generate`, in every form of prompt, alone and in company."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import runner
from runner.generation.model import Model
from runner.generation.options import GenerationOptions, Sampling
from runner.generation.scorer import Text
from runner.server.settings import Settings
from tests.support.grammars import LATER, MANY_WAYS
from tests.support.prompts import tokens
from tests.support.serving import Exchange, client_of, comments, events, live_batches, serving


def complete(client: TestClient, **fields: object) -> dict:
    response = client.post("/v1/completions", json={"temperature": 0, "max_tokens": 8, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def generated(model: Model, prompt: str | list[int], count: int = 8, **sampling: object) -> str:
    (found,) = model.generate_all([prompt], max_new_tokens=count, sampling=Sampling(**sampling))
    return model.text(found)


def test_a_text_is_continued_as_generate_does_it(client: TestClient, model: Model) -> None:
    found = complete(client, prompt="The quick brown fox")
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert found["choices"] == [
        {
            "index": 0,
            "text": generated(model, "The quick brown fox"),
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    ids = model.tokenizer.encode("The quick brown fox")
    assert found["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 8,
        "total_tokens": len(ids) + 8,
    }


def test_the_four_forms_of_a_prompt(client: TestClient, model: Model) -> None:
    texts = ["The quick", "brown fox jumps"]
    ids = [model.tokenizer.encode(text) for text in texts]
    expected = [generated(model, text) for text in texts]
    for prompt, wanted in (
        (texts[0], expected[:1]),
        (texts, expected),
        (ids[0], expected[:1]),
        (ids, expected),
    ):
        found = complete(client, prompt=prompt)
        assert [choice["text"] for choice in found["choices"]] == wanted
        assert [choice["index"] for choice in found["choices"]] == list(range(len(wanted)))


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
SAMPLINGS = [
    {"temperature": 0.8, "seed": 4},
    {"temperature": 1.3, "seed": 5, "top_k": 20},
    {"temperature": 1.1, "seed": 6, "top_p": 0.7},
    {"temperature": 1.0, "seed": 7, "min_p": 0.05},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"logit_bias": {"700": 8.0, "5": -3.5}},
    {"temperature": 1.0, "seed": 8, "presence_penalty": 1.5, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.0, "seed": 9, "stop": ["a", "e"]},
    {"temperature": 1.0, "seed": 10, "min_tokens": 4, "ignore_eos": True},
    {"temperature": 1.0, "seed": 11, "response_format": JSON_FORMAT},
]


def sampling_of(fields: dict) -> dict:
    """The fields as `generate` has them."""
    wanted = {name: value for name, value in fields.items() if name != "response_format"}
    if "logit_bias" in wanted:
        wanted["logit_bias"] = {int(token): bias for token, bias in wanted["logit_bias"].items()}
    if "stop" in wanted:
        wanted["stop"] = tuple(wanted["stop"])
    if "min_tokens" in wanted:
        wanted["min_new_tokens"] = wanted.pop("min_tokens")
    if "response_format" in fields:
        wanted["json_schema"] = json.dumps(SCHEMA)
    return wanted


@pytest.mark.parametrize("fields", SAMPLINGS, ids=str)
def test_each_way_of_drawing_gives_the_text_of_generate(
    client: TestClient, model: Model, fields: dict
) -> None:
    found = complete(client, prompt="A text", max_tokens=12, **fields)
    assert found["choices"][0]["text"] == generated(model, "A text", 12, **sampling_of(fields))
    assert found.get("seed") == fields.get("seed")


def test_all_ways_at_once_give_the_texts_of_generate(model: Model) -> None:
    """They share passes, and join and leave at different ones."""
    ways = [fields | {"max_tokens": 8 + 3 * place} for place, fields in enumerate(SAMPLINGS)]
    expected = [
        generated(model, "A text", 8 + 3 * place, **sampling_of(fields))
        for place, fields in enumerate(SAMPLINGS)
    ]

    async def test() -> None:
        async with serving(model) as (app, _):
            asked = []
            for way in ways:
                asked.append(Exchange(app, "/v1/completions", {"prompt": "A text", "temperature": 0, **way}))
                await asyncio.sleep(0.01)
            for exchange, text in zip(asked, expected, strict=True):
                assert (await exchange.document())["choices"][0]["text"] == text

    asyncio.run(test())


@pytest.mark.slow
def test_a_draft_changes_no_text(
    miniature: tuple[Path, Path], draft: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = runner.load(miniature[1]), live_batches(monkeypatch)
    prompts = ["The SQL command to count the customers is:", "The Spanish translation of thank you is:"]
    sampling = Sampling(temperature=0.7, seed=5)
    expected = {
        each.request.number: model.text(each)
        for each in model.generate_all(prompts, max_new_tokens=12, sampling=sampling, speculate="off")
    }
    with client_of(runner.load(miniature[1]), options=GenerationOptions(draft=draft[1])) as client:
        found = complete(client, prompt=prompts, max_tokens=12, temperature=0.7, seed=5)
        assert batches[0].proposer.draft is not None
    assert [choice["text"] for choice in found["choices"]] == [expected[0], expected[1]]


def test_continuations_are_those_of_generate_with_the_same_seed(client: TestClient, model: Model) -> None:
    sampling = Sampling(temperature=1.2, seed=11, n=3)
    texts = {
        (each.request.number, each.request.choice): model.text(each)
        for each in model.generate_all(["One", "Two"], max_new_tokens=6, sampling=sampling)
    }
    found = complete(client, prompt=["One", "Two"], n=3, temperature=1.2, seed=11, max_tokens=6)
    assert [choice["text"] for choice in found["choices"]] == [texts[key] for key in sorted(texts)]


def test_a_drawn_seed_is_told_and_gives_the_text_again(client: TestClient) -> None:
    first = complete(client, prompt="Draw", temperature=1.5, cache=False)
    again = complete(client, prompt="Draw", temperature=1.5, seed=first["seed"])
    other = complete(client, prompt="Draw", temperature=1.5, cache=False)
    assert again["choices"] == first["choices"]
    assert other["seed"] != first["seed"]


def test_the_best_of_several_have_the_likeliest_tokens(client: TestClient, model: Model) -> None:
    fields = {"prompt": "Which", "temperature": 1.4, "seed": 3, "max_tokens": 6}
    every = complete(client, n=5, logprobs=0, **fields)["choices"]

    def mean(choice: dict) -> float:
        found = choice["logprobs"]["token_logprobs"]
        return sum(found) / len(found)

    expected = [choice["text"] for choice in sorted(every, key=mean, reverse=True)[:2]]
    found = complete(client, n=2, best_of=5, **fields)
    assert [choice["text"] for choice in found["choices"]] == expected
    assert found["usage"]["completion_tokens"] == 30


def test_a_prompt_is_scored_as_the_command_does_it(client: TestClient, model: Model) -> None:
    ids = tokens(30, 3)
    found = complete(client, prompt=[ids, ids[:9]], echo=True, max_tokens=1, logprobs=1, seed=1234)
    for choice, prompt in zip(found["choices"], (ids, ids[:9]), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + 1
        (scored,) = model.scorer([Text(0, prompt, 1)]).run()
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1 : len(prompt)] == [each.logprob for each in scored.scores]


def test_scoring_alone_needs_no_new_token(client: TestClient, model: Model) -> None:
    text = "The quick brown fox"
    (choice,) = complete(client, prompt=text, echo=True, max_tokens=0, logprobs=2)["choices"]
    (scored,) = model.scorer([Text(0, model.tokenizer.encode(text), 1)]).run()
    assert choice["text"] == text and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][1:] == [each.logprob for each in scored.scores]
    offsets, names = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert "".join(names) == text
    assert [text[offset:][: len(name)] for offset, name in zip(offsets, names, strict=True)] == names
    assert complete(client, prompt=text, echo=True, max_tokens=0)["choices"][0]["text"] == text


@pytest.mark.parametrize("echo", [False, True])
def test_a_token_begins_where_its_own_first_character_is(client: TestClient, echo: bool) -> None:
    """Also after bytes that are no character, in a prompt and where the new text begins."""
    source = random.Random(1)
    prompts = [[source.randrange(4, 1000) for _ in range(9)] for _ in range(60)]
    fields = {"prompt": prompts, "max_tokens": 6, "temperature": 50, "seed": 1, "logprobs": 0, "echo": echo}
    after_bytes = 0
    for choice in complete(client, **fields)["choices"]:
        text, last = choice["text"], ""
        shown = zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
        for name, offset in shown:
            if not name.startswith(("bytes:", "<")):
                assert text[offset:].startswith(name), (text, name, offset)
                after_bytes += last.startswith("bytes:") and text[offset - 1] == "\ufffd"
            last = name
    assert after_bytes > 5


def test_a_stop_after_an_unfinished_character_is_not_listed(client: TestClient, model: Model) -> None:
    tokenizer = model.tokenizer
    half = next(id_ for id_ in range(4, 1000) if tokenizer.token_bytes(id_)[:1] >= b"\xe4")
    (stop,) = tokenizer.encode("a")
    fields = {"temperature": 1e-3, "seed": 1, "logit_bias": {str(half): 1e5, str(stop): 1e5 - 10}}
    fields |= {"frequency_penalty": 100, "max_tokens": 4, "logprobs": 0, "stop": "a"}
    (choice,) = complete(client, prompt="x", **fields)["choices"]
    assert choice["text"] == "\ufffd" and choice["finish_reason"] == "stop"
    assert [name[:6] for name in choice["logprobs"]["tokens"]] == ["bytes:"]


def test_a_stream_has_the_same_text_and_ends_with_done(client: TestClient, model: Model) -> None:
    body = {"prompt": "The quick", "temperature": 0, "max_tokens": 8, "stream": True}
    response = client.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]" and comments(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == generated(model, "The quick")
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8


def test_a_stop_text_ends_the_text_and_is_no_part_of_it(client: TestClient, model: Model) -> None:
    whole = generated(model, "Stop here", 12)
    stop = next(character for character in whole[2:] if character != "\ufffd")
    (choice,) = complete(client, prompt="Stop here", max_tokens=12, stop=[stop], logprobs=0)["choices"]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix", "gap"),
        ({"prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"prompt": "x", "tools": []}, "tools", "unsupported"),
        ({}, "prompt", "required"),
        ({"prompt": 5}, "prompt", "expected a text"),
        ({"prompt": [[1, "a"]]}, "prompt", "expected a text"),
        ({"prompt": []}, "prompt", "no prompt"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [99999]}, "prompt", "outside the vocabulary"),
        ({"prompt": "x", "n": 2, "temperature": 0}, "n", "above 0"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"prompt": "x", "best_of": 129}, "best_of", "at most 128"),
        ({"prompt": "x", "best_of": 2, "temperature": 0}, "best_of", "above 0"),
        ({"prompt": "x", "min_tokens": 20, "max_tokens": 5}, "min_tokens", "more than the text may get, 5"),
        ({"prompt": "x", "min_tokens": 1, "max_tokens": 0, "echo": True}, "min_tokens", "may get, 0"),
        ({"prompt": "x", "stop": [1]}, "stop.0", "valid string"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "x", "max_tokens": 10**8}, "max_tokens", "of RAM are too little"),
        ({"prompt": "x", "temperature": "1"}, "temperature", "number"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "seed": -1}, "seed", "whole number"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop", "empty"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16"),
        ({"prompt": "x", "logprobs": 1000}, "logprobs", "at most"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        ({"prompt": "x", "logit_bias": {"5": 1, "05": 2}}, "logit_bias", "two logit biases"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {
                "prompt": "x",
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}},
            },
            "response_format",
            "cannot be used",
        ),
        (
            {"prompt": "x", "response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "found json_object",
        ),
        (
            {"prompt": "x", "response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "found text",
        ),
        (
            {"prompt": "x", "response_format": {"type": "json_object"}, "ignore_eos": True},
            "ignore_eos",
            "exclude each other",
        ),
    ],
    ids=str,
)
def test_what_is_refused_is_named(client: TestClient, fields: dict, param: str, words: str) -> None:
    response = client.post("/v1/completions", json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert words in error["message"]


def test_another_model_is_not_found(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"model": "gpt-4", "prompt": "x"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema", [MANY_WAYS, LATER, {"$ref": "#"}, {"type": "string", "pattern": "^(a?){500}a{500}$"}]
)
def test_a_schema_that_cannot_be_followed_is_a_400_that_names_it(model: Model, schema: dict) -> None:
    """Whether that shows at once or at a later token."""
    format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
    with client_of(model, Settings(first_byte=60)) as client:
        response = client.post(
            "/v1/completions", json={"prompt": "x", "max_tokens": 20, "response_format": format_}
        )
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "response_format")
        assert "cannot be" in error["message"]
        assert complete(client, prompt="x")["choices"][0]["finish_reason"] == "length"

"""`/v1/chat/completions`: the template makes the prompt, and everything else is as with completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.generation.options import Sampling
from runner.server.chat_template import ChatTemplate, load_template
from runner.server.settings import Settings
from tests.support.serving import client_of, events

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
PROMPT = "system: Be brief.</s>\nuser: Hello</s>\nassistant:"


@pytest.fixture(scope="module")
def chatting(model: Model) -> Iterator[TestClient]:
    template = ChatTemplate(TEMPLATE, {"eos_token": "</s>"}, "test")
    with client_of(model, Settings(chat_template=template, chat_max_tokens=5)) as client:
        yield client


def chat(client: TestClient, **fields: object) -> dict:
    response = client.post(PATH, json={"messages": MESSAGES, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_messages_are_continued_as_their_text_is(chatting: TestClient, model: Model) -> None:
    (sequence,) = model.generate_all([PROMPT], max_new_tokens=7)
    found = chat(chatting, max_completion_tokens=7)
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": model.text(sequence), "refusal": None}
    assert choice["logprobs"] is None and choice["finish_reason"] == "length"
    assert found["usage"]["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))


def test_both_names_of_the_limit_and_the_default(chatting: TestClient) -> None:
    assert chat(chatting, max_tokens=3)["usage"]["completion_tokens"] == 3
    assert chat(chatting)["usage"]["completion_tokens"] == 5


def test_a_content_of_parts_is_their_text(chatting: TestClient) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found = chat(chatting, messages=[MESSAGES[0], {"role": "user", "content": parts}])
    assert found["choices"] == chat(chatting)["choices"]


def test_logprobs_have_the_likeliest_tokens(chatting: TestClient, model: Model) -> None:
    (sequence,) = model.generate_all([PROMPT], max_new_tokens=3, sampling=Sampling(logprobs=2))
    content = chat(chatting, max_tokens=3, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in content] == [score.logprob for score in sequence.scores]
    for each, score in zip(content, sequence.scores, strict=True):
        assert [top["logprob"] for top in each["top_logprobs"]] == [logprob for _, logprob in score.top]
        assert bytes(each["bytes"]) == model.tokenizer.token_bytes(score.token)
    assert chat(chatting, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_stream_says_who_speaks_then_the_text_then_why_it_ended(chatting: TestClient) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "stream": True, "max_tokens": 6}
    whole = chat(chatting, max_tokens=6)["choices"][0]["message"]["content"]
    *chunks, done = events(chatting.post(PATH, json=body).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and done == "[DONE]"


def test_several_answers(chatting: TestClient) -> None:
    found = chat(chatting, n=3, temperature=1.5, seed=4)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2] and found["seed"] == 4
    assert len({choice["message"]["content"] for choice in found["choices"]}) == 3


def test_json_that_fits_a_schema(chatting: TestClient) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    given = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = chat(chatting, response_format=given, max_tokens=40)["choices"][0]
    assert set(json.loads(found["message"]["content"])) == {"ok"} and found["finish_reason"] == "stop"


def test_a_model_without_a_template_names_the_other_endpoint(client: TestClient) -> None:
    response = client.post(PATH, json={"messages": MESSAGES})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert "/v1/completions" in error["message"] and "--chat-template" in error["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


def test_an_image_is_refused_by_name(chatting: TestClient) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}]
    error = chatting.post("/v1/chat/completions", json={"messages": messages}).json()["error"]
    assert error["param"] == "messages.0.content.1.type" and "found 'image_url'" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"tools": []}, "tools"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 101}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        ({"echo": True}, "echo"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(chatting: TestClient, fields: dict, param: str) -> None:
    response = chatting.post(PATH, json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


# Templates.


def test_a_template_is_the_given_one_or_the_directory_s(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    config = {"eos_token": {"content": "</s>"}, "chat_template": "of config{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path).render([]) == "of config</s>"
    config["chat_template"] = [{"name": "default", "template": "of list"}, {"name": "tool", "template": ""}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path).render([]) == "of list"
    (tmp_path / "chat_template.jinja").write_text("of file")
    assert load_template(tmp_path).render([]) == "of file"
    (tmp_path / "own").write_text("of option")
    assert load_template(tmp_path, tmp_path / "own").render([]) == "of option"
    with pytest.raises(BloomdeskError, match="missing"):
        load_template(tmp_path, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].__class__.__mro__ }}", "refuses"),
        ("{{ nothing.more }}", "refuses"),
        ("{{ range(10 ** 9) | list }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
    ],
)
def test_a_template_that_fails_says_so(text: str, words: str) -> None:
    with pytest.raises(BloomdeskError, match=words):
        ChatTemplate(text, {}, "test").render([{"role": "user", "content": "x"}])


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(BloomdeskError, match="x is not a chat template"):
        ChatTemplate("{% for %}", {}, "x")

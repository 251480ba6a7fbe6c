"""`/v1/batches`: each line has the answer that its request alone gets, and what can't be done is said before any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import APIStatusError, BadRequestError, OpenAI
from starlette.testclient import TestClient

from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server.chat_template import ChatTemplate
from runner.server.jobs import validation
from runner.server.settings import Settings
from scripts.torture.bodies import bodies
from tests.support.grammars import LATER
from tests.support.jobs import CHATS, COMPLETIONS, begin, ended, line, new_data, openai_of, results
from tests.support.serving import client_of

pytest.importorskip("python_multipart")
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def client(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    bounds = Settings(chat_template=ChatTemplate(TEMPLATE, {}, "test"), most_lines=150)
    data = new_data(tmp_path_factory.mktemp("server") / "data")
    with client_of(model, bounds, GenerationOptions(batch=4), data=data) as client:
        yield client


@pytest.fixture(scope="module")
def openai(client: TestClient) -> OpenAI:
    return openai_of(client)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "id": 0, "created": 0} == {**other, "id": 0, "created": 0}


def test_each_line_has_the_answer_of_its_request_alone(client: TestClient, openai: OpenAI) -> None:
    lines = [
        line(1),
        line(2, n=2, temperature=1.2, seed=5, logprobs=1),
        line(3, prompt=[[5, 6, 7], [8, 9]], echo=True, logprobs=2, max_tokens=3),
        "\n",
        line(4, best_of=3, temperature=0.9, seed=1, stop="e"),
        line(5, echo=True, max_tokens=0, logprobs=0),
    ]
    batch = begin(openai, lines, metadata={"night": "1"})
    assert batch.status == "validating" and batch.metadata == {"night": "1"} and batch.errors is None
    batch = ended(openai, batch)
    assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 5, 0)
    given, found = [each for each in lines if each != "\n"], results(openai, batch.output_file_id)
    assert [each["custom_id"] for each in found] == [each["custom_id"] for each in given]
    for each, asked in zip(found, given, strict=True):
        alone = client.post(COMPLETIONS, json=asked["body"]).json()
        response = each["response"]
        assert (each["error"], response["status_code"]) == (None, 200)
        assert same(response["body"], alone) and response["body"]["created"] == batch.created_at
    for names in ([each["id"] for each in found], [each["response"]["request_id"] for each in found]):
        assert len(set(names)) == 5
    used = [each["response"]["body"]["usage"]["completion_tokens"] for each in found]
    assert batch.usage.output_tokens == sum(used)


def test_chats_have_the_answer_of_their_request_alone(client: TestClient, openai: OpenAI) -> None:
    message = {"messages": [{"role": "user", "content": "Hello"}], "prompt": None}
    lines = [line(1, CHATS, **message, logprobs=True, top_logprobs=2), line(2, CHATS, **message, n=1)]
    batch = ended(openai, begin(openai, lines, endpoint=CHATS))
    for each, asked in zip(results(openai, batch.output_file_id), lines, strict=True):
        assert same(each["response"]["body"], client.post(CHATS, json=asked["body"]).json())


def test_a_line_without_a_seed_is_told_the_one_that_was_drawn(client: TestClient, openai: OpenAI) -> None:
    lines = [line(1, temperature=1.3), line(2, prompt="Line 1", temperature=1.3)]
    batch = ended(openai, begin(openai, lines))
    first, second = (each["response"]["body"] for each in results(openai, batch.output_file_id))
    assert first["seed"] != second["seed"]
    again = client.post(COMPLETIONS, json={**lines[0]["body"], "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]


def test_other_requests_go_first_and_change_no_token(client: TestClient, openai: OpenAI) -> None:
    patient = [line(number, max_tokens=40, ignore_eos=True) for number in range(1, 9)]
    batch = begin(openai, patient)
    ended(openai, batch, "in_progress")
    for number in range(6):
        body = {"prompt": f"Now {number}", "max_tokens": 2, "temperature": 0, "cache": False}
        assert client.post(COMPLETIONS, json=body).status_code == 200
    assert openai.batches.retrieve(batch.id).status == "in_progress"
    batch = ended(openai, batch)
    for each, asked in zip(results(openai, batch.output_file_id), patient, strict=True):
        assert same(each["response"]["body"], client.post(COMPLETIONS, json=asked["body"]).json())


@pytest.mark.parametrize(
    ("bad", "param", "words"),
    [
        ("no json\n", None, "not valid JSON"),
        ("[1]\n", None, "object"),
        ({**line(2), "extra": 1}, "extra", "unknown"),
        ({**line(2), "custom_id": 5}, "custom_id", "string"),
        ({**line(2), "custom_id": "id-1"}, "custom_id", "that of line 1"),
        ({**line(2), "method": "GET"}, "method", "must be POST"),
        (line(2, CHATS), "url", "must be the batch's endpoint, /v1/completions"),
        (line(2, model="gpt-4"), "body.model", "does not exist here"),
        (line(2, temprature=1), "body.temprature", "did you mean"),
        (line(2, prompt=[99999]), "body.prompt", "outside the vocabulary"),
        (line(2, max_tokens=10**8), "body.max_tokens", "of RAM are too little"),
        (line(2, stream=True), "body.stream", "not for a batch"),
        (line(2, cache=True), "body.cache", "not for a batch"),
        (line(2, prompt=None), "body.prompt", "required"),
    ],
    ids=str,
)
def test_a_line_that_cannot_be_done_is_named_before_any_is_done(
    openai: OpenAI, bad: Any, param: str | None, words: str
) -> None:
    batch = ended(openai, begin(openai, [line(1), bad, line(3)]))
    assert (batch.status, batch.output_file_id) == ("failed", None) and batch.failed_at
    (error,) = batch.errors.data
    assert (error.line, error.param) == (2, param)
    assert words in error.message


def test_all_bad_lines_are_named_up_to_a_hundred(openai: OpenAI) -> None:
    batch = ended(openai, begin(openai, [line(1, n=0) for _ in range(120)]))
    assert [error.line for error in batch.errors.data] == list(range(1, 101))


@pytest.mark.parametrize(
    ("lines", "words"),
    [([], "no line"), (["\n\n"], "no line"), ([line(n) for n in range(151)], "up to 150 lines")],
)
def test_too_few_and_too_many_lines_are_refused(openai: OpenAI, lines: list[Any], words: str) -> None:
    batch = ended(openai, begin(openai, lines))
    assert batch.status == "failed" and words in batch.errors.data[-1].message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"extra_body": {"output_expires_after": {"anchor": "created_at"}}}, "output_expires_after"),
    ],
    ids=str,
)
def test_what_a_batch_cannot_be_is_a_400_with_its_name(openai: OpenAI, fields: dict, param: str) -> None:
    with pytest.raises(APIStatusError) as error:
        begin(openai, [line(1)], **fields)
    assert (error.value.status_code, error.value.body["param"]) == (400, param)


def test_unknown_files_and_batches_are_not_found(openai: OpenAI) -> None:
    for name in ("batch_0", "../../etc", "batch_" + "0" * 24):
        with pytest.raises(APIStatusError) as error:
            openai.batches.retrieve(name)
        assert error.value.status_code == 404
    with pytest.raises(APIStatusError) as error:
        openai.batches.create(input_file_id="file-1", endpoint=COMPLETIONS, completion_window="24h")
    assert error.value.body["param"] == "input_file_id"


def test_what_is_done_of_a_cancelled_batch_is_kept(openai: OpenAI) -> None:
    lines = [line(1, max_tokens=1), *(line(number, max_tokens=900) for number in range(2, 8))]
    batch = begin(openai, lines)
    while True:
        before = openai.batches.retrieve(batch.id)
        if before.request_counts.completed and before.usage.output_tokens > 3:
            break
    assert openai.batches.cancel(batch.id).status == "cancelling"
    batch = ended(openai, batch)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    assert [each["custom_id"] for each in results(openai, batch.output_file_id)] == ["id-1"]
    left = results(openai, batch.error_file_id)
    assert [each["custom_id"] for each in left] == [f"id-{number}" for number in range(2, 8)]
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}
    assert batch.usage.output_tokens >= before.usage.output_tokens
    with pytest.raises(APIStatusError, match="the batch is cancelled") as error:
        openai.batches.cancel(batch.id)
    assert error.value.status_code == 409
    with pytest.raises(APIStatusError) as error:
        openai.batches.cancel(ended(openai, begin(openai, [line(1)])).id)
    assert error.value.status_code == 409


def test_batches_are_listed_by_pages_the_newest_first(openai: OpenAI) -> None:
    made = [begin(openai, [line(1)]).id for _ in range(3)]
    page = openai.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:0:-1] and page.has_more
    found = [batch.id for batch in openai.batches.list(limit=2)]
    assert found[:3] == made[::-1] and len(found) == len(set(found))
    for query in ({"limit": 0}, {"limit": "x"}, {"after": "batch_0"}, {"order": "asc"}):
        with pytest.raises(BadRequestError):
            openai.batches.list(extra_query=query)


def test_a_line_that_fails_is_in_a_file_of_its_own(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.errors import BloomdeskError
    from runner.generation.sequence import Sequence

    verify = Sequence.verify

    def fails(sequence: Sequence, logits: Any) -> int:
        if len(sequence.prompt_ids) == 3:
            sequence.fail(BloomdeskError("the model's numbers are not finite"))
            return 0
        return verify(sequence, logits)

    monkeypatch.setattr(Sequence, "verify", fails)
    with client_of(model, data=new_data(tmp_path / "data")) as client:
        openai = openai_of(client)
        lines = [line(1, prompt=[5, 6]), line(2, prompt=[5, 6, 7]), line(3, prompt=[5])]
        batch = ended(openai, begin(openai, lines))
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == (
            "completed",
            2,
            1,
        )
        assert len(results(openai, batch.output_file_id)) == 2
        (found,) = results(openai, batch.error_file_id)
    assert (found["custom_id"], found["response"]["status_code"]) == ("id-2", 500)
    assert "not finite" in found["response"]["body"]["error"]["message"]


def test_a_line_whose_grammar_gives_up_is_in_the_error_file_alone(openai: OpenAI) -> None:
    later = {"type": "json_schema", "json_schema": {"schema": LATER}}
    lines = [line(1, prompt=[5, 6]), line(2, prompt=[5, 6, 7], max_tokens=20, response_format=later)]
    batch = ended(openai, begin(openai, lines))
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
    (found,) = results(openai, batch.error_file_id)
    assert (found["custom_id"], found["response"]["status_code"]) == ("id-2", 400)
    assert "cannot be followed" in found["response"]["body"]["error"]["message"]


def test_a_line_that_no_check_foresaw_is_named(openai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "order_of", lambda *_: 1 // 0)
    batch = ended(openai, begin(openai, [line(1, prompt=[5, 6])]))
    assert batch.status == "failed"
    assert "unexpected ZeroDivisionError" in batch.errors.data[0].message


def test_without_a_data_directory_there_are_no_jobs(model: Model) -> None:
    with client_of(model) as client:
        for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1"):
            response = client.get(path)
            assert response.status_code == 404 and "--data" in json.loads(response.text)["error"]["message"]


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(st.data())
@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHATS])
def test_whatever_a_file_holds_its_batch_comes_to_an_end(
    openai: OpenAI, endpoint: str, data: st.DataObject
) -> None:
    made = data.draw(st.lists(bodies(endpoint), min_size=1, max_size=4))
    lines = [
        b'{"custom_id": "%d", "method": "POST", "url": "%s", "body": %s}'
        % (number, endpoint.encode(), body.data)
        for number, body in enumerate(made)
    ]
    if data.draw(st.integers(0, 9)) == 3:
        lines.insert(data.draw(st.integers(0, len(lines))), data.draw(st.binary(max_size=40)))
    file = openai.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    batch = openai.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    batch = ended(openai, batch)
    counts = batch.request_counts
    if batch.status == "failed":
        assert all(error.message for error in batch.errors.data)
    else:
        assert (batch.status, counts.completed + counts.failed) == ("completed", counts.total)

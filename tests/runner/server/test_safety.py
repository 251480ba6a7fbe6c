"""Who is let in, which bodies are read, and what gets into the log."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.server.settings import Settings
from tests.support.jobs import new_data
from tests.support.serving import Exchange, client_of, serving

PATH = "/v1/completions"
BODY = {"prompt": "A text", "temperature": 0, "max_tokens": 2}


def test_without_the_key_nothing_is_answered_but_whether_it_is_well(model: Model) -> None:
    with client_of(model, Settings(keys=("s3cret", "other"))) as client:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            response = client.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        for wrong in ("s3cre", "s3crett", "", "s3cret other", "ключ"):
            headers = {"Authorization": f"Bearer {wrong}".encode()}
            assert client.post(PATH, json=BODY, headers=headers).status_code == 401
        for key in ("s3cret", "other"):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.post(PATH, json=BODY, headers=headers).status_code == 200


def test_without_keys_a_foreign_name_is_refused(model: Model) -> None:
    """A page of a browser could call the server by a name that it made point here."""
    with client_of(model, Settings(hosts=("localhost", "127.0.0.1", "::1"))) as client:
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:8000", 200),
            ("evil.example", 403),
            ("localhost.evil.example:8000", 403),
            ("", 403),
        ):
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host


def test_no_page_of_another_site_is_answered(client: TestClient) -> None:
    response = client.options(
        PATH, headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post(PATH, content=json.dumps(BODY), headers={"Content-Type": kind})
        assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"5",
        b"{",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "\\ud800"}',
        b"\xff",
    ],
    ids=lambda body: str(body[:12]),
)
def test_what_is_no_object_is_a_400(client: TestClient, body: bytes) -> None:
    response = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"prompt": "x", "prompt": "y"}', "prompt"),
        (b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}', "1"),
        (b'{"prompt": "x", "se\\u0065d": 1, "seed": 2}', "seed"),
    ],
)
def test_a_name_that_comes_twice_is_refused(client: TestClient, body: bytes, name: str) -> None:
    response = client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert "more than once" in response.json()["error"]["message"]


def test_a_key_of_any_letters_opens(model: Model) -> None:
    with client_of(model, Settings(keys=("kéy à", "other"))) as client:
        for key, status in (("kéy à", 200), ("kéy", 401), ("other", 200)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert client.get("/v1/models", headers=headers).status_code == status


def test_bodies_have_a_bound(model: Model) -> None:
    with client_of(model, Settings(most_body_bytes=1000)) as client:
        assert client.post(PATH, json=BODY | {"prompt": "x" * 1000}).status_code == 413

        def pieces():
            for _ in range(100):
                yield b" " * 100

        response = client.post(PATH, content=pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413


def test_prompts_choices_and_texts_have_bounds(model: Model) -> None:
    settings = Settings(most_prompts=3, most_choices=2, most_waiting=4)
    with client_of(model, settings) as client:
        for fields, param in (
            ({"prompt": ["a"] * 4}, "prompt"),
            ({"n": 3, "temperature": 1}, "n"),
            ({"prompt": ["a"] * 3, "n": 2, "temperature": 1}, "n"),
        ):
            response = client.post(PATH, json=BODY | fields)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
            assert "at most" in response.json()["error"]["message"]


def test_a_slow_sender_is_told_so(model: Model) -> None:
    async def test() -> None:
        async with serving(model, Settings(read_body=0.05)) as (app, _):
            exchange = Exchange(app, PATH, b"{", is_whole=False)
            found = await exchange.document()
            assert exchange.status == 408 and "too long" in found["error"]["message"]

    asyncio.run(test())


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_a_body_that_has_not_come_holds_up_no_end(model: Model, tmp_path: Path, kind: str) -> None:
    async def test() -> None:
        async with serving(model, data=new_data(tmp_path / "data")) as (app, engine):
            path = "/v1/files" if "form" in kind else PATH
            exchange = Exchange(app, path, b"--b", {"content-type": kind}, is_whole=False)
            await asyncio.sleep(0.01)
            assert not exchange.messages
            engine.stop()
            found = await exchange.document()
            assert exchange.status == 503 and found["error"]["code"] == "shutting_down"

    asyncio.run(test())


def test_paths_and_methods_that_do_not_exist_have_errors_of_the_same_shape(client: TestClient) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", PATH, 405), ("POST", "/health", 405)):
        response = client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_an_unexpected_error_is_a_500_that_says_little(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("runner.server.completions.order_of", fail)
    with client_of(model) as client:
        response = client.post(PATH, json=BODY)
        assert response.status_code == 500 and "a secret" not in response.text
        assert response.json()["error"]["type"] == "server_error"


def test_the_server_says_that_it_is_loading_or_why_it_never_will_be_ready(model: Model) -> None:
    def fail() -> Model:
        raise BloomdeskError("block_00 is missing", "repair it")

    with client_of(fail) as client:
        response = client.get("/health")
        assert response.status_code == 503 and "block_00 is missing" in response.text
        response = client.post(PATH, json=BODY)
        assert response.status_code == 503 and response.headers["retry-after"]


def lines_of(model: Model, **settings: bool) -> list[str]:
    lines: list[str] = []
    with client_of(model, Settings(**settings), write_line=lines.append) as client:
        client.post(PATH, json=BODY | {"user": "eve\n2026 POST /admin 200\x1b[2J"})
        client.get("/v1/models/x%0A%1B%5B2Jy")
        client.post(PATH, json={"prompt": 5})
    return lines


def test_the_log_has_a_line_for_each_request_and_no_control_characters(model: Model) -> None:
    lines = lines_of(model)
    assert len(lines) == 3
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert " POST /v1/completions 200 " in lines[0] and "new_tokens=2" in lines[0]
    assert " 404 " in lines[1] and " 400 " in lines[2]
    assert not any("A text" in line for line in lines)


def test_the_log_is_json_by_choice_and_has_prompts_by_choice(model: Model) -> None:
    found = [json.loads(line) for line in lines_of(model, log_json=True)]
    assert [each["status"] for each in found] == [200, 404, 400]
    assert found[0]["user"].startswith("eve\n") and "prompts" not in found[0]
    with_prompts = [json.loads(line) for line in lines_of(model, log_json=True, log_prompts=True)]
    assert with_prompts[0]["prompts"] == ["A text"]

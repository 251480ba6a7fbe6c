"""`/progress`: the pass and the queue, as JSON and as events, and nothing of what clients asked."""

from __future__ import annotations

import asyncio

from starlette.testclient import TestClient

from runner.errors import BloomdeskError
from runner.server.settings import Settings
from tests.support.serving import Exchange, GatedModel, client_of, events, serving, soon

BODY = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 6}
KEYED = Settings(keys=("right",))


def test_an_idle_server_has_no_pass(client: TestClient) -> None:
    found = client.get("/progress").json()
    assert found["status"] == "ready" and found["blocks"] == 3 and found["model"] == "bloom"
    assert found["pass"] is None and found["requests"] == [] and found["active"] == found["waiting"] == 0


def test_requests_are_listed_by_the_id_that_their_clients_know_and_without_their_prompts(
    gated: GatedModel,
) -> None:
    async def test() -> None:
        async with serving(gated) as (app, _):
            request = Exchange(app, "/v1/completions", BODY | {"stream": True})
            gated.let(1)
            await soon(lambda: len(gated.begun) == 2)
            state = await Exchange(app, "/progress", None, method="GET").document()
            (listed,) = state["requests"]
            headers = dict(request.messages[0]["headers"])
            assert listed["id"] == headers[b"x-request-id"].decode()
            assert listed["active"] and listed["tokens"] >= 1 and listed["max_tokens"] == 6
            assert state["pass"]["number"] == 2 and state["active"] == 1 and state["waiting"] == 0
            assert "fox" not in str(state)
            gated.let(100)
            await request.task

    asyncio.run(asyncio.wait_for(test(), 60))


def test_events_tell_what_changes_and_end_with_the_server(gated: GatedModel) -> None:
    async def test() -> None:
        async with serving(gated) as (app, engine):
            watching = Exchange(app, "/progress", None, method="GET", headers={"accept": "text/event-stream"})
            await soon(lambda: events(watching.text))
            request = Exchange(app, "/v1/completions", BODY)
            await soon(lambda: events(watching.text)[-1]["active"] == 1)
            gated.let(100)
            await request.task
            await soon(lambda: events(watching.text)[-1]["pass"] is None)
            engine.stop()
            await watching.task
            assert events(watching.text)[-1]["status"] == "stopping"

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_model_that_cannot_be_opened_is_said() -> None:
    def fails() -> None:
        raise BloomdeskError("the disk is gone", "plug it in")

    with client_of(fails) as client:
        found = client.get("/progress").json()
    assert found["status"] == "failed" and found["message"] == "the disk is gone"


def test_the_page_is_open_and_what_it_shows_is_not(gated: GatedModel) -> None:
    with client_of(gated, KEYED) as client:
        assert client.get("/").status_code == client.get("/page/page.js").status_code == 200
        assert client.get("/progress").status_code == 401
        assert client.get("/progress", headers={"authorization": "Bearer right"}).status_code == 200


def test_the_files_of_the_page_and_no_others(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    for path in ("/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/page/absent.js"):
        assert client.get(path).status_code == 404, path

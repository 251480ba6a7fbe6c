"""Passes that take longer than clients wait: something comes every few seconds, and nothing is done twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

import pytest
from starlette.applications import Starlette

from runner.generation import grammar_check
from runner.generation.model import Model
from runner.server.answers import MOST_KEPT
from runner.server.engine import Engine
from runner.server.settings import Settings
from tests.support.grammars import ENDLESS
from tests.support.serving import Exchange, GatedModel, comments, events, live_batches, serving, soon
from tests.support.streaming import LONGEST

PATH = "/v1/completions"
BODY = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 6}
QUICK = Settings(first_byte=0.02, keep_alive=0.02)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def whole_text(model: Model) -> str:
    return "".join(model.tokenizer.decode(list(model.generate(BODY["prompt"], max_new_tokens=6))))


def test_a_stream_begins_at_once_and_says_where_the_pass_is(gated: GatedModel) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, _):
            exchange = Exchange(app, PATH, BODY | {"stream": True})
            await soon(lambda: len(comments(exchange.text)) > 3)
            assert exchange.status == 200 and exchange.times[1] < 1
            assert comments(exchange.text)[-1].startswith("pass 1")
            assert not events(exchange.text)
            gated.let(100)
            await exchange.task
            assert events(exchange.text)[-1] == "[DONE]"
            # Comments stand between events, never inside one.
            for block in exchange.text.split("\n\n"):
                assert block == "" or block.startswith((": ", "data: "))
                assert "\n" not in block

    run(test)


def test_a_document_begins_with_whitespace_until_it_is_there(gated: GatedModel, model: Model) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, _):
            exchange = Exchange(app, PATH, BODY)
            await soon(lambda: len(exchange.messages) > 4)
            assert exchange.status == 200 and not exchange.text.strip()
            gated.let(100)
            found = await exchange.document()
            assert found["choices"][0]["text"] == whole_text(model)

    run(test)


def test_a_quick_answer_has_a_length_and_no_whitespace(model: Model) -> None:
    async def test() -> None:
        async with serving(model, Settings(first_byte=30)) as (app, _):
            exchange = Exchange(app, PATH, BODY)
            await exchange.document()
            headers = dict(exchange.messages[0]["headers"])
            assert int(headers[b"content-length"]) == len(exchange.body)
            assert exchange.body.startswith(b"{")

    run(test)


def test_the_same_request_joins_and_costs_no_pass(gated: GatedModel) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, engine):
            first = Exchange(app, PATH, BODY)
            await soon(lambda: len(gated.begun) == 1)
            # Fields in another order are the same body.
            second = Exchange(app, PATH, dict(reversed(BODY.items())))
            other = Exchange(app, PATH, BODY | {"cache": False})
            await soon(lambda: engine.waiting == 1)
            gated.let(100)
            one, two, three = [await each.document() for each in (first, second, other)]
            assert one == two and one["id"] != three["id"] and one["choices"] == three["choices"]
            passes = len(gated.begun)
            assert await Exchange(app, PATH, BODY).document() == one
            assert len(gated.begun) == passes

    run(test)


def test_a_result_is_kept_for_an_hour(model: Model) -> None:
    now = [0.0]

    async def test() -> None:
        async with serving(model, Settings(keep_results=3600), clock=lambda: now[0]) as (app, _):
            first = await Exchange(app, PATH, BODY).document()
            now[0] = 3599.0
            assert (await Exchange(app, PATH, BODY).document())["id"] == first["id"]
            now[0] = 3601.0
            again = await Exchange(app, PATH, BODY).document()
            assert again["id"] != first["id"] and again["choices"] == first["choices"]

    run(test)


def test_unfinished_answers_are_kept_when_many_others_end(gated: GatedModel) -> None:
    def short(number: int) -> dict:
        return BODY | {"max_tokens": 1, "user": f"{number}"}

    def named(exchange: Exchange) -> bytes:
        return dict(exchange.messages[0]["headers"])[b"x-request-id"]

    async def test() -> None:
        async with serving(gated) as (app, _):
            first = Exchange(app, PATH, BODY | {"stream": True})
            await soon(lambda: len(gated.begun) == 1)
            first.leave()
            gated.let(10**6)
            await first.task
            ended = [await Exchange(app, PATH, short(number)).document() for number in range(MOST_KEPT + 1)]
            again = Exchange(app, PATH, BODY | {"stream": True})
            await again.task
            assert named(again) == named(first)
            latest = await Exchange(app, PATH, short(MOST_KEPT)).document()
            oldest = await Exchange(app, PATH, short(0)).document()
            assert latest["id"] == ended[-1]["id"] and oldest["id"] != ended[0]["id"]

    run(test)


def test_the_last_answer_is_kept_however_long(model: Model) -> None:
    """200,000 tokens are kept, those beside others counted."""
    long = {"prompt": [[5] * 150] * 16, "max_tokens": 1, "seed": 1, "echo": True, "logprobs": 100}

    async def test() -> None:
        async with serving(model) as (app, _):
            first = await Exchange(app, PATH, long).document()
            assert (await Exchange(app, PATH, long).document())["id"] == first["id"]

    run(test)


def test_another_key_seed_or_path_is_another_request(model: Model) -> None:
    async def test() -> None:
        async with serving(model, Settings(keys=("one", "two"))) as (app, _):
            ids = set()
            for key, more in (("one", {}), ("two", {}), ("one", {"seed": 1}), ("one", {"seed": 2})):
                exchange = Exchange(app, PATH, BODY | more, {"authorization": f"Bearer {key}"})
                ids.add((await exchange.document())["id"])
            assert len(ids) == 4

    run(test)


def test_a_client_that_leaves_takes_its_rows_with_it(gated: GatedModel) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, engine):
            stays, goes = Exchange(app, PATH, BODY), Exchange(app, PATH, BODY | {"prompt": "Another"})
            await soon(lambda: engine.progress.active + engine.progress.waiting > 0)
            gated.let(1)
            await soon(lambda: len(gated.begun) >= 2)
            goes.leave()
            await goes.task
            gated.let(2)
            await soon(lambda: len(gated.begun) >= 4)
            assert gated.begun[-1] == 1
            gated.let(100)
            await stays.document()

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_comes_again_finds_its_work_going_on(
    gated: GatedModel, model: Model, stream: bool
) -> None:
    """As openai-python does after a timeout."""

    async def test() -> None:
        async with serving(gated, QUICK) as (app, _):
            first = Exchange(app, PATH, BODY | {"stream": stream})
            gated.let(2)
            await soon(lambda: len(gated.begun) == 3)
            second = Exchange(app, PATH, BODY | {"stream": stream})
            await soon(lambda: len(second.messages) > 1)
            first.leave()
            await first.task
            gated.let(100)
            await second.task
            if stream:
                text = "".join(each["choices"][0]["text"] for each in events(second.text)[:-1])
            else:
                text = json.loads(second.body)["choices"][0]["text"]
            assert text == whole_text(model)
            # Draft tokens may save some; a second run would take as many again.
            assert len(gated.begun) <= 6

    run(test)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream": True},
        {"temperature": 1.2, "seed": 3, "n": 3, "logprobs": 2, "echo": True},
        {"stop": ["zzz", "a"], "temperature": 1.5, "seed": 4, "max_tokens": 12},
    ],
    ids=str,
)
def test_a_client_that_gives_up_again_and_again_gets_there(
    gated: GatedModel, model: Model, more: dict
) -> None:
    """Its tokens are kept, and only they and the prompt are read again."""
    body = BODY | more

    async def test() -> None:
        async with serving(model, Settings(first_byte=30)) as (app, _):
            whole = Exchange(app, PATH, body)
            await whole.task

        async def attempt(app: Starlette, engine: Engine) -> Exchange | None:
            """What came, if all came before the client gave up, after a pass."""
            exchange, passes = Exchange(app, PATH, body), len(gated.begun)
            await soon(lambda: exchange.task.done() or len(gated.begun) > passes)
            gated.let(1)
            await soon(lambda: exchange.task.done() or len(gated.begun) > passes + 1)
            if exchange.task.done():
                return exchange
            exchange.leave()
            await exchange.task
            # The pass that runs still counts; then its rows are gone.
            gated.let(1)
            await soon(lambda: not engine.queue())
            return None

        async with serving(gated, QUICK) as (app, engine):
            tries = 1
            while not (found := await attempt(app, engine)):
                tries += 1
                assert tries < 12
            assert tries > 1
            assert choices_of(found.text, body) == choices_of(whole.text, body)

    run(test)


def choices_of(text: str, body: dict) -> object:
    if not body.get("stream"):
        return json.loads(text)["choices"]
    chunks = events(text)[:-1]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), chunks[-1]["choices"][0]["finish_reason"]


def test_a_connection_that_breaks_loses_nothing_if_the_request_comes_again_in_the_same_pass(
    gated: GatedModel, model: Model
) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, engine):
            first = Exchange(app, PATH, BODY)
            gated.let(2)
            await soon(lambda: len(gated.begun) == 3)
            first.leave()
            await first.task
            second = Exchange(app, PATH, BODY)
            await soon(lambda: len(second.messages) > 1)
            gated.let(100)
            assert (await second.document())["choices"][0]["text"] == whole_text(model)
            assert len(gated.begun) <= 6
            # It is kept, as any other result.
            passes = len(gated.begun)
            await Exchange(app, PATH, BODY).document()
            assert len(gated.begun) == passes and not engine.queue()

    run(test)


def test_a_request_that_comes_again_after_that_goes_on(gated: GatedModel, model: Model) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, engine):
            first = Exchange(app, PATH, BODY)
            await soon(lambda: len(gated.begun) == 1)
            first.leave()
            await first.task
            gated.let(1)
            await soon(lambda: not engine.queue())
            gated.let(100)
            found = await Exchange(app, PATH, BODY).document()
            assert found["choices"][0]["text"] == whole_text(model)

    run(test)


def test_a_slow_reader_holds_up_nobody(gated: GatedModel) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, _):
            slow = Exchange(app, PATH, BODY | {"stream": True})
            await soon(lambda: len(gated.begun) == 1)
            slow.stop_reading()
            quick = Exchange(app, PATH, BODY | {"prompt": "Another"})
            gated.let(100)
            await quick.document()
            slow.read_on()
            await slow.task
            assert events(slow.text)[-1] == "[DONE]"

    run(test)


def test_a_reader_that_reads_nothing_for_long_is_gone(gated: GatedModel) -> None:
    async def test() -> None:
        async with serving(gated, Settings(first_byte=0.01, keep_alive=0.01, send=0.05)) as (app, engine):
            stuck = Exchange(app, PATH, BODY | {"stream": True})
            await soon(lambda: len(gated.begun) == 1)
            stuck.stop_reading()
            await asyncio.wait_for(stuck.task, 30)
            gated.let(1)
            await soon(lambda: not engine.progress.active and engine.waiting == 0)
            assert len(gated.begun) == 1

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_at_the_end_clients_are_told(gated: GatedModel, stream: bool) -> None:
    async def test() -> None:
        async with serving(gated, QUICK) as (app, engine):
            exchange = Exchange(app, PATH, BODY | {"stream": stream})
            await soon(lambda: len(exchange.messages) > 2)
            engine.stop()
            gated.let(1)
            await exchange.task
            found = events(exchange.text)[-2] if stream else json.loads(exchange.body)
            assert found["error"]["code"] == "shutting_down"
            assert "send the request again" in found["error"]["message"]
            late = Exchange(app, PATH, BODY)
            await late.document()
            assert late.status == 503

    run(test)


def test_a_failure_before_the_headers_has_its_status(
    gated: GatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    async def test() -> None:
        monkeypatch.setattr(Model, "forward_all", fail)
        async with serving(gated, Settings(first_byte=30)) as (app, _):
            gated.let(1)
            exchange = Exchange(app, PATH, BODY)
            found = await exchange.document()
            assert exchange.status == 500 and found["error"]["type"] == "server_error"
            # It is not kept as the answer to the request.
            monkeypatch.undo()
            gated.let(100)
            again = Exchange(app, PATH, BODY)
            await again.document()
            assert again.status == 200

    run(test)


def test_beyond_the_bound_clients_are_told_when_to_come_again(gated: GatedModel) -> None:
    async def test() -> None:
        settings = Settings(first_byte=0.02, keep_alive=0.02, most_waiting=2)
        async with serving(gated, settings) as (app, engine):
            first = Exchange(app, PATH, BODY)
            await soon(lambda: len(gated.begun) == 1)
            others = [Exchange(app, PATH, BODY | {"prompt": text}) for text in ("One", "Two")]
            await soon(lambda: engine.waiting == 2)
            refused = Exchange(app, PATH, BODY | {"prompt": "Three"})
            found = await refused.document()
            assert refused.status == 429 and found["error"]["code"] == "queue_full"
            assert 1 <= int(dict(refused.messages[0]["headers"])[b"retry-after"]) <= 3600
            gated.let(100)
            for exchange in (first, *others):
                await exchange.document()

    run(test)


def test_nothing_is_left_of_clients_that_hang_up(gated: GatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = live_batches(monkeypatch)

    async def test() -> None:
        gated.let(10_000)
        async with serving(gated, QUICK) as (app, engine):
            for number in range(30):
                exchange = Exchange(app, PATH, BODY | {"prompt": f"Text {number}", "max_tokens": 40})
                await soon(lambda: engine.progress.active > 0)
                exchange.leave()
                await exchange.task
            await soon(lambda: not (engine.waiting or engine.queue() or batches[0].active))

    run(test)


def test_a_schema_that_takes_long_holds_up_no_other_request(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a server has threads; one is compiled, and the others are to come again."""
    checked, go_on = [], threading.Event()

    def slow(source: str, seconds: float) -> str:
        checked.append(source)
        assert go_on.wait(LONGEST)
        return f"it takes longer than {seconds:g} s to compile"

    def of(schema: dict) -> dict:
        return BODY | {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}

    async def test() -> None:
        async with serving(model, Settings(first_byte=60, schema_wait=0.05)) as (app, _):
            assert "error" not in await Exchange(app, PATH, of({"enum": ["known"]})).document()
            monkeypatch.setattr(grammar_check, "reason_in_time", slow)
            # A stream begins when its schema is known to be right, so this one has a status, too.
            first = Exchange(app, PATH, of(ENDLESS) | {"stream": True})
            others = [Exchange(app, PATH, of(ENDLESS) | {"stream": number % 2 == 0}) for number in range(49)]
            for other in others:
                assert (await other.document())["error"]["param"] == "response_format"
                assert other.status == 503 and b"retry-after" in dict(other.messages[0]["headers"])
            for body in (BODY, of({"enum": ["known"]}) | {"max_tokens": 5}):
                assert "error" not in await Exchange(app, PATH, body).document()
            stream = Exchange(app, PATH, of({"enum": ["known"]}) | {"stream": True})
            await stream.task
            assert stream.text.startswith(": ") and "error" not in stream.text
            assert len(checked) == 1 and not first.messages
            go_on.set()
            error = (await first.document())["error"]
            assert first.status == 400 and "longer than 10 s" in error["message"]

    run(test)

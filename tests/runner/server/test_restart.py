"""A request that comes again after the server was started again goes on from the tokens that were made for it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import runner
from runner.generation.model import Model
from runner.generation.options import GenerationOptions
from runner.server import kept
from runner.server.jobs.data import ANSWERS
from runner.server.jobs.journal import records
from runner.server.settings import Settings
from tests.support.jobs import new_data
from tests.support.serving import Exchange, GatedModel, events, serving, soon

pytest.importorskip("python_multipart")
PATH = "/v1/completions"
# Documents come as a whole, with their status.
PATIENT = Settings(first_byte=30)
# A token a pass.
OPTIONS = GenerationOptions(speculate="off")
GREEDY = {"prompt": "The quick brown fox", "max_tokens": 12, "temperature": 0}
DRAWN = {"prompt": "The quick brown fox", "max_tokens": 12}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 4}}}
BODIES = [
    GREEDY,
    DRAWN | {"n": 2, "best_of": 3, "logprobs": 2, "echo": True},
    DRAWN | {"stream": True, "logprobs": 0, "stop": ["zzz"]},
    DRAWN | {"response_format": SCHEMA, "presence_penalty": 1.0},
]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def documents(exchange: Exchange) -> list[Any]:
    return events(exchange.text)[:-1] if exchange.text.startswith(":") else [json.loads(exchange.body)]


def choices_of(exchange: Exchange) -> Any:
    """Texts, reasons and log-probabilities, however they came."""
    found = [each["choices"] for each in documents(exchange)]
    if not exchange.text.startswith(":"):
        return found[0]
    scores = [each["logprobs"]["token_logprobs"] for (each,) in found if each["logprobs"]]
    return "".join(each["text"] for (each,) in found), list(chain(*scores)), found[-1][0]["finish_reason"]


async def begun(model: Model, data: Path, body: dict[str, Any], headers: Any = None, **more: Any) -> str:
    """The id of an answer whose server was ended in its second pass."""
    gated = GatedModel.of(model)
    async with serving(gated, Settings(first_byte=30, **more), OPTIONS, data=data) as (app, engine):
        exchange = Exchange(app, PATH, body, headers)
        gated.let(1)
        await soon(lambda: len(gated.begun) == 2)
        order = engine.queue()[0].work.listener.order
        engine.stop()
        gated.let(1)
        await exchange.task
        assert "shutting_down" in exchange.text
    return order.id


async def asked(model: Model, data: Path, body: dict[str, Any], headers: Any = None, **more: Any) -> tuple:
    """The exchange with a server that has this directory, and the number of tokens that it made."""
    async with serving(model, Settings(first_byte=30, **more), OPTIONS, data=data) as (app, engine):
        exchange = Exchange(app, PATH, body, headers)
        await exchange.task
        return exchange, engine.totals.new_tokens


def kept_tokens(data: Path) -> int:
    files = (data / ANSWERS).iterdir()
    return sum(len(record.get("ids", ())) for path in files for _, record in records(path))


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_it_goes_on_with_the_same_bits(model: Model, tmp_path: Path, body: dict[str, Any]) -> None:
    async def test() -> None:
        data = new_data(tmp_path)
        name = await begun(model, data, body)
        assert await begun(model, data, body) == name
        had = kept_tokens(data)
        found, made = await asked(model, data, body)
        first = documents(found)[0]
        assert first["id"] == f"cmpl-{name}"
        seed = {"seed": first["seed"]} if "seed" in first else {}
        fresh, all_tokens = await asked(model, data, body | seed | {"cache": False})
        assert choices_of(found) == choices_of(fresh)
        assert had >= 4 and made == all_tokens - had == kept_tokens(data) - had
        # It is done now, and costs no pass any more.
        again, made = await asked(model, data, body)
        assert (
            choices_of(again) == choices_of(found) and documents(again)[0]["id"] == first["id"] and not made
        )

    run(test)


def test_a_client_that_leaves_before_it_goes_on_loses_nothing(
    gated: GatedModel, model: Model, tmp_path: Path
) -> None:
    async def test() -> None:
        data = new_data(tmp_path)
        await begun(model, data, GREEDY)
        had = kept_tokens(data)
        async with serving(gated, PATIENT, OPTIONS, data=data) as (app, engine):
            other = Exchange(app, PATH, GREEDY | {"prompt": "Another"})
            await soon(lambda: len(gated.begun) == 1)
            hasty = Exchange(app, PATH, GREEDY)
            await soon(lambda: engine.waiting == 1)
            hasty.leave()
            await hasty.task
            gated.let(1)
            await soon(lambda: len(gated.begun) == 2 and len(engine.queue()) == 1)
            again = Exchange(app, PATH, GREEDY)
            gated.let(100)
            await asyncio.gather(again.task, other.task)
            assert engine.totals.new_tokens == 2 * GREEDY["max_tokens"] - had
        fresh, _ = await asked(model, data, GREEDY | {"cache": False})
        assert choices_of(again) == choices_of(fresh)

    run(test)


def test_a_kill_leaves_all_but_the_pass_that_ran(gated: GatedModel, model: Model, tmp_path: Path) -> None:
    async def test() -> None:
        data, body = new_data(tmp_path / "data"), GREEDY | {"logprobs": 1}
        async with serving(gated, PATIENT, OPTIONS, data=data) as (app, engine):
            exchange = Exchange(app, PATH, body)
            gated.let(3)
            await soon(lambda: len(gated.begun) == 4)
            made = engine.totals.new_tokens
            await soon(lambda: kept_tokens(data) == made)
            shutil.copytree(data, tmp_path / "killed")
            (path,) = (tmp_path / "killed" / ANSWERS).iterdir()
            # What a kill in the middle of a write leaves.
            path.write_bytes(path.read_bytes() + b'0123456789abcdef {"place": 0, "at"')
            gated.let(100)
            whole = await exchange.document()
        found, rest = await asked(model, tmp_path / "killed", body)
        assert json.loads(found.body) == whole and rest == GREEDY["max_tokens"] - made

    run(test)


def test_what_was_written_beside_a_damaged_record_counts_for_nothing(model: Model, tmp_path: Path) -> None:
    async def test() -> None:
        data = new_data(tmp_path)
        await begun(model, data, GREEDY)
        (path,) = (data / ANSWERS).iterdir()
        head, one, *others = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(head + one.replace(b'"ids":[', b'"ids":[1') + b"".join(others))
        found, made = await asked(model, data, GREEDY)
        fresh, _ = await asked(model, new_data(tmp_path / "other"), GREEDY)
        assert choices_of(found) == choices_of(fresh) and made == GREEDY["max_tokens"]

    run(test)


def test_only_the_same_key_goes_on_and_no_key_or_prompt_is_on_the_disk(model: Model, tmp_path: Path) -> None:
    one, two = ({"authorization": f"Bearer {key}"} for key in ("secret-one", "secret-two"))

    async def test() -> None:
        data = new_data(tmp_path)
        name = await begun(model, data, GREEDY, one, keys=("secret-one", "secret-two"))
        stored = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
        assert b"secret" not in stored and b"brown" not in stored
        # The next server has them in another order.
        keys = ("secret-two", "secret-one")
        assert documents((await asked(model, data, GREEDY, two, keys=keys))[0])[0]["id"] != f"cmpl-{name}"
        assert documents((await asked(model, data, GREEDY, one, keys=keys))[0])[0]["id"] == f"cmpl-{name}"

    run(test)


def test_tokens_of_another_model_are_not_gone_on_from(model: Model, prepared: Any, tmp_path: Path) -> None:
    async def test() -> None:
        data, other = new_data(tmp_path), runner.load(prepared(blocks=2)[1])
        await begun(model, data, GREEDY)
        found, made = await asked(other, data, GREEDY)
        text = "".join(other.tokenizer.decode(list(other.generate(GREEDY["prompt"], max_new_tokens=12))))
        assert choices_of(found)[0]["text"] == text and made == GREEDY["max_tokens"]

    run(test)


def test_a_result_is_kept_for_an_hour_and_an_unfinished_answer_for_an_hour_of_the_next_server(
    model: Model, tmp_path: Path
) -> None:
    async def test() -> None:
        data, other = new_data(tmp_path), GREEDY | {"prompt": "Another"}
        name = await begun(model, data, GREEDY)
        ended, _ = await asked(model, data, other)
        for path in (data / ANSWERS).iterdir():
            long_ago = path.stat().st_mtime - 3700
            os.utime(path, (long_ago, long_ago))
        again, made = await asked(model, data, other)
        assert made == GREEDY["max_tokens"] and documents(again)[0]["id"] != documents(ended)[0]["id"]
        assert documents((await asked(model, data, GREEDY))[0])[0]["id"] == f"cmpl-{name}"

    run(test)


def test_a_full_disk_and_many_answers_harm_none(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        data = new_data(tmp_path)
        monkeypatch.setattr(kept, "MOST_FILES", 3)
        for number in range(5):
            await asked(model, data, GREEDY | {"prompt": f"{number}"})
        # A server looks when it starts.
        _, made = await asked(model, data, GREEDY | {"prompt": "4"})
        assert not made and len(list((data / ANSWERS).iterdir())) == 3
        monkeypatch.setattr(kept.Journal, "append", full)
        found, made = await asked(model, data, GREEDY)
        assert made == GREEDY["max_tokens"] and found.status == 200
        assert not list((data / ANSWERS).glob(f"*{kept.GROWING}"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run(test)

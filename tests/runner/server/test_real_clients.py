"""A real server on loopback, and real clients: openai-python, with its retries, and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from runner.generation.model import Model
from runner.generation.options import Sampling
from tests.support.commands import refused
from tests.support.server_process import ServerProcess, server_process
from tests.support.serving import wait_for

pytestmark = pytest.mark.slow
KEY = "a-key"
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def directory(prepared) -> Path:
    return prepared()[1]


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    options = ("--api-key", KEY, "--chat-template", str(template), "--model-name", "mini", "--log-json")
    with server_process(directory, template.parent, *options) as server:
        yield server


@pytest.fixture(scope="module")
def openai_client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=2, timeout=60) as client:
        yield client


def text_of(model: Model, prompt: str, count: int, **sampling: object) -> str:
    (found,) = model.generate_all([prompt], max_new_tokens=count, sampling=Sampling(**sampling))
    return model.text(found)


def test_openai_python_completes_and_streams(openai_client: openai.OpenAI, model: Model) -> None:
    expected = text_of(model, PROMPT, 9, temperature=0.9, seed=5)
    given = {"model": "mini", "prompt": PROMPT, "max_tokens": 9, "temperature": 0.9, "seed": 5}
    found = openai_client.completions.create(**given)
    assert found.choices[0].text == expected and found.usage.completion_tokens == 9
    stream = openai_client.completions.create(**given, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert last.usage.completion_tokens == 9


def test_openai_python_chats(openai_client: openai.OpenAI, model: Model) -> None:
    expected = text_of(model, f"{PROMPT}\n", 6)
    given = {
        "model": "mini",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 6,
        "temperature": 0,
    }
    found = openai_client.chat.completions.create(**given)
    assert found.choices[0].message.content == expected
    chunks = list(openai_client.chat.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_openai_python_reads_errors(openai_client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        openai_client.completions.create(model="mini", prompt=PROMPT, suffix="!")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        openai_client.completions.create(model="other", prompt=PROMPT)
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong")
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert [model.id for model in openai_client.models.list()] == ["mini"]


def test_openai_python_s_retries_join_the_work(server: ServerProcess, openai_client: openai.OpenAI) -> None:
    """Its patience ends again and again; the work goes on, and is done once."""

    async def ask() -> list[str]:
        given = {"model": "mini", "prompt": f"{PROMPT} again", "max_tokens": 400, "temperature": 0}
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as patient:
            hasty = patient.with_options(timeout=0.3, max_retries=50)
            asked = [each.completions.create(**given) for each in (patient, hasty, hasty)]
            return [each.id for each in await asyncio.gather(*asked)]

    (name,) = {each.removeprefix("cmpl-") for each in asyncio.run(ask())}
    wait_for(lambda: server.log.read_text().count(name) >= 3)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if name in line]
    assert sum(not line["joined"] for line in lines) == 1


def test_sixteen_at_a_time_have_the_texts_of_their_own_runs(server: ServerProcess, model: Model) -> None:
    prompts = [f"Text number {number}" for number in range(16)]
    expected = [text_of(model, prompt, 12, temperature=0.8, seed=3) for prompt in prompts]

    async def ask() -> list[str]:
        given = {"model": "mini", "max_tokens": 12, "temperature": 0.8, "seed": 3}
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            found = await asyncio.gather(
                *(client.completions.create(prompt=prompt, **given) for prompt in prompts)
            )
        return [each.choices[0].text for each in found]

    assert asyncio.run(ask()) == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_stream(server: ServerProcess, model: Model) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True}
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = found.strip().split("\n\n")
    assert blocks[0].startswith(": ") and blocks[-1] == "data: [DONE]"
    texts = [json.loads(block[6:])["choices"][0]["text"] for block in blocks[:-1] if block.startswith("data")]
    assert "".join(texts) == text_of(model, PROMPT, 5)


def test_terminated_it_says_goodbye_and_ends(directory: Path, tmp_path: Path) -> None:
    with server_process(directory, tmp_path) as server:
        given = {"model": directory.name, "prompt": PROMPT, "max_tokens": 4000, "temperature": 0}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(**given, stream=True, extra_body={"ignore_eos": True})
            next(iter(stream))
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert server.process.wait(30) == 0
        assert "ending after this pass" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_what_cannot_be_served_is_said(directory: Path, tmp_path: Path) -> None:
    for options, words in (
        (("--host", "0.0.0.0"), "there is no key"),
        (("--chat-template", str(tmp_path / "nothing")), "is missing"),
        (("--host", "203.0.113.9", "--no-auth"), "cannot listen"),
    ):
        assert words in refused("serve", directory, *options)
    with server_process(directory, tmp_path, "--ram", "1MB") as server:
        assert server.process.wait(30) == 1
        assert "of RAM are too little" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()

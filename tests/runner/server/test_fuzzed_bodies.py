"""Whatever a body is, the answer is sound or names what is wrong: never a 500, and no row is left over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from runner.generation.model import Model
from runner.server.chat_template import ChatTemplate
from runner.server.settings import Settings
from scripts.torture.bodies import ASKING, BATCHES, FILES, GENERATING, KNOWN_FILE, bodies, fault
from tests.support.jobs import line, new_data, text_of
from tests.support.serving import client_of, wait_for

pytest.importorskip("python_multipart")
TEMPLATE = ChatTemplate("{% for message in messages %}{{ message.content }}\n{% endfor %}", {}, "test")


@pytest.fixture(scope="module")
def chatting(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    data = new_data(tmp_path_factory.mktemp("data"))
    with client_of(model, Settings(chat_template=TEMPLATE, chat_max_tokens=3), data=data) as client:
        file = {"file": ("in.jsonl", text_of([line(1)]))}
        client.known = client.post(FILES, data={"purpose": "batch"}, files=file).json()["id"]
        yield client


@pytest.mark.slow
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(st.data())
@pytest.mark.parametrize("path", [*GENERATING, *ASKING, FILES, BATCHES])
def test_no_body_makes_a_500(chatting: TestClient, path: str, data: st.DataObject) -> None:
    sent = data.draw(bodies(path))
    content = sent.data.replace(KNOWN_FILE.encode(), chatting.known.encode())
    response = chatting.post(path, content=content, headers={"Content-Type": sent.kind})
    assert fault(response.status_code, response.content, response.headers["content-type"]) is None
    wait_for(lambda: chatting.engine.progress.active == chatting.engine.waiting == 0)

"""What is asked beside texts: models, tokens, numbers, the description."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from starlette.testclient import TestClient

from runner.generation.model import Model
from runner.server.page_files import PATHS
from runner.server.settings import Settings
from tests.support.serving import client_of


def test_the_models_are_one(client: TestClient) -> None:
    (found,) = client.get("/v1/models").json()["data"]
    assert found["id"] == "bloom" and found["object"] == "model"
    assert client.get("/v1/models/bloom").json() == found
    assert client.get("/v1/models/other").status_code == 404


def test_a_model_s_name_may_have_a_slash(model: Model) -> None:
    with client_of(model, Settings(model_name="bigscience/bloom")) as client:
        assert client.get("/v1/models/bigscience/bloom").json()["id"] == "bigscience/bloom"


def test_a_slash_at_the_end_changes_nothing(client: TestClient) -> None:
    def both(method: str, path: str, **body: object) -> None:
        found = [
            client.request(method, f"{path}{end}", follow_redirects=False, **body) for end in ("", "/", "//")
        ]
        assert found[0].status_code == 200
        assert {(each.status_code, each.text) for each in found} == {(200, found[0].text)}

    for path in ("/v1/models", "/v1/models/bloom", "/health", "/openapi.json", ""):
        both("GET", path)
    both("POST", "/tokenize", json={"prompt": "The quick"})
    both("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 2, "temperature": 0})
    error = client.get("/v1/nothing/").json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] == "Not Found: GET '/v1/nothing'"


def test_health_and_version(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/version").json() == {"version": version("bloomdesk")}


@pytest.mark.parametrize("text", ["The quick brown fox\n\n  jumps", "日本語 </s> naïve", ""])
def test_a_text_becomes_tokens_and_back(client: TestClient, model: Model, text: str) -> None:
    found = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert found["tokens"] == model.tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}


def test_tokens_outside_the_vocabulary_are_refused(client: TestClient) -> None:
    for tokens in ([99999], [-1], ["a"]):
        response = client.post("/detokenize", json={"tokens": tokens})
        assert response.status_code == 400 and response.json()["error"]["param"].startswith("tokens")


def test_the_tokenizer_s_file_with_special_tokens_as_texts(model: Model) -> None:
    config = {"bos_token": {"content": "<s>"}, "padding_side": "left"}
    with client_of(model, Settings(tokenizer_config=config)) as client:
        found = client.get("/tokenizer_info").json()
    assert found["bos_token"] == "<s>" and found["padding_side"] == "left"
    assert found["eos_token"] == "</s>" and found["chat_template"] is None


def test_numbers_for_prometheus(client: TestClient) -> None:
    client.post(
        "/v1/completions", json={"prompt": "Count", "temperature": 0, "max_tokens": 3, "cache": False}
    )
    client.get("/nothing/at/all")
    text = client.get("/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers["bloomdesk_passes_total"]) >= 1
    assert float(numbers["bloomdesk_new_tokens_total"]) >= 3
    assert numbers["bloomdesk_ready"] == "1.0"
    assert float(numbers['bloomdesk_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert float(numbers['bloomdesk_requests_total{path="other",status="404"}']) >= 1
    assert "/nothing" not in text


def test_every_path_is_described(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert found["openapi"] == "3.1.0"
    paths = {route.path.replace(":path}", "}") for route in client.app.routes}
    assert set(found["paths"]) == paths - {"/openapi.json"} - PATHS
    for methods in found["paths"].values():
        for operation in methods.values():
            assert {"200", "401", "403", "500", "503"} <= set(operation["responses"])
            assert ("415" in operation["responses"]) == ("requestBody" in operation)
    files = found["paths"]["/v1/files"]
    names = [each["name"] for each in files["get"]["parameters"]]
    assert names == ["after", "limit", "order", "purpose"] and "507" in files["post"]["responses"]
    assert "409" in found["paths"]["/v1/batches/{batch_id}/cancel"]["post"]["responses"]
    schema = found["components"]["schemas"]["CompletionBody"]
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
    assert {"best_of", "echo", "logit_bias", "min_p", "response_format"} <= set(schema["properties"])

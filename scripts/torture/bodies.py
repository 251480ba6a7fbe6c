"""Bodies for the server, as Hypothesis makes them: sound ones, almost sound ones, and anything at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

# With a 500 the server says that it has a fault.
EXPECTED = {200, 400, 401, 404, 405, 408, 413, 415, 429}
GENERATING = ("/v1/completions", "/v1/chat/completions")
ASKING = ("/tokenize", "/detokenize")
FILES, BATCHES = "/v1/files", "/v1/batches"
# Stands for the id of a file that the server has.
KNOWN_FILE = "KNOWN-FILE"
JSON, FORM = "application/json", "multipart/form-data"

_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_texts = st.text(min_size=1, max_size=40) | st.sampled_from(
    ["The quick brown fox", "日本語 </s>", "a\n\n b", "\x00"]
)


def _mostly(sound: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Sound values, and an odd one now and then, so that most bodies get as far as a pass."""
    # Hypothesis prefers numbers at the ends of a range.
    return st.integers(0, 29).flatmap(lambda number: odd if number == 13 else sound)


_tokens = _mostly(st.integers(0, 255), st.sampled_from([-1, 1200, 2**31, 2**70]))
_schemas = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"enum": ["yes", "no"]},
        {"type": "string", "maxLength": 3},
        {"type": 5},
        {"$ref": "#/nowhere"},
        True,
        False,
        {},
    ]
)
_formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema", "xml"])},
    optional={
        "json_schema": st.fixed_dictionaries({"schema": _schemas}, optional={"name": _texts}) | _anything
    },
)
_shared: Mapping[str, st.SearchStrategy[Any]] = {
    "model": _mostly(st.sampled_from(["bloom", None]), st.sampled_from(["gpt-4", ""])),
    "n": _mostly(st.integers(1, 4), st.integers(-1, 0)),
    "stop": _mostly(_texts | st.lists(_texts, max_size=5), st.just([""])),
    "seed": _mostly(st.integers(0, 2**64 - 1), st.integers(-2, 2**65)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "temperature": _mostly(st.floats(0, 3) | st.integers(0, 2), st.just(-0.5)),
    "top_p": _mostly(st.floats(0.01, 1), st.sampled_from([0, -0.1, 1.1])),
    "presence_penalty": st.floats(-3, 3),
    "frequency_penalty": st.floats(-3, 3),
    "logit_bias": st.dictionaries(
        _mostly(st.integers(0, 255).map(str), st.integers(-2, 10**6).map(str) | st.text(max_size=3)),
        st.floats(-200, 200),
        max_size=4,
    ),
    "user": st.text(max_size=300),
    "response_format": _formats,
    "top_k": _mostly(st.integers(0, 50), st.just(-1)),
    "min_p": _mostly(st.floats(0, 1), st.sampled_from([-0.1, 1.1])),
    "repetition_penalty": _mostly(st.floats(0.1, 3), st.sampled_from([0, -0.5])),
    "min_tokens": _mostly(st.integers(0, 4), st.just(-1)),
    "ignore_eos": st.booleans(),
    "cache": st.booleans(),
}
_few = _mostly(st.integers(1, 4), st.sampled_from([-1, 0, 2**31 - 1, 2**31, 10**12]))
_completion = {
    **_shared,
    "prompt": _texts
    | st.lists(_texts, max_size=3)
    | st.lists(_tokens, max_size=6)
    | st.lists(st.lists(_tokens, max_size=6), max_size=3),
    "best_of": _mostly(st.integers(1, 4), st.just(-1)),
    "echo": st.booleans(),
    "logprobs": _mostly(st.integers(0, 5), st.sampled_from([-1, 101])),
    "suffix": _mostly(st.none(), _texts),
}
_message = st.fixed_dictionaries(
    {
        "role": _mostly(st.sampled_from(["system", "user", "assistant"]), st.sampled_from(["tool", ""])),
        "content": _texts
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _texts}), max_size=2),
    },
    optional={"name": _texts},
)
_chat = {
    **_shared,
    "messages": _mostly(st.lists(_message, min_size=1, max_size=3), st.just([])),
    "max_completion_tokens": _few,
    "logprobs": st.booleans(),
    "top_logprobs": _mostly(st.integers(0, 5), st.just(-1)),
}
# What a path's bodies have at least, so that most go further than the first check.
_REQUIRED = {
    "/v1/completions": ({"prompt": _completion["prompt"], "max_tokens": _few}, _completion),
    "/v1/chat/completions": ({"messages": _chat["messages"], "max_tokens": _few}, _chat),
    "/tokenize": ({"prompt": st.text(max_size=50)}, {"add_special_tokens": st.booleans(), "model": _texts}),
    "/detokenize": ({"tokens": st.lists(_tokens, max_size=8)}, {"model": _texts}),
    BATCHES: (
        {
            "input_file_id": _mostly(st.just(KNOWN_FILE), _texts),
            "endpoint": _mostly(st.sampled_from(GENERATING), _texts),
            "completion_window": _mostly(st.sampled_from(["24h", "30d"]), st.sampled_from(["0h", "1", ""])),
        },
        {"metadata": st.dictionaries(_texts, st.text(max_size=20), max_size=18)},
    ),
}


@dataclass(frozen=True)
class Sent:
    """A body, and the header that says what it is."""

    kind: str
    data: bytes


@st.composite
def bodies(draw: st.DrawFn, path: str) -> Sent:
    """A body for this path; `KNOWN_FILE` in it stands for the id of a file that is there."""
    return draw(_forms()) if path == FILES else Sent(JSON, draw(_documents(path)))


@st.composite
def _documents(draw: st.DrawFn, path: str) -> bytes:
    required, others = _REQUIRED[path]
    chosen = draw(st.lists(st.sampled_from(sorted(others)), max_size=5, unique=True))
    body = {name: draw(strategy) for name, strategy in required.items()}
    body |= {name: draw(others[name]) for name in chosen}
    kind = draw(st.integers(0, 19))
    if kind == 5:  # one field is anything
        body[draw(st.sampled_from(sorted(body)) | st.text(max_size=10))] = draw(_anything)
    elif kind == 7:
        return json.dumps(draw(_anything)).encode()
    data = json.dumps(body, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if kind == 9:  # cut off, or with a byte that is not JSON's
        place = draw(st.integers(0, len(data)))
        return data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 3)) :]
    return data


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    """A file of requests, most of which are sound as lines."""
    found = []
    for number in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(GENERATING))
        body = draw(_documents(path)).decode(errors="replace")
        fields = f'"custom_id": "{number}", "method": "POST", "url": "{path}"'
        found.append(f'{{{fields}, "body": {body}}}'.encode())
    return b"\n".join(found)


@st.composite
def _forms(draw: st.DrawFn) -> Sent:
    """A form with a file; now and then with other fields, twice the same, or cut off."""
    # No client sends a header that ends with a space.
    boundary = draw(_mostly(st.just("b" * 8), st.text("b-'\"; ", max_size=80).map(str.rstrip)))
    name = draw(_mostly(st.just("in.jsonl"), st.text(max_size=300)))
    content = draw(_mostly(_lines(), st.binary(max_size=200)))
    parts = [
        ('name="purpose"', draw(_mostly(st.just("batch"), st.text(max_size=20))).encode(errors="replace")),
        (f'name="file"; filename="{name}"', content),
    ]
    kind = draw(st.integers(0, 9))
    if kind == 3:
        parts.append((f'name="{draw(st.text(max_size=20))}"', draw(st.binary(max_size=20))))
    elif kind == 5:
        parts = draw(st.lists(st.sampled_from(parts), max_size=4))
    data = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode(errors="replace")
        + value
        + b"\r\n"
        for head, value in parts
    )
    data += f"--{boundary}--\r\n".encode()
    if kind == 7:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 9)) :]
    return Sent(f"{FORM}; boundary={boundary}", data)


def fault(status: int, content: bytes, kind: str) -> str | None:
    """What is wrong with an answer, or None if it is as it should be."""
    if status not in EXPECTED:
        return f"status {status}"
    text = content.decode()
    if kind.startswith("text/event-stream"):
        if not text.endswith("data: [DONE]\n\n"):
            return "the stream does not end"
        documents = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    else:
        documents = [text]
    found = [json.loads(document, parse_constant=_no_json) for document in documents]
    has_error = any("error" in each for each in found)
    if has_error == (status == 200):
        return f"status {status}, and {text[:200]}"
    if has_error and set(found[0]["error"]) != {"message", "type", "param", "code"}:
        return f"an error of another shape: {text[:200]}"
    return None


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

"""An order: what a client asked for, checked against the model, as requests for the engine."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner.errors import BloomdeskError
from runner.generation.grammar import check_in_time
from runner.generation.model import Model
from runner.generation.options import SEED_BITS, Sampling, with_fields
from runner.generation.sequence import Request
from runner.server.errors import ApiError, bad_request, explained, quoted
from runner.server.schemas import GenerationBody, ResponseFormat
from runner.server.settings import Settings

ANY_OBJECT = '{"type": "object"}'


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and the text that stands for it if it is echoed."""

    ids: Sequence[int]
    text: str


@dataclass(frozen=True)
class Order:
    """Prompts with `best_of` continuations each, of which `n` are given back.

    Request number `i` is continuation `i % best_of` of prompt `i // best_of`.
    """

    model_name: str
    fingerprint: str
    prompts: Sequence[Prompt]
    requests: tuple[Request, ...]
    sampling: Sampling
    n: int = 1
    best_of: int = 1
    echo: bool = False
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    def head(self, kind: str, name: str) -> dict[str, Any]:
        """What all documents of the answer begin with."""
        # A seed that was drawn can be given again.
        seed = {"seed": self.sampling.seed} if self.sampling.draws else {}
        return {
            "id": f"{kind}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model_name,
            "system_fingerprint": self.fingerprint[:16],
            **seed,
        }


def model_named(name: str | None, settings: Settings) -> str:
    """The name of the model. Raises `ApiError` if the client asks for another."""
    if name is None or name == settings.model_name:
        return settings.model_name
    raise ApiError(
        404,
        f"the model {quoted(name)} does not exist here; this server has {settings.model_name}",
        "model",
        "model_not_found",
    )


def sampling_of(body: GenerationBody, settings: Settings, choices: int, logprobs: int | None) -> Sampling:
    """How tokens are chosen, with a drawn seed if one is needed. Raises `ApiError` for what can't be."""
    temperature = 1.0 if body.temperature is None else body.temperature
    # A body names the same number in its own way.
    n = "best_of" if getattr(body, "best_of", None) else "n"
    if choices > settings.most_choices:
        raise bad_request(f"at most {settings.most_choices} continuations of a prompt, found {choices}", n)
    if choices > 1 and not temperature:
        raise bad_request(
            "several continuations need a temperature above 0: without one they are all the same", n
        )
    if body.seed is not None and not 0 <= body.seed < 2**SEED_BITS:
        raise bad_request(f"a seed is a whole number from 0 to 2^{SEED_BITS} - 1", "seed")
    if logprobs is not None and logprobs > settings.most_logprobs:
        name = "top_logprobs" if hasattr(body, "top_logprobs") else "logprobs"
        raise bad_request(f"at most {settings.most_logprobs} log-probabilities of a token", name)
    schema = schema_of(body.response_format)
    if schema and body.ignore_eos:
        raise bad_request("response_format and ignore_eos exclude each other", "ignore_eos")
    # Without a temperature these change nothing, as the likeliest token is among those that they leave.
    drawing = {"top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p, "seed": body.seed, "n": choices}
    given = {
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": body.logit_bias,
        "stop": _stops(body, settings),
        "min_new_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "logprobs": logprobs,
        "json_schema": schema,
    }
    values = {name: value for name, value in given.items() if value is not None}
    if temperature:
        values |= {name: value for name, value in drawing.items() if value is not None}
    try:
        return with_fields(Sampling(temperature), values).seeded()
    except BloomdeskError as error:
        raise explained(error, _param_of(error.message)) from None


def prompt_of(given: str | Sequence[int], model: Model, param: str) -> Prompt:
    """Raises `ApiError` for an empty prompt, or one that isn't made of the model's tokens."""
    try:
        ids = model.tokenizer.encode(given) if isinstance(given, str) else given
    except BloomdeskError as error:
        raise explained(error, param) from None
    return Prompt(ids, given if isinstance(given, str) else "")


def requests_of(
    model: Model,
    prompts: Sequence[Prompt],
    max_tokens: int,
    sampling: Sampling,
    settings: Settings,
    *,
    scores_prompt: bool = False,
) -> tuple[Request, ...]:
    """A request for each continuation. Raises `ApiError` for what the model can't do."""
    if sampling.min_new_tokens > max_tokens:
        raise bad_request(
            f"min_tokens, {sampling.min_new_tokens}, is more than the text may get, {max_tokens}",
            "min_tokens",
        )
    try:
        if not model.grammars.has(sampling):
            check_in_time(sampling, settings.schema_check)
        return tuple(
            replace(request, max_new_tokens=max_tokens, scores_prompt=scores_prompt)
            for number, prompt in enumerate(prompts)
            # Only a batch that stays takes requests for no new token.
            for request in model.requests(prompt.ids, max(1, max_tokens), sampling, number)
        )
    except BloomdeskError as error:
        raise explained(error, _param_of(error.message)) from None


def includes_usage(body: GenerationBody) -> bool:
    """Whether a stream ends with what it took. Raises `ApiError` if there is no stream."""
    if body.stream_options and not body.stream:
        raise bad_request("stream_options is for a stream", "stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)


def _param_of(message: str) -> str | None:
    """The field that an error of the model's is about."""
    about = {
        "logit_bias": "logit_bias",
        "logit bias": "logit_bias",
        "JSON schema": "response_format",
        "prompt": "prompt",
        "token id": "prompt",
    }
    return next((param for words, param in about.items() if words in message), None)


def _stops(body: GenerationBody, settings: Settings) -> tuple[str, ...] | None:
    if body.stop is None:
        return None
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if len(stops) > settings.most_stops:
        raise bad_request(f"at most {settings.most_stops} stop texts, found {len(stops)}", "stop")
    if not all(stops):
        raise bad_request("a stop text must not be empty", "stop")
    return stops


def schema_of(given: ResponseFormat | None) -> str | None:
    """The JSON schema that the output is to fit, if there is one."""
    if given is None:
        return None
    if given.json_schema and given.type != "json_schema":
        raise bad_request(
            f"a json_schema is for the type json_schema, found {given.type}", "response_format.json_schema"
        )
    if given.type == "text":
        return None
    if given.type == "json_object":
        return ANY_OBJECT
    if given.json_schema is None:
        raise bad_request("the type json_schema needs a json_schema", "response_format")
    return json.dumps(given.json_schema.schema_, ensure_ascii=False)

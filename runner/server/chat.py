"""`/v1/chat/completions`: messages become a prompt by the chat template, and growths become documents and chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner.errors import BloomdeskError
from runner.generation.model import Model
from runner.server.choices import Grown, Name, ShownToken
from runner.server.engine import Growth
from runner.server.errors import bad_request, explained
from runner.server.orders import Order, includes_usage, model_named, prompt_of, requests_of, sampling_of
from runner.server.schemas import ChatBody, Message
from runner.server.settings import Settings

OBJECT, CHUNK = "chat.completion", "chat.completion.chunk"


def order_of(body: ChatBody, model: Model, settings: Settings) -> Order:
    """Raises `ApiError`, which names the field, for what can't be done."""
    name = model_named(body.model, settings)
    if settings.chat_template is None:
        raise bad_request(
            "this model has no chat template, so it doesn't know what a message is: send the text to continue to "
            "/v1/completions, or start the server with --chat-template FILE",
            "messages",
        )
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad_request(
            "max_tokens is the old name of max_completion_tokens: give one of them", "max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs is for logprobs: true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    n = body.n or 1
    sampling = sampling_of(body, settings, n, logprobs)
    try:
        text = settings.chat_template.render([_plain(message) for message in body.messages])
    except BloomdeskError as error:
        raise explained(error, "messages") from None
    prompts = [prompt_of(text, model, "messages")]
    max_tokens = body.max_completion_tokens or body.max_tokens or settings.chat_max_tokens
    requests = requests_of(model, prompts, max_tokens, sampling, settings)
    return Order(
        name,
        model.weights.fingerprint,
        prompts,
        requests,
        sampling,
        n,
        n,
        logprobs=logprobs,
        stream=bool(body.stream),
        include_usage=includes_usage(body),
    )


def document(order: Order, model: Model, growths: Sequence[Growth]) -> dict[str, Any]:
    """The answer as a whole."""
    grown = Grown(order, model)
    shown = [
        {
            "index": place,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _logprobs(order, tokens),
            "finish_reason": choice.finish_reason,
        }
        for place, ((text, tokens), choice) in enumerate(
            zip(grown.add_all(growths), grown.choices, strict=True)
        )
    ]
    return {**order.head("chatcmpl", OBJECT), "choices": shown, "usage": grown.usage}


class Chunks:
    """The answer in pieces: first who speaks, then the text, then why it ended."""

    def __init__(self, order: Order, model: Model) -> None:
        self._order, self._grown = order, Grown(order, model)
        self._begun: set[int] = set()

    def of(self, growths: Sequence[Growth]) -> Iterator[dict[str, Any]]:
        """Documents for each choice that has grown."""
        for place, text, tokens in map(self._grown.add, growths):
            if place not in self._begun:
                self._begun.add(place)
                yield self._chunk(place, {"role": "assistant", "content": ""})
            if text or tokens:
                yield self._chunk(
                    place, {"content": text}, _logprobs(self._order, tokens) if tokens else None
                )
            if reason := self._grown.choices[place].finish_reason:
                yield self._chunk(place, {}, None, reason)

    def last(self) -> Iterator[dict[str, Any]]:
        """What comes after the end of all choices."""
        if self._order.include_usage:
            yield self._whole([]) | {"usage": self._grown.usage}

    def _chunk(
        self,
        place: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return self._whole([{"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._order.include_usage else {}
        return {**self._order.head("chatcmpl", CHUNK), "choices": choices, **usage}


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates know it: its parts as one text."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": text, **named}


def _logprobs(order: Order, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
    if order.logprobs is None:
        return None
    return {
        "content": [
            {
                **_named(each.name, each.logprob),
                "top_logprobs": [_named(*other) for other in each.top[: order.logprobs]],
            }
            for each in tokens
        ],
        "refusal": None,
    }


def _named(name: Name, logprob: float | None) -> dict[str, Any]:
    return {"token": name.text, "logprob": logprob, "bytes": list(name.bytes)}

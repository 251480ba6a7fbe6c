"""`/v1/completions`: a body becomes an order, and growths become documents and chunks in the legacy form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner.generation.model import Model
from runner.server.choices import Grown, ShownToken, text_of
from runner.server.engine import Growth
from runner.server.errors import bad_request
from runner.server.orders import (
    Order,
    Prompt,
    includes_usage,
    model_named,
    prompt_of,
    requests_of,
    sampling_of,
)
from runner.server.schemas import CompletionBody
from runner.server.settings import Settings

DEFAULT_MAX_TOKENS = 16
OBJECT = "text_completion"


def order_of(body: CompletionBody, model: Model, settings: Settings) -> Order:
    """Raises `ApiError`, which names the field, for what can't be done."""
    name = model_named(body.model, settings)
    if body.suffix is not None:
        raise bad_request("BLOOM continues texts; it can't fill in a gap before a suffix", "suffix")
    n = body.n or 1
    best_of = body.best_of or n
    if best_of < n:
        raise bad_request(f"best_of must be at least n, found {best_of} and {n}", "best_of")
    if best_of > n and body.stream:
        raise bad_request("the best of several can't be streamed: which it is shows at their end", "best_of")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not max_tokens and not body.echo:
        raise bad_request("max_tokens must be at least 1, or 0 with echo to score the prompt", "max_tokens")
    logprobs = body.logprobs
    # The best are those with the largest log-probabilities.
    inner = 0 if logprobs is None and best_of > n else logprobs
    sampling = sampling_of(body, settings, best_of, inner)
    prompts = _prompts(body, model, settings)
    scores_prompt = bool(body.echo) and logprobs is not None
    requests = requests_of(model, prompts, max_tokens, sampling, settings, scores_prompt=scores_prompt)
    return Order(
        name,
        model.weights.fingerprint,
        prompts,
        requests,
        sampling,
        n,
        best_of,
        bool(body.echo),
        logprobs,
        bool(body.stream),
        includes_usage(body),
    )


def document(order: Order, model: Model, growths: Sequence[Growth]) -> dict[str, Any]:
    """The answer as a whole."""
    grown = Grown(order, model)
    found = grown.add_all(growths)
    shown = []
    for index, place in enumerate(grown.chosen):
        text, tokens = found[place]
        reason = grown.choices[place].finish_reason
        shown.append(_choice(index, text, _logprobs(order, tokens), reason))
    return {**_head(order), "choices": shown, "usage": grown.usage}


class Chunks:
    """The answer in pieces."""

    def __init__(self, order: Order, model: Model) -> None:
        self._order, self._grown = order, Grown(order, model)

    def of(self, growths: Sequence[Growth]) -> Iterator[dict[str, Any]]:
        """A document for each choice that has grown."""
        for place, text, tokens in map(self._grown.add, growths):
            reason = self._grown.choices[place].finish_reason
            if text or tokens or reason:
                logprobs = _logprobs(self._order, tokens) if tokens else None
                yield self._chunk([_choice(place, text, logprobs, reason)])

    def last(self) -> Iterator[dict[str, Any]]:
        """What comes after the end of all choices."""
        if self._order.include_usage:
            yield self._chunk([]) | {"usage": self._grown.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._order.include_usage else {}
        return {**_head(self._order), "choices": choices, **usage}


def _prompts(body: CompletionBody, model: Model, settings: Settings) -> list[Prompt]:
    given = body.prompt
    is_one = isinstance(given, str) or (given and isinstance(given[0], int))
    several = [given] if is_one else given
    if not several:
        raise bad_request("there is no prompt", "prompt")
    if len(several) > settings.most_prompts:
        raise bad_request(f"at most {settings.most_prompts} prompts, found {len(several)}", "prompt")
    found = [prompt_of(each, model, "prompt") for each in several]
    if not body.echo:
        return found
    return [Prompt(each.ids, each.text or text_of(model.tokenizer, each.ids)) for each in found]


def _head(order: Order) -> dict[str, Any]:
    return order.head("cmpl", OBJECT)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(order: Order, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
    if order.logprobs is None:
        return None
    return {
        "tokens": [each.name.text for each in tokens],
        "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [_top(each) for each in tokens],
        "text_offset": [each.offset for each in tokens],
    }


def _top(token: ShownToken) -> dict[str, float] | None:
    """By name, the likeliest first; of tokens with the same name the likeliest counts."""
    found: dict[str, float] = {}
    for name, logprob in token.top:
        found.setdefault(name.text, logprob)
    return found if token.logprob is not None else None

"""`/v1/completions`: a body becomes an order, and growths become documents and chunks in the legacy form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from runner.generation.model import Model
from runner.server.choices import Choice, ShownToken, text_of
from runner.server.engine import Growth
from runner.server.errors import bad_request
from runner.server.orders import Order, Prompt, model_named, prompt_of, requests_of, sampling_of
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
    if body.stream_options and not body.stream:
        raise bad_request("stream_options is for a stream", "stream_options")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not max_tokens and not body.echo:
        raise bad_request("max_tokens must be at least 1, or 0 with echo to score the prompt", "max_tokens")
    logprobs = body.logprobs
    # The best are those with the largest log-probabilities.
    inner = 0 if logprobs is None and best_of > n else logprobs
    sampling = sampling_of(body, settings, best_of, inner)
    prompts = _prompts(body, model, settings)
    scores_prompt = bool(body.echo) and logprobs is not None
    requests = requests_of(model, prompts, max_tokens, sampling, scores_prompt=scores_prompt)
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
        bool(body.stream_options and body.stream_options.include_usage),
    )


def document(order: Order, model: Model, growths: Sequence[Growth]) -> dict[str, Any]:
    """The answer as a whole."""
    choices = _choices(order, model)
    found: list[tuple[list[str], list[ShownToken]]] = [([], []) for _ in choices]
    for growth in growths:
        text, tokens = choices[growth.place].grow(growth)
        found[growth.place][0].append(text)
        found[growth.place][1].extend(tokens)
    chosen = [place for number in range(len(order.prompts)) for place in _best(order, choices, number)]
    shown = [
        _choice(
            index, "".join(found[place][0]), _logprobs(order, found[place][1]), choices[place].finish_reason
        )
        for index, place in enumerate(chosen)
    ]
    return {**_head(order), "choices": shown, "usage": _usage(order, choices)}


class Chunks:
    """The answer in pieces."""

    def __init__(self, order: Order, model: Model) -> None:
        self._order, self._choices = order, _choices(order, model)

    def of(self, growths: Sequence[Growth]) -> Iterator[dict[str, Any]]:
        """A document for each choice that has grown."""
        for growth in growths:
            choice = self._choices[growth.place]
            text, tokens = choice.grow(growth)
            if not (text or tokens or choice.end):
                continue
            logprobs = _logprobs(self._order, tokens) if tokens else None
            yield self._chunk([_choice(growth.place, text, logprobs, choice.finish_reason)])

    def last(self) -> Iterator[dict[str, Any]]:
        """What comes after the end of all choices."""
        if self._order.include_usage:
            yield self._chunk([]) | {"usage": _usage(self._order, self._choices)}

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


def _choices(order: Order, model: Model) -> list[Choice]:
    def choice(prompt: Prompt) -> Choice:
        shows = order.logprobs is not None
        if not order.echo:
            return Choice(model.tokenizer, shows_tokens=shows)
        return Choice(model.tokenizer, shows_tokens=shows, echo=prompt.text, echo_ids=prompt.ids)

    return [choice(prompt) for prompt in order.prompts for _ in range(order.best_of)]


def _best(order: Order, choices: Sequence[Choice], number: int) -> Sequence[int]:
    """The places of the `n` continuations of a prompt with the largest mean log-probability of a token."""
    places = range(number * order.best_of, (number + 1) * order.best_of)
    if order.best_of == order.n:
        return places
    return sorted(places, key=lambda place: -choices[place].logprob / max(1, choices[place].new_tokens))[
        : order.n
    ]


def _head(order: Order) -> dict[str, Any]:
    head = {"id": f"cmpl-{order.id}", "object": OBJECT, "created": order.created, "model": order.model_name}
    # A seed that was drawn can be given again.
    seed = {"seed": order.sampling.seed} if order.sampling.draws else {}
    return {**head, "system_fingerprint": order.fingerprint[:16], **seed}


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


def _usage(order: Order, choices: Sequence[Choice]) -> dict[str, int]:
    new = sum(choice.new_tokens for choice in choices)
    return {
        "prompt_tokens": order.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": order.prompt_tokens + new,
    }
